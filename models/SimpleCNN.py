"""SimpleCNN noise predictor: a flat stack of convolutions, readable in two minutes."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import Conditioning, LayerNorm2d, NoisePredictor, Stem, scale_shift, zero_init

DILATIONS = (1, 2, 4, 1, 2, 4, 2, 1)  # pixels between the taps of each layer's convolution


class SimpleCNN(NoisePredictor):
    """Eight layers of conv, norm, scale-shift by t and y, SiLU, each added to its input.

    The input is split into 2x2 blocks of pixels, C x H x W -> 4C x H/2 x W/2. The convolutions are
    dilated (Yu & Koltun 2016), so that eight of them reach from one corner to the other.

    Args:
        in_channels: image channels C.
        width: channels of every layer.
        num_classes: 0, or the number of labels (label `num_classes` is then the null label).
        fourier: octaves of Fourier features of the pixels, see `Stem`.
    """

    critic_layers = ("convs.1", "convs.3", "convs.5", "convs.7")

    def __init__(
        self, in_channels: int = 1, width: int = 64, num_classes: int = 0, fourier: int = 0
    ):
        super().__init__(num_classes)
        self.condition = Conditioning(2 * width, num_classes)
        self.stem = Stem(in_channels, width, fourier)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS
        )
        self.norms = nn.ModuleList(LayerNorm2d(width) for _ in DILATIONS)
        self.films = nn.ModuleList(zero_init(nn.Linear(2 * width, 2 * width)) for _ in DILATIONS)
        self.head = zero_init(nn.Conv2d(width, 4 * in_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x_t (B, C, H, W), t (B,) in [0, T - 1], y (B,) labels or None -> (B, C, H, W)."""
        c = self.condition(t, y)
        h = self.stem(x_t)  # (B, width, H/2, W/2)
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            h = h + F.silu(scale_shift(norm(conv(h)), film(c)))
        return F.pixel_shuffle(self.head(h), 2)
