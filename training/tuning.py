"""Consistency tuning, the first part of a distillation, and what the second shares with it."""

import copy

import torch
from torch import Tensor

from config import TrainConfig
from models.layers import NoisePredictor
from models.trained import TrainedModel
from training import distillation
from training.distillation import column
from training.optimization import Optimization, build_optimizers, learning_rate
from utils import distributed
from utils.device import autocast

# First and last q of `lower_level`: coarse gaps first. bfloat16 rounding hides much finer ones.
Q = (8.0, 64.0)
LOG_SIGMA = (-0.9, 2.0)  # mean and standard deviation of the levels
# Every eighth image is at one of the ten highest levels, where sampling begins and which the others
# rarely reach.
TOP_EVERY, TOP_LEVELS = 8, 10


def copy_of(net: NoisePredictor) -> NoisePredictor:
    """A trainable copy."""
    return copy.deepcopy(net).train().requires_grad_(True)


def descend(optimization: Optimization, loss: Tensor, rate: float) -> Tensor:
    """Step down the mean gradient of `loss` over all processes; returns its norm, on the device."""
    optimization.net.zero_grad()
    loss.backward()
    distributed.average([p.grad for p in optimization.net.parameters() if p.grad is not None])
    return optimization.follow(rate)


class Draws:
    """Random numbers for the batch of all processes, of which this process gets its part."""

    def __init__(self, generator: torch.Generator, shape: torch.Size):
        """For a whole batch of `shape` (B, C, H, W)."""
        self.generator, self.shape = generator, shape
        self.part = distributed.part(shape[0])

    def noise(self) -> Tensor:
        """Standard normal noise, shaped like this part of the batch, on the device."""
        device = self.generator.device
        return torch.randn(self.shape, generator=self.generator, device=device)[self.part]

    def uniform(self) -> Tensor:
        """A number in [0, 1) for each image; float64 on the CPU, as noise levels are."""
        return self._uniform()[self.part]

    def stratified(self) -> Tensor:
        """The same, with one number in each of B equal intervals, in random order."""
        share = (torch.arange(self.shape[0]) + self._uniform()) / self.shape[0]
        return share[self._uniform().argsort()][self.part]

    def _uniform(self) -> Tensor:
        device = self.generator.device
        return torch.rand(self.shape[0], generator=self.generator, device=device).cpu().double()


class Phase:
    """One phase of training a student with its teacher.

    Attributes:
        optimization: the student with its optimizers and its average.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        teacher: TrainedModel,
        optimization: Optimization,
        generator: torch.Generator,
    ):
        self.cfg, self.teacher, self.optimization = cfg, teacher, optimization
        self.diffusion, self.schedule = teacher.diffusion, teacher.diffusion.schedule
        self.student, self.generator = optimization.net, generator

    def denoised(
        self, net: NoisePredictor, x0: Tensor, eps: Tensor, sigma: Tensor, y: Tensor | None
    ) -> Tensor:
        """D(x0 + sigma eps, sigma) of `net`, not clamped; sigma (B,) float64 on the CPU."""
        x = x0 + column(sigma.to(x0)) * eps
        with autocast(self.teacher.device, self.cfg.precision):
            return self.diffusion.x0_hat(net, x, sigma, y)

    def state(self) -> dict:
        return self.optimization.state()

    def load_state(self, state: dict) -> None:
        self.optimization.load_state(state)


class Tuning(Phase):
    """Consistency tuning (Geng et al. 2024, "Consistency Models Made Easy", ECT).

    The student starts as a copy of the teacher. At any noise level it learns to predict what it
    predicts at a slightly lower one, for the same image and noise; at the lowest, the image itself.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        teacher: TrainedModel,
        student: NoisePredictor,
        generator: torch.Generator,
    ):
        optimizers = build_optimizers(student, cfg, teacher.device)
        options = {"grad_clip": cfg.grad_clip, "ema_length": cfg.ema_length}
        super().__init__(cfg, teacher, Optimization(student, optimizers, **options), generator)

    def step(self, x0: Tensor, y: Tensor | None, progress: float) -> tuple[Tensor, Tensor]:
        """Take one step on the batch of all processes; `progress` is that of the phase.

        Returns the loss and the gradient norm. The gradient at the images has a fixed size.
        """
        draws = Draws(self.generator, x0.shape)
        sigma, eps = self.draw_levels(draws), draws.noise()
        x0, y = x0[draws.part], None if y is None else y[draws.part]
        lower = distillation.lower_level(sigma, Q[0] * (Q[1] / Q[0]) ** progress)
        lowest = self.schedule.sigmas[0]
        lower = torch.where(lower < lowest, 0.0, lower)  # where the image itself is the target
        with torch.no_grad():
            below = self.denoised(self.student, x0, eps, lower.clamp(min=lowest), y)
        target = torch.where(column(lower == 0).to(x0.device), x0, below.clamp(min=-1))
        raw = self.denoised(self.student, x0, eps, sigma, y)
        at = raw.detach().requires_grad_()
        loss = distillation.consistency_loss(at, target, sigma, lower).mean()
        gradient = distillation.unit(torch.autograd.grad(loss, at)[0])
        rate = learning_rate(self.cfg.lr, progress)
        norm = descend(self.optimization, distillation.pull(raw, gradient), rate)
        return loss.detach(), norm

    def draw_levels(self, draws: Draws) -> Tensor:
        """Noise levels sigma: most of them log-normal (Karras et al. 2022, table 1)."""
        levels, (mean, std) = self.schedule.sigmas, LOG_SIGMA
        normal = torch.special.ndtri(draws.uniform().clamp(1e-6, 1 - 1e-6))
        sigma = (mean + std * normal).exp().clamp(levels[0], levels[-1])
        top = levels.flip(0)[:TOP_LEVELS]
        high = top[(len(top) * draws.uniform()).long()]
        number = torch.arange(draws.shape[0])[draws.part]
        return torch.where(number % TOP_EVERY == 0, high, sigma)
