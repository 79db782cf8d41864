"""One update of the weights: gradient, clipping, optimizers, and the average."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from config import TrainConfig, UserError
from models.layers import NoisePredictor
from training.ema import EMA
from training.muon import Muon
from utils.device import DTYPES, arithmetic

BAD_STEPS = 3  # in a row, that end a run

Loss = Callable[..., Tensor]


def learning_rate(peak: float, progress: float) -> float:
    """Warm up over the first 2% of the run, stay constant, fall linearly to 0 over the last 60%."""
    return peak * min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.6)


def build_optimizers(
    net: NoisePredictor, cfg: TrainConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon for the weights between layers; AdamW for biases, norms and the network's outer parts.

    Jordan et al. 2024 split them this way: what Muon assumes of both sides of a matrix is true only
    of inner layers.
    """
    named = list(net.named_parameters())
    inner = [p for name, p in named if p.ndim >= 2 and not name.startswith(net.outer)]
    others = [p for name, p in named if p.ndim < 2 or name.startswith(net.outer)]
    fused = device.type in ("cpu", "cuda")
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    return [
        torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused, **options),
        Muon(inner, **options, dtype=DTYPES[arithmetic(device, cfg.precision)]),
    ]


class Optimization:
    """A network with its optimizers and its average, which take a step together.

    Attributes:
        net: the network that learns.
        ema: its average, or None.
        taken, skipped: how many steps changed the weights, and how many had a bad gradient.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        *,
        grad_clip: float,
        ema_length: float | None,
    ):
        self.net, self.optimizers, self.grad_clip = net, optimizers, grad_clip
        self.ema = EMA(net, ema_length) if ema_length else None
        self.taken, self.skipped, self.bad_in_a_row = 0, 0, 0

    def step(self, loss: Loss, *inputs: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Step down the gradient of the scalar loss(*inputs) with learning rate `lr`.

        Returns the loss and the gradient's norm, on the device. If the gradient is not finite, only
        the counts change. Raises UserError at the third such step in a row.
        """
        value = loss(*inputs)
        self.net.zero_grad()
        value.backward()
        return value.detach(), self.follow(lr)

    def follow(self, lr: float) -> Tensor:
        """Step down the gradient stored in the weights, as `step` does; returns its norm."""
        self.set_lr(lr)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.grad_clip)
        if norm.isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
            self.taken += 1
            if self.ema:
                self.ema.update(self.net, self.taken)
            self.bad_in_a_row = 0
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
            self.check()
        return norm

    def set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr

    def check(self) -> None:
        """Call this at every report. Raises UserError after three bad steps in a row."""
        if self.bad_in_a_row >= BAD_STEPS:
            raise UserError(
                f"step {self.taken + self.skipped}: loss or gradient was not finite {BAD_STEPS}"
                " times in a row; try a lower --lr, or --precision fp32"
            )

    def state(self) -> dict:
        """What a checkpoint stores of it."""
        return {
            "network": self.net.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "taken": self.taken,
            "skipped": self.skipped,
        }

    def load_state(self, state: dict) -> None:
        """Restore what `state` returned, here or on another device.

        Raises KeyError, TypeError, ValueError or RuntimeError if it does not fit.
        """
        self.net.load_state_dict(state["network"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # with the options of this device
            if [g["params"] for g in kept["param_groups"]] != [g["params"] for g in groups]:
                raise ValueError("the optimizer state belongs to other weights")
            optimizer.load_state_dict({"state": kept["state"], "param_groups": groups})
            for p, values in optimizer.state.items():  # torch does not check their shapes
                if any(v.ndim and v.shape != p.shape for v in values.values()):
                    raise ValueError("the optimizer state has the wrong shape")
        self.skipped = int(state.get("skipped", 0))  # older checkpoints lack both
        self.taken = int(state["taken"] if "taken" in state else state["step"] - self.skipped)
