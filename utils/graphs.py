"""Work recorded once as a CUDA graph and then replayed: one launch instead of hundreds.

Launching the kernels of a small network one by one from Python takes longer than running them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

REHEARSALS = 3  # before a recording: libraries choose their kernels and allocate what they need


class Graphed:
    """A function of tensors that is recorded at its first call with each set of shapes.

    The function must not read a value from the device (`item`, `if`), must draw its random numbers
    from `generators`, and must find everything else it reads at the same addresses every time. The
    next call with the same shapes overwrites what it returned. On devices other than CUDA, it is
    simply called. If it is a network, its forward hooks see every call.

    Args:
        function: takes tensors and Nones, returns a tensor or a tuple of them.
        generators: random generators on the device; a recording leaves them as they were.
        rehearse: what to run before a recording instead of the function, if the function has side
            effects; by default the function itself.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        generators: Sequence[torch.Generator] = (),
        rehearse: Callable[..., Any] | None = None,
    ):
        self.function, self.generators = function, generators
        self.recorded = function.forward if isinstance(function, nn.Module) else function
        self.rehearse = rehearse or self.recorded
        self.recordings: dict[tuple, tuple[torch.cuda.CUDAGraph, list, Any]] = {}

    def __call__(self, *inputs: Tensor | None) -> Any:
        if not any(x is not None and x.is_cuda for x in inputs):
            return self.function(*inputs)
        key = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        if key not in self.recordings:
            self.recordings[key] = self._record(inputs)
        graph, held, outputs = self.recordings[key]
        for own, given in zip(held, inputs, strict=True):
            if own is not None:
                own.copy_(given)
        graph.replay()
        for hook in getattr(self.function, "_forward_hooks", {}).values():
            hook(self.function, inputs, outputs)
        return outputs

    def __getattr__(self, name: str) -> Any:
        """In all other respects it is the function, which may be a network."""
        return getattr(self.function, name)

    def _record(self, inputs: Sequence[Tensor | None]) -> tuple:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what is cached may be freed before the graph
        try:
            return self._record_uncached(inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def _record_uncached(self, inputs: Sequence[Tensor | None]) -> tuple:
        held = [x if x is None else x.clone() for x in inputs]
        states = [generator.get_state() for generator in self.generators]
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                self.rehearse(*held)
        here.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            outputs = self.recorded(*held)
        return graph, held, outputs


def in_parallel(jobs: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Run jobs that do not depend on each other; on CUDA, each on its own stream.

    In a recording they become branches of the graph, which the GPU runs in parallel.
    """
    if device.type != "cuda":
        for job in jobs:
            job()
        return
    here = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in jobs]
    for stream, job in zip(streams, jobs, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            job()
    for stream in streams:
        here.wait_stream(stream)
