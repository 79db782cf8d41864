"""The mathematics of distillation: one or two network calls draw what a teacher draws in many.

    consistency_loss        two neighbouring noise levels of one path lead to one image
    distribution_gradient   moves generated images to where the teacher finds them likelier
    Critic, hinge           cannot tell noised generated images from noised real ones

All are functions of images, in [-1, 1], and of D(x, sigma), the denoised image at noise level
sigma, x = x0 + sigma eps. Which network made them, and how it is stepped, is up to
`training.distiller`. The D of a distilled network is an image already, not the mean of all images
that may lie below the noise.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.diffusion import Diffusion
from models.layers import LayerNorm2d
from utils import distributed

SIGMA_CAP = 100.0  # above it an image leaves no trace, and D is the same function of the noise
FAINT = 4.0  # times the mean gradient; what of it pulls a black pixel less leaves it black


def column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to go with images."""
    return values.view(-1, 1, 1, 1)


def x0_of(diffusion: Diffusion, net: nn.Module, x: Tensor, sigma: Tensor, y: Tensor | None):
    """The denoised image of x (B, C, H, W) at levels sigma (B,), float64 on the CPU; not clamped.

    `Diffusion.denoiser` is the clamped one at one level for all.
    """
    a = (1 + sigma**2).rsqrt()
    t = diffusion.schedule.t_at(sigma).to(x)
    a, s = column(a.to(x)), column((sigma * a).to(x))
    x_t = a * x
    return diffusion.to_x0(net(x_t, t, y).float(), x_t, a, s)


def lower_level(sigma: Tensor, q: float) -> Tensor:
    """The neighbour below sigma (Geng et al. 2024, ECT, section 3): sigma (1 - n(sigma) / q), >= 0.

    n = 1 + 8 sigmoid(-sigma), so that low levels reach 0 at once while q is small. Above SIGMA_CAP
    the step starts from there.
    """
    n = 1 + 8 * torch.sigmoid(-sigma)
    return (sigma.clamp(max=SIGMA_CAP) * (1 - n / q)).clamp(min=0)


def consistency_loss(x0_hat: Tensor, target: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """Distance of D at `sigma` (B,) to the `target`, D at `lower` without gradient; (B, C, H, W).

    Consistency training (Song et al. 2023, theorem 2): the two are noised alike. The absolute
    difference over the gap between the levels (Geng et al. 2024, section 3.3). The target is
    clamped at black alone, and blacker than black is no error (`beyond_black`).
    """
    error = (x0_hat - target).masked_fill(beyond_black(x0_hat, target), 0.0)
    return error.abs() * column((1 / (sigma.clamp(max=SIGMA_CAP) - lower)).to(error))


def beyond_black(x0_hat: Tensor, target: Tensor) -> Tensor:
    """Where x0_hat is blacker than a black target: clamping undoes that error; a boolean tensor.

    Four of five pixels are black, and a network need not hit -1 exactly. Nothing of the kind holds
    at white: strokes are nearly white and seldom white. Were too white no error, a student, which
    learns from images of its own, would drift there and stay.
    """
    return (target == -1) & (x0_hat < -1)


def distribution_gradient(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """The gradient that moves images x to where the teacher finds them likelier (B, C, H, W).

    fake - teacher, the images that both denoise x to, when noised alike; clamped at black. `fake`
    has learnt the scores of generated images. It is the gradient of the reverse Kullback-Leibler
    divergence (Yin et al. 2024, DMD, eq. 7 and 8), with the weight 1 / mean |x - teacher|, so that
    all noise levels count alike.
    """
    weight = 1 / (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-4)
    return (fake - teacher) * weight


class Critic(nn.Module):
    """Opinions of what a network's layers hold, at each pixel; more than 0 is for a real image.

    Heads on the features of the frozen teacher (Sauer et al. 2024, LADD; as the GAN term of Yin et
    al. 2024b, DMD2, section 4.3). Told of which call an image is, they judge first calls beside
    second ones.
    """

    def __init__(self, widths: list[int]):
        """widths: the channels of each map. The heads are as wide as the narrowest."""
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
        """maps, each (B, width, h, w), of calls `second` (B,) bool -> for each (B, 1, h, w)."""
        layers = zip(self.first, self.call, self.last, maps, strict=True)
        return [
            last(F.silu(first(values) + call(second.long())[:, :, None, None])).float()
            for first, call, last, values in layers
        ]


def hinge(real: list[Tensor], generated: list[Tensor]) -> Tensor:
    """The critic's loss (Lim & Ye 2017), of its opinions; each map counts alike."""
    losses = [
        F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in zip(real, generated, strict=True)
    ]
    return torch.stack(losses).mean()


def through_clamp(gradient: Tensor, raw: Tensor) -> Tensor:
    """What of a gradient at clamp(raw, min=-1) reaches `raw`, all (B, C, H, W).

    All of it above -1. Below, where four of five pixels are, only a pull of more than FAINT times
    the mean: the noise of fainter ones would pull all black pixels to the brink, and to grey
    beyond it.
    """
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    lit = (raw < -1) & (gradient < -FAINT * mean)
    return gradient * ((raw >= -1) | lit)


def unit(gradient: Tensor) -> Tensor:
    """A gradient of root mean square 1 in all processes together.

    How strong two of them are beside each other is then a choice, and no step louder than another.
    """
    return gradient / distributed.mean(gradient.square().mean()).sqrt().clamp(min=1e-12)


def pull(raw: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient at `raw` is `gradient`, over the number of its values."""
    return (raw * gradient.detach()).mean()
