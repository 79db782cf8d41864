"""Work recorded once as a CUDA graph and then replayed: one launch in place of hundreds.

The kernels of a small network take less time than launching them one by one from Python does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

REHEARSALS = 3  # before a recording: libraries choose their kernels and allocate what they need


class Graphed:
    """A function of tensors that is recorded at its first call with each set of shapes.

    The function must not read a value from the device (`item`, `if`), must draw its random numbers
    from `generators`, and must find what else it reads at the same addresses every time. What it
    returns is overwritten by the next call with the same shapes. Anywhere but on CUDA, a call is a
    plain call of the function. If that is a network, its forward hooks see every call.

    Args:
        function: takes tensors and Nones, returns a tensor or a tuple of them.
        generators: of random numbers on the device; a recording leaves them as they were.
        rehearse: what to run before a recording in place of the function, if that would leave
            traces; by default the function itself.
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
        """In all else it is the function, which may be a network."""
        return getattr(self.function, name)

    def _record(self, inputs: Sequence[Tensor | None]) -> tuple:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what it holds may end before the graph does
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
    """Run jobs that need nothing of each other; on CUDA each on a stream of its own.

    In a recording they become branches of the graph, which the GPU runs side by side.
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
