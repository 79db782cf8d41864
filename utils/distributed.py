"""Several processes that work as one, started by `torchrun`. A single process needs none of it.

Every process draws the same random numbers for the whole batch and works on its part of it, so the
result does not depend on the number of processes, which may change when a run is resumed.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from config import UserError

PATIENCE = datetime.timedelta(hours=2)  # for process 0, which scores while the others wait
ARRIVAL = datetime.timedelta(minutes=10)  # for the last process to arrive after the first
NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}  # for one process


def _environment() -> dict[str, int]:
    """The variables that `torchrun` sets. Raises UserError if only some of them are set.

    Schedulers, notebooks and exports in a shell can leave some behind.
    """
    numbers = {}
    for name, alone in NUMBERS.items():
        value = os.environ.get(name) or str(alone)
        if not value.isdecimal():
            raise UserError(f"environment: {name}={value}: must be a number or unset")
        numbers[name] = int(value)
    if (numbers["RANK"], numbers["WORLD_SIZE"]) != (0, 1):
        names = (*NUMBERS, "MASTER_ADDR")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        missing = ", ".join(name for name in names if not os.environ.get(name))
        if missing:
            raise UserError(
                f"environment: {given} without {missing}: start several processes with torchrun; to"
                " run one, unset these"
            )
        if not numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise UserError(f"environment: {given}: RANK must be below WORLD_SIZE")
    return numbers


def local_rank() -> int:
    """The number of this process on its machine, from 0. May raise UserError, like `joined`."""
    return _environment()["LOCAL_RANK"]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Work together with the other processes of this `torchrun`, if there are any.

    If one of them fails, all do, and the first to fail says why. Raises UserError if the others
    cannot be found.
    """
    with contextlib.nullcontext() if _environment()["WORLD_SIZE"] == 1 else group(device):
        yield


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Work together with the processes that the environment names, even if this is the only one."""
    import torch._dynamo  # noqa: F401  if imported later, it would keep the group alive

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail(store):  # this is the lost connection to one that failed before
            raise SystemExit(2) from None
        if isinstance(error, UserError):
            error.speaks = True
        raise
    finally:
        gc.collect()  # drop references to the group: its threads must end before Python does
        dist.destroy_process_group()


def _join(backend: str) -> dist.Store:
    """Find the other processes; returns the key-value store that they share."""
    try:
        store, number, count = next(rendezvous("env://", timeout=ARRIVAL))
        store.set_timeout(PATIENCE)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"cannot reach the other processes at {address}: {reason}") from None
    return store


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the process that hosts the store has ended
        return False


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """On each machine, run this in the first process, which may download, then in the others."""
    waits = size() > 1 and local_rank() > 0
    if waits:
        total(0)
    yield
    if not waits:
        total(0)


def rank() -> int:
    """The number of this process, counted from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """True for the one process that writes files and prints."""
    return rank() == 0


def part(length: int) -> slice:
    """The part of a batch of `length` that this process works on; `length` must divide evenly."""
    own = length // size()
    return slice(rank() * own, (rank() + 1) * own)


def of_first(value: Any) -> Any:
    """The `value` of the first process, a plain Python object."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def largest(*numbers: float) -> list[float]:
    """The maximum over the processes, of each number."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def total(number: float) -> float:
    """The sum over the processes."""
    return float(_sum(torch.tensor(number, dtype=torch.float64)))


def mean(values: Tensor) -> Tensor:
    """The mean over the processes."""
    return _sum(values) / size()


def average(tensors: list[Tensor]) -> None:
    """Replace tensors of one dtype with their means over the processes, in one message."""
    if dist.is_initialized():
        means = mean(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = means.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _sum(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def interleave(own: list[Tensor]) -> list[Tensor]:
    """The tensors of all processes, where process r of R has numbers r, r + R, r + 2R, ..."""
    if not dist.is_initialized():
        return own
    lists: list[list[Tensor]] = [[] for _ in range(size())]
    dist.all_gather_object(lists, own)
    return [lists[k % size()][k // size()] for k in range(sum(map(len, lists)))]
