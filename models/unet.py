"""U-Net noise predictor: detail at half size, shape at quarter size, and skip connections."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Conditioning, LayerNorm2d, NoisePredictor, ResidualBlock, Stem, zero_init


class Attention(nn.Module):
    """Self-attention over all pixels (Vaswani et al. 2017), added to the input.

    It has gcd(4, `channels`) heads.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = math.gcd(4, channels)
        self.norm = LayerNorm2d(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3 * self.heads, -1, height * width)
        q, k, v = qkv.chunk(3, dim=1)  # (B, heads, C / heads, H * W)
        if x.is_cuda:
            h = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        else:  # written out: for 49 pixels this is faster on a CPU than the fused kernel
            weights = (q.mT @ k * q.shape[2] ** -0.5).softmax(dim=-1)
            h = v @ weights.mT
        return x + self.out(h.reshape(batch, channels, height, width))


class UNet(NoisePredictor):
    """U-Net (Ronneberger et al. 2015) for diffusion, after Ho et al. 2020, for small images.

    The input is split into 2x2 blocks of pixels, C x H x W -> 4C x H/2 x W/2: no information is
    lost, and every convolution costs a quarter.

    Args:
        in_channels: image channels C.
        width: channels at half size; there are twice as many at quarter size.
        num_classes: 0, or the number of labels (label `num_classes` is then the null label).
        fourier: octaves of Fourier features of the pixels, see `Stem`.
    """

    critic_layers = ("down1", "down2", "middle2", "up1")

    def __init__(
        self, in_channels: int = 1, width: int = 64, num_classes: int = 0, fourier: int = 0
    ):
        super().__init__(num_classes)
        cond_dim, deep = 2 * width, 2 * width
        self.condition = Conditioning(cond_dim, num_classes)
        self.stem = Stem(in_channels, width, fourier)
        self.down1 = ResidualBlock(width, width, cond_dim)
        self.downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.down2 = ResidualBlock(width, deep, cond_dim)
        self.attention = Attention(deep)
        self.middle1 = ResidualBlock(deep, deep, cond_dim)
        self.middle2 = ResidualBlock(deep, deep, cond_dim)
        self.up2 = ResidualBlock(2 * deep, deep, cond_dim)
        self.upsample = nn.Conv2d(deep, 4 * width, 1)
        self.up1 = ResidualBlock(width, width, cond_dim)
        self.norm = LayerNorm2d(width)
        self.head = zero_init(nn.Conv2d(width, 4 * in_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,) in [0, T - 1], y (B,) labels or None -> (B, C, H, W)."""
        c = self.condition(t, y)
        h1 = self.down1(self.stem(x_t), c)  # (B, width, H/2, W/2)
        h2 = self.down2(self.downsample(h1), c)  # (B, deep, H/4, W/4)
        h = self.middle2(self.middle1(self.attention(h2), c), c)
        h = self.up2(torch.cat([h, h2], dim=1), c)
        h = F.pixel_shuffle(self.upsample(h), 2)  # (B, width, H/2, W/2)
        h = self.up1(h + h1, c)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
