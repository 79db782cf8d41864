"""Samplers: integrate a denoiser from pure noise to an image. One screen each, one signature.

    sample(denoise, x, sigmas, noise) -> x0

    denoise  D(x, sigma) -> x0_hat, see `Diffusion.denoiser`
    x        (B, C, H, W) start: x0 + sigmas[0] * eps; in practice `sigmas[0] * eps` alone
    sigmas   (steps + 1,) float64, falling, the last one 0
    noise    noise() -> (B, C, H, W) standard normal; only stochastic samplers draw it

Some have options of their own: eta of DDIM and DPM-Solver++, Heun's churn, RePaint's picture.

All work in variance-exploding coordinates x = x0 + sigma * eps, where the probability flow is
dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 1 and 3), and all end on the value
of D at the last noise level. One step is one network call, but two for Heun.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config import GUIDED, IMAGE_SIZE, SAMPLER, UserError
from models.diffusion import Denoiser, Diffusion
from utils.data_loader import to_model_range, to_uint8
from utils.device import autocast, sampling_batch, seeded_generator

Noise = Callable[[], Tensor]

LONG_STEP = 100  # from one noise level to the next, as a ratio


def split_noise(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The noise left of the old, and the fresh: sigma_down^2 + sigma_up^2 = sigma_next^2.

    Song et al. 2021, eq. 16, in terms of sigma: for eta 1 the standard deviation of x at sigma_next
    given x at sigma and x0.
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
    no past and the last has infinite length in log sigma: both are plain DDIM steps. DDIM's eta
    then brings in fresh noise: 1 is the paper's SDE-DPM-Solver++(2M).
    """
    previous, last_step = None, None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0_hat = denoise(x, sigma)
        step = (sigma / sigma_next).log()  # h_i; lambda = -log sigma in these coordinates
        target = x0_hat
        if previous is not None and sigma_next > 0:
            target = x0_hat + float(step / last_step / 2) * (x0_hat - previous)  # 1 / (2 r_i)
        sigma_down, sigma_up = split_noise(sigma, sigma_next, eta)
        x = target + float(sigma_down / sigma) * (x - target)
        if sigma_up > 0:
            x = x + float(sigma_up) * noise()
        previous, last_step = x0_hat, step
    return x


def sample_dpmpp_2m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, eta: float = 0.75
) -> Tensor:
    """DPM-Solver++(2M) with fresh noise, that wears away the errors of earlier steps.

    The exact probability flow needs none, a learnt one gains by it: more than a deterministic
    sampler can by any number of steps. All of DDPM's noise, eta 1, would need more of them.
    """
    return sample_dpmpp_2m(denoise, x, sigmas, noise, eta)


def sample_heun(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: float = 0.0
) -> Tensor:
    """Heun's method on the probability flow (Karras et al. 2022, algorithms 1 and 2).

    Second order with two network calls a step. A step across orders of magnitude, from the highest
    level or to 0, is Euler's and has one: the mean of two slopes means nothing there. `churn` is
    the paper's S_churn: before each step, fresh noise lifts sigma by churn / steps of itself, at
    most by sqrt(2) - 1. 0 is deterministic, and then `sigmas` may also rise, to encode an image.
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

    The predictor is DPM-Solver++(2M). The corrector then takes the step again with the denoised
    image of its end, which the next step needs anyway: third order at one network call a step.
    """
    x0_hat = denoise(x, sigmas[0])
    previous, last_step = None, None
    for sigma, sigma_next in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        h = float((sigma / sigma_next).log())  # lambda = -log sigma in these coordinates
        weight = -math.expm1(-h)
        euler = x0_hat + math.exp(-h) * (x - x0_hat)
        past = 0.0 if previous is None else (x0_hat - previous) * (h / last_step)
        x0_next = denoise(euler + weight / 2 * past, sigma_next)
        change = x0_next - x0_hat
        b1 = (1 - weight / h) / weight  # of a change linear in lambda
        b2 = (1 - 2 * (1 - weight / h) / h) / weight  # of a quadratic one
        bend = 0.0 if previous is None else (b1 - b2) / (1 + last_step / h)
        x = euler + weight * (bend * past + (b1 - bend) * change)
        previous, last_step, x0_hat = x0_hat, h, x0_next
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
        missing: like `known`, bool: the pixels to draw. All others come back as they are.
        repeats: how often a step is taken, with its noise put back in between; so the drawn
            pixels come to agree with the known ones, which know nothing of them.
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

    Takes x0 (B, C, H, W) in [-1, 1] and the falling `sigmas` of sampling; returns x at sigmas[0]
    (Song et al. 2021b, section 4.3). x0 counts as the flow's value at the lowest level.
    """
    return sample_heun(denoise, x0, sigmas[:-1].flip(0), lambda: x0)  # which draws no noise


@dataclass(frozen=True)
class Sampler:
    """A sampler's function and what it does best with; steps None means T.

    Of the default, 13 steps are 15 network calls: two of the levels are guided, at a call more.
    """

    function: Callable[..., Tensor]
    spacing: str
    steps: int | None


SAMPLERS = {
    "dpmpp_2m_sde": Sampler(sample_dpmpp_2m_sde, "logsnr", 13),
    "unipc": Sampler(sample_unipc, "logsnr", 15),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, "logsnr", 15),
    "heun": Sampler(sample_heun, "karras", 10),
    "ddim": Sampler(sample_ddim, "linear", 50),
    "ddpm": Sampler(sample_ddpm, "linear", None),
    "repaint": Sampler(sample_repaint, "linear", 50),
}


def check_steps(flag_value: int | None, sampler: str, timesteps: int) -> int:
    """Resolve --steps: the sampler's own by default. Raises UserError unless 1 <= steps <= T."""
    if flag_value is None:
        return min(SAMPLERS[sampler].steps or timesteps, timesteps)
    if flag_value > timesteps:
        raise UserError(f"--steps {flag_value}: must be an integer >= 1 and <= T = {timesteps}")
    return flag_value


