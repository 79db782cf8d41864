"""Several processes that work as one, as `torchrun` starts them. Alone, all of this does nothing.

Every process draws the same random numbers for the whole batch and works on its part of it, so the
result does not depend on how many there are, and checkpoints move between any numbers of them.
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
ARRIVAL = datetime.timedelta(minutes=10)  # of the last process after the first
NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}  # alone


def _environment() -> dict[str, int]:
    """What `torchrun` says of this process. Raises UserError where only a part is said.

    Schedulers, notebooks and what was exported in a shell leave such parts behind.
    """
    numbers = {}
    for name, alone in NUMBERS.items():
        value = os.environ.get(name) or str(alone)
        if not value.isdecimal():
            raise UserError(f"environment: {name}={value}: must be a number, or not be set")
        numbers[name] = int(value)
    if (numbers["RANK"], numbers["WORLD_SIZE"]) != (0, 1):
        names = (*NUMBERS, "MASTER_ADDR")
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        missing = ", ".join(name for name in names if not os.environ.get(name))
        if missing:
            raise UserError(
                f"environment: {given} without {missing}: start several processes by torchrun; for"
                " one, unset these"
            )
        if not numbers["RANK"] < numbers["WORLD_SIZE"]:
            raise UserError(f"environment: {given}: RANK must be below WORLD_SIZE")
    return numbers


def local_rank() -> int:
    """The number of this process on its machine, from 0. May raise UserError, as `joined`."""
    return _environment()["LOCAL_RANK"]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Work together with the other processes of this `torchrun`, if there are any.

    Where one of them fails all do, and the first of them says why. Raises UserError where the
    others cannot be found.
    """
    with contextlib.nullcontext() if _environment()["WORLD_SIZE"] == 1 else group(device):
        yield


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Work together with the processes that the environment names, be it this one alone."""
    import torch._dynamo  # noqa: F401  imported later, it would hold the group for good

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail(store):  # what fails here is the talk with who has failed before
            raise SystemExit(2) from None
        if isinstance(error, UserError):
            error.speaks = True
        raise
    finally:
        gc.collect()  # so that nothing holds the group: its threads must end before Python does
        dist.destroy_process_group()


def _join(backend: str) -> dist.Store:
    """Find the other processes; the dictionary that they share."""
    try:
        store, number, count = next(rendezvous("env://", timeout=ARRIVAL))
        store.set_timeout(PATIENCE)
        dist.init_process_group(
            backend, store=store, rank=number, world_size=count, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"the other processes do not meet at {address}: {reason}") from None
    return store


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the process that kept it has ended
        return False


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """On each machine the first process does this, then the others: it may have to download."""
    waits = size() > 1 and local_rank() > 0
    if waits:
        total(0)
    yield
    if not waits:
        total(0)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """True for the one process that writes files and talks."""
    return rank() == 0


def part(length: int) -> slice:
    """The part of a batch of `length` that this process works on; `length` must divide evenly."""
    own = length // size()
    return slice(rank() * own, (rank() + 1) * own)


def of_first(value: Any) -> Any:
    """What the first process has for `value`; a plain Python object."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def largest(*numbers: float) -> list[float]:
    """Of each number, the largest that a process has."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def total(number: float) -> float:
    """The sum over the processes."""
    return float(_sum(torch.tensor(number, dtype=torch.float64)))


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, of a tensor that each of them has."""
    return _sum(values) / size()


def average(tensors: list[Tensor]) -> None:
    """Replace tensors of one kind by their means over the processes, in one message."""
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
    """Everybody's tensors, where process r of R has those numbered r, r + R, r + 2R, ..."""
    if not dist.is_initialized():
        return own
    lists: list[list[Tensor]] = [[] for _ in range(size())]
    dist.all_gather_object(lists, own)
    return [lists[k % size()][k // size()] for k in range(sum(map(len, lists)))]
