"""The math of distillation: a student draws in one or two calls what its teacher draws in many.

    consistency_loss        makes neighbouring noise levels of one path lead to the same image
    distribution_gradient   moves generated images to where the teacher finds them likelier
    Critic, hinge           learn to tell noised real images from noised generated ones

All of them take images in [-1, 1] and D(x, sigma), the denoised image at noise level sigma, where
x = x0 + sigma eps. `training.distiller` decides which networks compute D and how they are updated.
The D of a distilled network is itself an image, not the mean of all images that could be under the
noise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import LayerNorm2d
from utils import distributed

SIGMA_CAP = 100.0  # above it no trace of the image is left, and D is the same function of the noise
FAINT = 4.0  # times the mean gradient; weaker pulls leave a black pixel black


def column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), which broadcasts over images."""
    return values.view(-1, 1, 1, 1)


def lower_level(sigma: Tensor, q: float) -> Tensor:
    """The level below sigma (Geng et al. 2024, ECT, section 3): sigma (1 - n(sigma) / q), >= 0.

    n = 1 + 8 sigmoid(-sigma), so low levels go straight to 0 while q is small. Above SIGMA_CAP the
    step starts from SIGMA_CAP.
    """
    n = 1 + 8 * torch.sigmoid(-sigma)
    return (sigma.clamp(max=SIGMA_CAP) * (1 - n / q)).clamp(min=0)


def consistency_loss(x0_hat: Tensor, target: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """Distance from D at `sigma` (B,) to `target`, D at `lower` without gradient; (B, C, H, W).

    Consistency training (Song et al. 2023, theorem 2): both get the same noise. The distance is the
    absolute difference over the gap between the levels (Geng et al. 2024, section 3.3). The target
    is clamped only at black, and blacker than black is no error (`beyond_black`).
    """
    error = (x0_hat - target).masked_fill(beyond_black(x0_hat, target), 0.0)
    return error.abs() * column((1 / (sigma.clamp(max=SIGMA_CAP) - lower)).to(error))


def beyond_black(x0_hat: Tensor, target: Tensor) -> Tensor:
    """Where x0_hat is blacker than a black target, an error that clamping undoes; a boolean tensor.

    Four in five pixels are black, and a network need not hit -1 exactly. White is different:
    strokes are nearly white but seldom fully white. If too white were no error, a student, which
    learns from its own images, would drift there and stay.
    """
    return (target == -1) & (x0_hat < -1)


def distribution_gradient(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """The gradient (B, C, H, W) that moves images x to where the teacher finds them likelier.

    It is fake - teacher: the images that both networks denoise x to, given the same noise, clamped
    at black. `fake` has learnt the scores of generated images. This is the gradient of the reverse
    Kullback-Leibler divergence (Yin et al. 2024, DMD, eq. 7 and 8), weighted by 1 / mean
    |x - teacher|, so that all noise levels count equally.
    """
    weight = 1 / (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-4)
    return (fake - teacher) * weight


class Critic(nn.Module):
    """Judges each pixel of a network's feature maps; an output above 0 means a real image.

    Heads on the features of the frozen teacher (Sauer et al. 2024, LADD; like the GAN term of Yin
    et al. 2024b, DMD2, section 4.3). They are told whether an image comes from a first or a second
    call, so they can judge both.
    """

    def __init__(self, widths: list[int]):
        """widths: the channels of each map. All heads are as wide as the narrowest map."""
        super().__init__()
        hidden = min(widths)
        self.first = nn.ModuleList(
            nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, hidden, 3, padding=1))
            for width in widths
        )
        self.call = nn.ModuleList(nn.Embedding(2, hidden) for _ in widths)
        self.last = nn.ModuleList(nn.Conv2d(hidden, 1, 1) for _ in widths)
        for embedding in self.call:
            nn.init.zeros_(embedding.weight)

    def forward(self, maps: list[Tensor], second: Tensor) -> list[Tensor]:
        """maps (B, width, h, w); `second` (B,), True for second calls -> (B, 1, h, w) per map."""
        layers = zip(self.first, self.call, self.last, maps, strict=True)
        return [
            last(F.silu(first(values) + call(second.long())[:, :, None, None])).float()
            for first, call, last, values in layers
        ]


def hinge(real: list[Tensor], generated: list[Tensor]) -> Tensor:
    """The critic's hinge loss (Lim & Ye 2017) on its outputs; all maps have equal weight."""
    losses = [
        F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, generated, strict=True)
    ]
    return torch.stack(losses).mean()


def through_clamp(gradient: Tensor, raw: Tensor) -> Tensor:
    """The part of a gradient at clamp(raw, min=-1) that is passed on to `raw`; all (B, C, H, W).

    Above -1, all of it. Below, where four in five pixels are, only upward pulls of more than FAINT
    times the mean: the noise in weaker ones would pull all black pixels up to -1 and on into grey.
    """
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    lit = (raw < -1) & (gradient < -FAINT * mean)
    return gradient * ((raw >= -1) | lit)


def unit(gradient: Tensor) -> Tensor:
    """Scale a gradient to a root mean square of 1 over all processes.

    The relative weight of two gradients is then a choice, and all steps are equally strong.
    """
    return gradient / distributed.mean(gradient.square().mean()).sqrt().clamp(min=1e-12)


def pull(raw: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient at `raw` is `gradient` divided by its number of values."""
    return (raw * gradient.detach()).mean()
