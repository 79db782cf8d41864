"""Where to compute, and at what precision."""

import contextlib
import os

import torch

from config import UserError
from utils.distributed import local_rank


def pick_device(name: str, precision: str = "auto") -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError if the device is missing.

    From now on, float32 means float32: a GPU rounds products to TF32 only if `precision` is tf32,
    so that a score is the same on every device.
    """
    tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, ok in present.items() if ok)
    if name == "cuda" and present["cuda"]:  # each process of a torchrun has its own
        return torch.device("cuda", _own_gpu())
    if not present[name]:
        allowed = ", ".join(["auto", *(device for device, ok in present.items() if ok)])
        raise UserError(f"--device {name}: not available on this machine; must be {allowed}")
    return torch.device(name)


def _own_gpu() -> int:
    number, count = local_rank(), torch.cuda.device_count()
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # so that all of them raise this error
    processes = max(number + 1, int(processes) if processes.isdecimal() else 1)
    if processes > count:
        raise UserError(f"--device cuda: {processes} processes, but {count} GPUs on this machine")
    return number


def has_fast_bf16(device: torch.device) -> bool:
    """True if the hardware computes in bfloat16 itself, so that it is faster, not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # torch before 2.12 cannot tell, so it uses float32
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def arithmetic(device: torch.device, precision: str) -> str:
    """Resolve `--precision` for this device: auto becomes bf16 if that is fast, else fp32."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 if `arithmetic` says so."""
    if arithmetic(device, precision) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def check_compile(device: torch.device) -> None:
    """Raise UserError if torch.compile does not work here, for example without a compiler."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of many kinds, depending on what is missing
        reason = next(filter(None, str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(f"--compile: does not work here: {reason}") from None


def sampling_batch(device: torch.device) -> int:
    """How many images to draw at a time: few fit in a CPU's caches, and a GPU needs many."""
    return 250 if device.type == "cpu" else 1000
