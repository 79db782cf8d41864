"""How many bits an image takes: upper bounds on -log2 p(image) for 8-bit images.

Noise levels are those of z = x + sigma * eps, with SNR = 1 / sigma^2 and images x in [-1, 1]. By
the variational bound (Kingma et al. 2021, eq. 11),

    -log p(x) <= KL(q(z_T | x) || p(z_T)) + diffusion - E log p(x | z_0),

    diffusion = sum over levels of 1/2 (SNR(t-1) - SNR(t)) E |x - x_hat(z_t)|^2         (eq. 13)
             or 1/2 the integral over SNR of E |x - x_hat(z)|^2, for infinitely many    (eq. 18).

The bound holds for any function x_hat of z and any normalised p(x | z_0), good or bad. All terms
are in nats until they are reported.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm import tqdm

from models.trained import TrainedModel
from scoring.decoder import Decoder, held_out_nats
from utils.data_loader import to_model_range
from utils.device import autocast, sampling_batch
from utils.random import ImageNoise, Stream, generator

DRAWS = 8  # noise levels per image, for each of the two sums over levels
FITTED_ON = 10_000  # training images, for the decoder and the distribution of levels
CHOSEN_ON = 2_500  # of those, to choose the level to decode from
HIGHEST = 0.1  # highest level to choose: 13 grey levels
EVEN = 0.2  # weight of the uniform distribution of levels, relative to the fitted one
TOLERANCE = 1e-4  # relative and absolute, of the probability flow's solver

# x_hat of z (B, C, H, W) at levels (B,) float64 on the CPU, for labels (B,) or None; not clamped
Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def denoiser_of(model: TrainedModel, precision: str) -> Denoise:
    """The network's x_hat with labels and without guidance."""

    def denoise(z: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        with autocast(model.device, precision):
            return model.diffusion.x0_hat(model.net, z, sigma, y)

    return denoise


class Levels:
    """Draws levels more often where the bound pays more, with weights that correct for it.

    Attributes:
        sigmas: (T,) float64, increasing. Cell c lies between sigmas[c] and sigmas[c + 1].
        shares: (T - 1,) float64, the probability of each cell.
    """

    def __init__(self, sigmas: Tensor, shares: Tensor | None = None):
        """By default, all cells are equally likely."""
        self.sigmas = sigmas
        shares = torch.ones(len(sigmas) - 1, dtype=torch.float64) if shares is None else shares
        self.shares = shares / shares.sum()

    def cells(self, u: Tensor) -> Tensor:
        """The cell that each u in [0, 1) falls into."""
        cell = torch.searchsorted(self.shares.cumsum(0), u, right=True)
        return cell.clamp(max=len(self.shares) - 1)

    def draw(self, u: Tensor, continuous: bool) -> tuple[Tensor, Tensor]:
        """u in [0, 1) -> sigma, and the factor that makes |x - x_hat|^2 there an unbiased term.

        The sum has one term in each cell, at its upper end. For the integral, levels are uniform
        in log sigma within a cell; over log sigma, the integrand is |x - x_hat|^2 / sigma^2.
        """
        cell = self.cells(u)
        share, low, high = self.shares[cell], self.sigmas[cell], self.sigmas[cell + 1]
        if not continuous:
            return high, (low**-2 - high**-2) / 2 / share
        inside = 1 - (self.shares.cumsum(0)[cell] - u) / share
        sigma = low * (high / low) ** inside.clamp(0, 1)
        return sigma, (high / low).log() / sigma**2 / share

    def worth(self, u: Tensor, terms: Tensor) -> "Levels":
        """Levels with the least variance, if the terms (N,) of u (N,) are typical.

        Shares are proportional to a cell's root mean square cost (Owen 2013, section 9.1).
        """
        cell = self.cells(u)
        costs = (terms * self.shares[cell]) ** 2
        total = torch.zeros_like(self.shares).index_add_(0, cell, costs)
        roots = (total / torch.bincount(cell, minlength=len(total)).clamp(min=1)).sqrt()
        shares = roots / roots.sum().clamp(min=1e-30)  # 0 / 0 if all images are alike
        return Levels(self.sigmas, shares + EVEN * Levels(self.sigmas).shares)

    def above(self, first: int) -> "Levels":
        """The same without the `first` lowest levels."""
        return Levels(self.sigmas[first:], self.shares[first:])


@dataclass
class Bound:
    """The parts of the bound for each image, in nats: (N,) float64, except the last two.

    `reconstruction_alone` uses a decoder that does not look at other pixels. `sigmas` and `paid`,
    (N, DRAWS), are the levels drawn for the integral and their terms.
    """

    prior: Tensor
    diffusion: Tensor
    diffusion_discrete: Tensor
    reconstruction: Tensor
    reconstruction_alone: Tensor
    sigmas: Tensor
    paid: Tensor


class Likelihood:
    """The bound for one denoiser, with a decoder and levels fitted to training images.

    Images are uint8 (N, C, H, W); labels (N,) int64, or None for a denoiser without labels.

    Args:
        sigmas: (T,) float64, the levels, increasing; x_hat is also evaluated between them.
        images, labels: to fit to; not the images to be measured.

    Attributes:
        decoder: for the lowest level that is used.
        levels: that level and all above it, and the probabilities to draw them.
    """

    def __init__(
        self,
        denoise: Denoise,
        sigmas: Tensor,
        images: Tensor,
        labels: Tensor | None,
        *,
        seed: int = 0,
        device="cpu",
        batch_size: int | None = None,
    ):
        self.denoise, self.seed, self.device = denoise, seed, torch.device(device)
        self.batch_size = batch_size or sampling_batch(self.device)
        even = Levels(sigmas)
        order = torch.randperm(len(images), generator=generator(Stream.ORDER, seed, 1))
        u = (order + 0.5).double() / len(images)
        sigma, factor = even.draw(u, continuous=True)
        passes = self.look(images, labels, sigma[:, None], 1, "looking at all levels")
        paid = factor * torch.cat([squared_error(x, x_hat)[:, 0] for _, x, x_hat in passes])
        few = slice(0, CHOSEN_ON)
        given = (images[few], None if labels is None else labels[few])
        first = self.cheapest(even, *given, paid, even.cells(u))
        x_hat = self.x_hat_at(sigmas[first], images, labels, 3, "fitting the decoder")
        self.decoder = Decoder(x_hat, images)
        self.levels = even.worth(u, paid).above(first)

    def cheapest(
        self, even: Levels, images: Tensor, labels: Tensor | None, paid: Tensor, cells: Tensor
    ) -> int:
        """The index of the level to decode from: decoding there plus `paid` above it costs least.

        `cells` has the cell of each of `paid`. The decoder knows that grey levels are integers,
        which a network has to learn, but it knows little about how pixels are related.
        """
        sigmas, costs = even.sigmas, {}
        octaves = range(1 + max(0, int((HIGHEST / sigmas[0]).log2())))
        for level in {int((sigmas <= sigmas[0] * 2**octave).sum()) - 1 for octave in octaves}:
            what = f"decoding at sigma {sigmas[level]:.3f}"
            x_hat = self.x_hat_at(sigmas[level], images, labels, 2, what)
            above = paid[cells >= level].sum().item() / len(paid)
            costs[level] = held_out_nats(x_hat, images) + above
        return min(costs, key=costs.get)

    def x_hat_at(
        self, sigma: Tensor, images: Tensor, labels: Tensor | None, step: int, what: str
    ) -> Tensor:
        """x_hat of images at one level, with the shape of the images, on the CPU."""
        passes = self.look(images, labels, sigma.expand(len(images), 1), step, what)
        return torch.cat([x_hat[:, 0].cpu() for _, _, x_hat in passes])

    def look(
        self, images: Tensor, labels: Tensor | None, sigma: Tensor, step: int, what: str
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each batch: its rows, x (B, 1, C, H, W) and x_hat (B, M, C, H, W) on the device.

        Each image is denoised at its levels sigma (N, M), with fresh noise; `step` selects it.
        """
        draws = sigma.shape[1]
        size = max(1, self.batch_size // draws)
        with tqdm(total=len(images), desc=what, unit="img") as bar:
            for start in range(0, len(images), size):
                numbers = range(start, min(start + size, len(images)))
                rows = slice(numbers.start, numbers.stop)
                noise = ImageNoise(self.seed, numbers, (draws, *images.shape[1:]), self.device)
                noise.step = step
                x = to_model_range(images[rows].to(self.device))[:, None]
                z = x + sigma[rows, :, None, None, None].float().to(x) * noise()
                y = None if labels is None else labels[rows].repeat_interleave(draws)
                y = None if y is None else y.to(self.device)
                with torch.inference_mode():
                    x_hat = self.denoise(z.flatten(0, 1), sigma[rows].flatten(), y)
                yield rows, x, x_hat.view_as(z)
                bar.update(len(x))

    def bound(self, images: Tensor, labels: Tensor | None) -> Bound:
        """The bound for each image, by stratified levels (Kingma et al. 2021, appendix I.1)."""
        own = generator(Stream.NOISE, self.seed)
        strata = torch.arange(DRAWS) + torch.rand(2, len(images), 1, generator=own).double()
        sigma, factor = self.levels.draw(strata[0] / DRAWS, continuous=True)
        higher, others = self.levels.draw(strata[1] / DRAWS, continuous=False)
        lowest = self.levels.sigmas[:1].expand(len(images), 1)
        everywhere = torch.cat([sigma, higher, lowest], dim=1)
        errors, decoded = [], []
        for rows, x, x_hat in self.look(images, labels, everywhere, 0, "computing the bound"):
            errors.append(squared_error(x, x_hat))
            decoded.append(torch.stack(self.decoder.nats(x_hat[:, -1].cpu(), images[rows])))
        paid = torch.cat([factor, others], dim=1) * torch.cat(errors)[:, :-1] / DRAWS
        continuous, discrete = paid.split(DRAWS, dim=1)
        prior = prior_nats(images, self.levels.sigmas[-1])
        sums = (continuous.sum(1), discrete.sum(1))
        return Bound(prior, *sums, *torch.cat(decoded, dim=1), sigma, continuous)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """|x - x_hat|^2 of each image and level, (B, M) float64 on the CPU.

    x_hat is clamped to [-1, 1], as in samplers, because the loss does not constrain it beyond.
    """
    return (x - x_hat.clamp(-1, 1)).square().flatten(2).sum(2).cpu().double()


def prior_nats(images: Tensor, sigma: Tensor) -> Tensor:
    """KL(q(z_T | x) || N(0, I)), (N,): both Gaussian, z_T variance preserving, at level `sigma`."""
    alpha_bar = 1 / (1 + sigma**2)
    mean_squares = alpha_bar * to_model_range(images).double().square()
    return (mean_squares - alpha_bar - torch.log1p(-alpha_bar)).flatten(1).sum(1) / 2


def flow_log_density(
    denoise: Denoise, z: Tensor, y: Tensor | None, sigmas: Tensor, own: torch.Generator
) -> Tensor:
    """log p(z) (B,) float64 at the lowest of `sigmas`, by the probability flow.

    The flow dz / d log sigma = z - x_hat carries z to the highest level, where p is a Gaussian.
    On the way, log p changes by its divergence (Song et al. 2021b, eq. 39), which is estimated
    without bias from one random direction per image (their eq. 40).
    """
    size, shape = z[0].numel(), z.shape
    sign = (torch.randint(2, shape, generator=own) * 2 - 1).to(z)

    def slope(log_sigma, state):
        x = torch.from_numpy(state[: z.numel()]).to(z).view(shape).requires_grad_()
        level = torch.full((len(x),), math.exp(log_sigma), dtype=torch.float64)
        x_hat = denoise(x, level, y).clamp(-1, 1)
        (product,) = torch.autograd.grad((x_hat * sign).sum(), x)
        divergence = size - (product * sign).flatten(1).sum(1)
        change = torch.cat([(x - x_hat).detach().flatten(), divergence])
        return change.cpu().double().numpy()

    start = torch.cat([z.flatten().cpu().double(), torch.zeros(len(z)).double()]).numpy()
    ends = sigmas[[0, -1]].log().tolist()
    solved = solve_ivp(slope, ends, start, t_eval=ends[1:], rtol=TOLERANCE, atol=TOLERANCE)
    end = torch.from_numpy(solved.y[:, -1])
    variance = 1 + float(sigmas[-1]) ** 2
    squares = end[: z.numel()].view(len(z), -1).square().sum(1)
    gaussian = -(squares / variance + size * math.log(2 * math.pi * variance)) / 2
    return gaussian + end[z.numel() :]
