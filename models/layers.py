"""Parts shared by the networks: base class, conditioning on t and y, and residual block."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t (B,) at `dim / 2` frequencies, 1 to 1/10,000 -> (B, dim).

    Vaswani et al. 2017, section 3.5, as used for timesteps by Ho et al. 2020. `dim` is even.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.linspace(0, 1, dim // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoisePredictor(nn.Module):
    """The base class of every network: it declares what other code needs to know about one.

    Create a network as Network(in_channels=C, num_classes=K), optionally with `width` and `fourier`
    (see `Stem`), and call it as net(x_t, t, y), see `Diffusion`.

    Attributes:
        num_classes: 0, or the number of labels (label `num_classes` is then the null label).
        outer: names of the modules that touch images, labels or predictions. AdamW trains these,
            because Muon is meant for the weights between other layers.
        critic_layers: names of the modules whose outputs, each (B, channels, h, w), a critic uses
            to tell images apart.
    """

    outer: tuple[str, ...] = ("stem", "head", "condition.label")
    critic_layers: tuple[str, ...] = ("stem",)

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """In a `with`: a list to which each call appends the outputs of the `critic_layers`."""
        maps: list[Tensor] = []
        hooks = [
            self.get_submodule(name).register_forward_hook(lambda *call: maps.append(call[-1]))
            for name in self.critic_layers
        ]
        try:
            yield maps
        finally:
            for hook in hooks:
                hook.remove()

    def tell_apart(self, kinds: int) -> None:
        """Accept more labels: y + k (num_classes + 1) is label y of an image of kind k < `kinds`.

        Initially, all kinds are treated the same. Without labels, y is 0.
        """
        self.condition.repeat_labels(kinds)


class Conditioning(nn.Module):
    """Timestep and optional class label -> one vector (B, dim) that every block reads.

    Label `num_classes` is the null label: "any class". Networks without labels have
    num_classes = 0 and accept only y = None.
    """

    def __init__(self, dim: int, num_classes: int = 0):
        super().__init__()
        self.num_classes, self.dim = num_classes, dim
        self.mlp = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.label = None
        if num_classes:  # the last row is "no label"; randn is also fast on the meta device
            rows = torch.randn(num_classes + 1, dim)
            self.label = nn.Embedding.from_pretrained(rows, freeze=False)

    def repeat_labels(self, times: int) -> None:
        """Make `times` copies of each label, including the null label; initially all are equal."""
        if self.label is None:
            vectors = torch.zeros(1, self.dim, device=self.mlp[0].weight.device)
        else:
            vectors = self.label.weight.detach()
        self.label = nn.Embedding.from_pretrained(vectors.repeat(times, 1), freeze=False)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Raises ValueError if a network without labels is given labels."""
        c = self.mlp(timestep_embedding(t, 64))
        if self.label is not None:
            c = c + self.label(torch.full_like(t, self.num_classes).long() if y is None else y)
        elif y is not None:
            raise ValueError("this network is unconditional: y must be None")
        return F.silu(c)


class Stem(nn.Conv2d):
    """The first convolution, on 2x2 blocks of pixels: C x H x W -> width x H/2 x W/2.

    With `fourier` = n, it also sees sines and cosines of each pixel, with n periods of 1, 2, 4, ...
    grey levels (Kingma et al. 2021, section 3.4). Likelihoods need them, because the network must
    distinguish neighbouring grey levels, which look the same to other networks. The first sine is,
    up to a factor, the distance of a slightly noisy pixel from the nearest grey level.
    """

    def __init__(self, in_channels: int, width: int, fourier: int = 0):
        super().__init__(4 * in_channels * (1 + 2 * fourier), width, 3, padding=1)
        self.frequencies = [255 * math.pi / 2**octave for octave in range(fourier)]

    def forward(self, x_t: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H/2, W/2)."""
        waves = [wave(f * x_t) for f in self.frequencies for wave in (torch.sin, torch.cos)]
        return super().forward(F.pixel_unshuffle(torch.cat([x_t, *waves], dim=1), 2))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm (Ba et al. 2016) over the channels of each pixel: (B, C, H, W) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set all parameters of a layer to zero, so that its branch starts as a no-op."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def scale_shift(h: Tensor, c: Tensor) -> Tensor:
    """Modulate h (B, C, H, W) by c (B, 2C): h * (1 + scale) + shift (Perez et al. 2018)."""
    scale, shift = c[:, :, None, None].chunk(2, dim=1)
    return torch.addcmul(shift, h, scale + 1)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, scale-shift by the condition, SiLU, zero conv; plus the input.

    The first convolution is dilated by `dilation`.
    """

    def __init__(self, in_channels: int, out_channels: int, cond_dim: int, dilation: int = 1):
        super().__init__()
        self.norm1 = LayerNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
        self.norm2 = LayerNorm2d(out_channels)
        self.condition = zero_init(nn.Linear(cond_dim, 2 * out_channels))
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, C_in, H, W), c (B, cond_dim) -> (B, C_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(scale_shift(self.norm2(h), self.condition(c)))
        return self.shortcut(x) + self.conv2(h)
