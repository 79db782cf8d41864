"""Samplers: integrate a denoiser from pure noise to an image. Each fits on one screen.

All have the same signature:

    sample(denoise, x, sigmas, noise) -> x0

    denoise  D(x, sigma) -> x0_hat, see `Diffusion.denoiser`
    x        (B, C, H, W) start: x0 + sigmas[0] * eps; in practice `sigmas[0] * eps` alone
    sigmas   (steps + 1,) float64, decreasing; the last one is 0
    noise    noise() -> (B, C, H, W) standard normal; only stochastic samplers draw it

Some take more arguments: eta for DDIM and DPM-Solver++, churn for Heun, the picture for RePaint.

All work in variance-exploding coordinates x = x0 + sigma * eps, where the probability flow is
dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 1 and 3), and all end on the value
of D at the last noise level. One step is one network call, except two for Heun.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import FEW_STEP_SAMPLER
from models.diffusion import Denoiser

Noise = Callable[[], Tensor]

LONG_STEP = 100  # ratio of successive noise levels from which on Heun takes an Euler step


def change_since(previous: Tensor, denoise: Denoiser, x0_hat: Tensor) -> Tensor:
    """x0_hat - previous, without the jump where guidance starts or ends between the two calls."""
    return denoise.change() if hasattr(denoise, "change") else x0_hat - previous


def split_noise(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Levels of the old noise kept and of fresh noise: sigma_down^2 + sigma_up^2 = sigma_next^2.

    Song et al. 2021, eq. 16, in terms of sigma: for eta 1, sigma_up is the standard deviation of x
    at sigma_next given x at sigma and x0.
    """
    sigma_up = eta * sigma_next * (1 - (sigma_next / sigma) ** 2).sqrt()
    return (sigma_next**2 - sigma_up**2).sqrt(), sigma_up


