"""Where to compute, in what precision, and with which random numbers."""

import contextlib

import numpy as np
import torch

from config import UserError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError for an absent one."""
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, ok in present.items() if ok))
    if not present[name]:
        allowed = ", ".join(["auto", *(device for device, ok in present.items() if ok)])
        raise UserError(f"--device {name}: not on this machine, which has {allowed}")
    return torch.device(name)


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 has arithmetic units of its own, so that it is faster, not emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":  # torch before 2.12 cannot tell, and stays with float32
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16 if `precision` is bf16, or auto where that is fast; else float32."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def seeded_generator(*keys: int) -> torch.Generator:
    """A CPU generator for a tuple of whole numbers >= 0; other keys give unrelated streams."""
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