class ImageNoise:
    """Standard normal noise with a generator of its own for every image.

    Image k of a seed draws the same numbers whatever the batch size, and whichever its neighbours.
    """

    def __init__(self, seed: int, numbers: range, shape: tuple[int, ...], device: torch.device):
        self.generators = [seeded_generator(seed, k) for k in numbers]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        """(len(numbers), *shape) float32."""
        draws = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)


@torch.inference_mode()
def sample_images(
    diffusion: Diffusion,
    net: nn.Module,
    count: int,
    *,
    sampler: str = SAMPLER,
    steps: int | None = None,
    spacing: str | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    guidance: float | None = None,
    guided: tuple[float, float] = GUIDED,
    batch_size: int | None = None,
    precision: str = "auto",
    start: Tensor | None = None,
    share: tuple[int, int] = (0, 1),
    watch: Callable[[Denoiser], Denoiser] = lambda denoise: denoise,
    **options: float | Tensor,
) -> Iterator[Tensor]:
    """Draw images 0..count-1 of `seed`, in batches (B, 1, 28, 28) uint8 on the CPU.

    Args:
        labels: (count,) int64, or None for an unconditional draw.
        guidance, guided: see `Diffusion.denoiser`.
        start: (count, 1, 28, 28) standard normal, to begin with in place of the seed's noise.
        share: (r, R) draws only the batches numbered r, r + R, r + 2R, ...
        watch: may wrap the denoiser of each batch, to record the path.
        options: the sampler's own. Tensors among them hold an entry for each of the images.

    Raises UserError when `steps` is more than T.
    """
    device = next(net.parameters()).device
    batch_size = batch_size or sampling_batch(device)
    steps = check_steps(steps, sampler, diffusion.schedule.timesteps)
    sigmas = diffusion.schedule.sampling_sigmas(steps, spacing or SAMPLERS[sampler].spacing)
    for first in range(share[0] * batch_size, count, share[1] * batch_size):
        numbers = range(first, min(first + batch_size, count))

        def part(value, numbers=numbers):
            return value[numbers].to(device) if isinstance(value, Tensor) else value

        denoise = watch(diffusion.denoiser(net, part(labels), guidance, guided))
        noise = ImageNoise(seed, numbers, (1, IMAGE_SIZE, IMAGE_SIZE), device)
        x = noise() if start is None else part(start)
        x = x * float((1 + sigmas[0] ** 2).sqrt())  # x0 is unknown: give it unit variance
        own = {name: part(value) for name, value in options.items()}
        with autocast(device, precision):  # the network; samplers themselves stay in float32
            x0 = SAMPLERS[sampler].function(denoise, x, sigmas, noise, **own)
        yield to_uint8(x0).cpu()


@torch.inference_mode()
def encode_images(
    diffusion: Diffusion,
    net: nn.Module,
    images: Tensor,
    *,
    steps: int,
    spacing: str,
    labels: Tensor | None = None,
    guidance: float | None = None,
    guided: tuple[float, float] = GUIDED,
    batch_size: int | None = None,
    precision: str = "auto",
) -> Tensor:
    """Images (N, 1, 28, 28) uint8 -> the noise from which `sample_images(start=noise)` draws them.

    Called there with the same steps and spacing; the more steps, the closer they come back.
    """
    device = next(net.parameters()).device
    batch_size = batch_size or sampling_batch(device)
    sigmas = diffusion.schedule.sampling_sigmas(steps, spacing)
    parts = []
    for numbers in torch.arange(len(images)).split(batch_size):
        y = None if labels is None else labels[numbers].to(device)
        with autocast(device, precision):
            x0 = to_model_range(images[numbers].to(device))
            x = encode(diffusion.denoiser(net, y, guidance, guided), x0, sigmas)
        parts.append((x / float((1 + sigmas[0] ** 2).sqrt())).cpu())
    return torch.cat(parts)