def sample_ddim(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta 0 is deterministic, eta 1 is DDPM.

    In these coordinates eta = 0 is Euler's method on the probability flow.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0_hat = denoise(x, sigma)
        sigma_down, sigma_up = split_noise(sigma, sigma_next, eta)
        x = x0_hat + float(sigma_down / sigma) * (x - x0_hat)
        if sigma_up > 0:
            x = x + float(sigma_up) * noise()
    return x


def sample_ddpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Ancestral sampling with the posterior variance (Ho et al. 2020, algorithm 2, eq. 6-7)."""
    return sample_ddim(denoise, x, sigmas, noise, eta=1.0)


def sample_dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.0
) -> Tensor:
    """DPM-Solver++(2M), second order (Lu et al. 2022b): eta 0 is algorithm 2, deterministic.

    Each step extrapolates the denoised image from the last two in log sigma. The first step has
    no past and the last has infinite length in log sigma, so both are plain DDIM steps. DDIM's eta
    then adds fresh noise: 1 is the paper's SDE-DPM-Solver++(2M).

    The exact probability flow needs no fresh noise. A learnt one benefits from it, because fresh
    noise reduces the errors of earlier steps: at eta 0.75, by more than a deterministic sampler can
    gain from any number of steps. The full noise of DDPM, eta 1, would need more steps.
    """
    previous, last_step = None, None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0_hat = denoise(x, sigma)
        step = (sigma / sigma_next).log()  # h_i; lambda = -log sigma in these coordinates
        target = x0_hat
        if previous is not None and sigma_next > 0:
            change = change_since(previous, denoise, x0_hat)
            target = x0_hat + float(step / last_step / 2) * change  # 1 / (2 r_i)
        sigma_down, sigma_up = split_noise(sigma, sigma_next, eta)
        x = target + float(sigma_down / sigma) * (x - target)
        if sigma_up > 0:
            x = x + float(sigma_up) * noise()
        previous, last_step = x0_hat, step
    return x


def sample_heun(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: float = 0.0
) -> Tensor:
    """Heun's method on the probability flow (Karras et al. 2022, algorithms 1 and 2).

    Second order, with two network calls per step. A step across orders of magnitude, from the
    highest level or to 0, is an Euler step with one call, because the mean of two slopes is
    meaningless there. `churn` is the paper's S_churn: before each step, fresh noise raises sigma by
    a fraction churn / steps, at most sqrt(2) - 1. With churn 0 the sampler is deterministic, and
    `sigmas` may also increase, to encode an image.
    """
    gamma = min(churn / (len(sigmas) - 1), 2**0.5 - 1)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        if gamma > 0:
            x = x + float(sigma * (gamma**2 + 2 * gamma) ** 0.5) * noise()
            sigma = sigma * (1 + gamma)
        x0_hat = denoise(x, sigma)
        slope = (x - x0_hat) / float(sigma)
        step = float(sigma_next - sigma)
        x_next = x + step * slope
        if max(sigma, sigma_next) < LONG_STEP * min(sigma, sigma_next):
            slope_next = (x_next - denoise(x_next, sigma_next)) / float(sigma_next)
            x_next = x + step * (slope + slope_next) / 2
        x = x_next
    return x


def sample_unipc(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1, deterministic (Zhao et al. 2023, algorithms 1 and 2).

    The predictor is DPM-Solver++(2M). The corrector then repeats the step with the denoised image
    at its end, which the next step needs anyway: third order at one network call per step.
    """
    x0_hat = denoise(x, sigmas[0])
    change, last_step = None, None
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        h = float((sigma / sigma_next).log())  # lambda = -log sigma in these coordinates
        weight = -math.expm1(-h)
        euler = x0_hat + math.exp(-h) * (x - x0_hat)
        past = 0.0 if change is None else change * (h / last_step)
        x0_next = denoise(euler + weight / 2 * past, sigma_next)
        first, change = change is None, change_since(x0_hat, denoise, x0_next)
        b1 = (1 - weight / h) / weight  # for a change linear in lambda
        b2 = (1 - 2 * (1 - weight / h) / h) / weight  # for a quadratic one
        bend = 0.0 if first else (b1 - b2) / (1 + last_step / h)
        x = euler + weight * (bend * past + (b1 - bend) * change)
        last_step, x0_hat = h, x0_next
    return x0_hat


def sample_consistency(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), for distilled networks.

    Their D is already an image, not the mean of all images that may lie under the noise. The first
    call is D at the highest level; each further call adds fresh noise to the image and refines it.
    """
    x0_hat = denoise(x, sigmas[0])
    for sigma in sigmas[1:-1]:
        x0_hat = denoise(x0_hat + float(sigma) * noise(), sigma)
    return x0_hat


def sample_repaint(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise,
    known: Tensor,
    missing: Tensor,
    repeats: int = 10,
) -> Tensor:
    """Inpainting with RePaint (Lugmayr et al. 2022, algorithm 1): ancestral steps, each repeated.

    Args:
        known: (B, C, H, W) the picture, in [-1, 1].
        missing: like `known`, bool: the pixels to draw. All others are returned unchanged.
        repeats: how often each step is taken, with its noise added back in between. This makes the
            drawn pixels agree with the known ones, which do not depend on them.
    """
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        for left in reversed(range(repeats if sigma_next > 0 else 1)):
            drawn = sample_ddpm(denoise, x, torch.stack([sigma, sigma_next]), noise)
            given = known + float(sigma_next) * noise() if sigma_next > 0 else known
            x_next = torch.where(missing, drawn, given)
            if left:
                x = x_next + float((sigma**2 - sigma_next**2).sqrt()) * noise()
        x = x_next
    return x


def encode(denoise: Denoiser, x0: Tensor, sigmas: Tensor) -> Tensor:
    """The start from which a deterministic sampler draws x0: the probability flow run backwards.

    Takes x0 (B, C, H, W) in [-1, 1] and the decreasing `sigmas` of sampling; returns x at sigmas[0]
    (Song et al. 2021b, section 4.3). x0 is taken as the flow's value at the lowest level above 0.
    """
    return sample_heun(denoise, x0, sigmas[:-1].flip(0), lambda: x0)  # Heun draws no noise here


@dataclass(frozen=True)
class Sampler:
    """A sampler's function and the settings that suit it best.

    Attributes:
        spacing, steps: of the noise levels; steps None means T.
        eta, churn: the default of that option; None if the sampler has no such option.
        noisy: True if it draws fresh noise between steps, whatever its options.
    """

    function: Callable[..., Tensor]
    spacing: str
    steps: int | None
    eta: float | None = None
    churn: float | None = None
    noisy: bool = False


# With guidance, the default's 13 steps take 16 network calls: it doubles those at three levels.
SAMPLERS = {
    "dpmpp_2m_sde": Sampler(sample_dpmpp_2m, "logsnr", 13, eta=0.75),
    "unipc": Sampler(sample_unipc, "logsnr", 15),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, "logsnr", 15),
    "heun": Sampler(sample_heun, "karras", 10, churn=0.0),
    "ddim": Sampler(sample_ddim, "linear", 50, eta=0.0),
    "ddpm": Sampler(sample_ddpm, "linear", None, noisy=True),
    FEW_STEP_SAMPLER: Sampler(sample_consistency, "fewstep", 1, noisy=True),
}
INPAINTERS = {"repaint": Sampler(sample_repaint, "linear", 50, noisy=True)}
