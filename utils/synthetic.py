"""Digits drawn from the fonts inside matplotlib: a stand-in for MNIST that needs no download."""

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from utils.random import Stream, generator

# DejaVu Sans Mono is left out: at 28 pixels the mark inside its zero makes it look like an 8.
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
)
SIZE = 28  # pixels per side, as in MNIST
BOX = 20  # pixels: the longer side of a glyph before the random transform, as in MNIST
DENSITY = 4  # samples of a distance field per pixel, along each axis
CHUNK = 2000  # images drawn at once, with 100 MB of distance fields


def _glyph_distance(font: str, digit: int) -> np.ndarray:
    """Distance in pixels to the outline, positive inside the glyph. (S, S), S = 28 * DENSITY."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    glyph = TextPath((0, 0), str(digit), size=100, prop=FontProperties(fname=file))
    box, size = glyph.get_extents(), SIZE * DENSITY
    to_grid = Affine2D().translate(-(box.x0 + box.x1) / 2, -(box.y0 + box.y1) / 2)
    to_grid.scale(BOX * DENSITY / max(box.width, box.height)).translate(size / 2, size / 2)
    y, x = np.mgrid[size - 0.5 : 0 : -1, 0.5:size]  # the y axis of a font points up
    inside = np.zeros(size * size, bool)
    for polygon in glyph.transformed(to_grid).to_polygons():
        # contains_points on the whole glyph would fill its holes
        inside ^= Outline(polygon).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    inside = inside.reshape(size, size)
    return (distance_transform_edt(inside) - distance_transform_edt(~inside)) / DENSITY


@cache
def _distance_fields() -> Tensor:
    """The distance fields of all glyphs, (fonts, digits, S, S) float32."""
    fields = [[_glyph_distance(font, digit) for digit in range(10)] for font in FONTS]
    return torch.from_numpy(np.array(fields, np.float32))


def _draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw each label in a random font, pose and stroke width, (B, 1, 28, 28) uint8."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(labels), generator=generator) * (high - low) + low

    fonts = torch.randint(len(FONTS), labels.shape, generator=generator)
    fields = _distance_fields()[fonts, labels, None]  # (B, 1, S, S)
    angle, shear = uniform(-math.pi / 12, math.pi / 12), uniform(-0.15, 0.15)
    scale, aspect = uniform(0.85, 1.0), uniform(0.92, 1.08)

    # affine_grid needs the transform from the image back to the glyph
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rotation = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
    stretch = torch.stack([1 / aspect, shear, zero, aspect], 1).view(-1, 2, 2)
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1) * 2 / SIZE  # (B, 2)
    affine = torch.cat([stretch @ rotation / scale[:, None, None], shift[:, :, None]], 2)
    grid = F.affine_grid(affine, [len(labels), 1, SIZE, SIZE], align_corners=False)
    distance = F.grid_sample(fields, grid, padding_mode="border", align_corners=False)

    # thin fonts are thickened most; bold ones a little too, or their hairlines would break
    thickest = fields.amax((1, 2, 3)) * scale
    bolder = (uniform(1.1, 2.0) - thickest).clamp(0.1, 0.8)
    coverage = distance * scale[:, None, None, None] + bolder[:, None, None, None] + 0.5
    return (coverage.clamp(0, 1) * 255).round().to(torch.uint8)


def synthetic_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` digits: images (count, 1, 28, 28) uint8, labels (count,) int64 in 0..9.

    Digits are white (255) on black (0), with grey stroke edges. Labels are in random order, and
    their counts differ by at most one. The same count and seed give the same images.
    Raises ValueError for a count below 1 or a negative seed.
    """
    if count < 1 or seed < 0:
        raise ValueError(f"count must be at least 1 and seed at least 0: {count}, {seed}")
    random = generator(Stream.DATA, seed)
    labels = torch.randperm(count, generator=random) % 10
    images = [_draw(chunk, random) for chunk in labels.split(CHUNK)]
    return torch.cat(images), labels
