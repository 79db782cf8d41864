"""ResNet noise predictor: residual blocks at one resolution, no U shape."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Conditioning, LayerNorm2d, NoisePredictor, ResidualBlock, Stem, zero_init


class ResNet(NoisePredictor):
    """A stack of residual blocks (He et al. 2016) that never changes resolution.

    The input is split into 2x2 blocks of pixels, C x H x W -> 4C x H/2 x W/2: no information is
    lost, and every convolution costs a quarter. The first convolution of each block is dilated
    (Yu & Koltun 2016), by 1, 2, 4, 1, ..., so that a few blocks cover the whole image.

    Args:
        in_channels: image channels C.
        width: channels of every block.
        num_classes: 0, or the number of labels (label `num_classes` is then the null label).
        depth: number of residual blocks.
        fourier: octaves of Fourier features of the pixels, see `Stem`.
    """

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 96,
        num_classes: int = 0,
        depth: int = 7,
        fourier: int = 0,
    ):
        super().__init__(num_classes)
        self.critic_layers = tuple(f"blocks.{k}" for k in range(depth - 1, -1, -2))
        self.condition = Conditioning(2 * width, num_classes)
        self.stem = Stem(in_channels, width, fourier)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, width, 2 * width, dilation=2 ** (k % 3)) for k in range(depth)
        )
        self.norm = LayerNorm2d(width)
        self.head = zero_init(nn.Conv2d(width, 4 * in_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,) in [0, T - 1], y (B,) labels or None -> (B, C, H, W)."""
        c = self.condition(t, y)
        h = self.stem(x_t)  # (B, width, H/2, W/2)
        for block in self.blocks:
            h = block(h, c)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)
