"""Are images of the right size, and what they seem to be?"""

import numpy as np
import torch
from torch import Tensor

from config import UserError

SOME = 0.05  # the share of images from which on a suspicion is worth a line


def check_shape(images: Tensor, wanted: tuple[int, ...], name: str, like: str = "") -> None:
    """Raise UserError unless `images` (N, C, H, W) are `wanted` (C, H, W), with a hint how to mend.

    name: what they are, like "--images a.npz". like: what else is of the wanted size.
    """
    have = tuple(images.shape[1:])
    if have == tuple(wanted):
        return
    sizes = [" x ".join(map(str, size)) for size in (have, wanted)]
    like = f" as in {like}" if like else ""
    hint = _hint(images, tuple(wanted))
    raise UserError(f"{name}: holds images of {sizes[0]}, must be {sizes[1]}{like}{hint}")


def _hint(images: Tensor, wanted: tuple[int, ...]) -> str:
    """How images of another size could become `wanted`, or ''."""
    channels, height, width = images.shape[1:]
    if channels != wanted[0]:
        return "; they are in colour: convert them to grey" if channels == 3 else ""
    rows, columns = (height - wanted[1]) / 2, (width - wanted[2]) / 2
    if min(rows, columns) >= 0 and rows.is_integer() and columns.is_integer():
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[int(rows) : height - int(rows), int(columns) : width - int(columns)] = True
        border = images[..., ~inside]
        if (border == border.flatten()[0]).all():
            words = f"{rows:g} pixels" if rows == columns else f"{rows:g} rows, {columns:g} columns"
            return f"; their border is empty: crop {words} on each side"
    if height * width == wanted[1] * wanted[2]:
        return "; that is as many pixels: reshape them if they are the same"
    return ""


def suspicions(images: Tensor) -> list[str]:
    """What makes grey images (N, 1, H, W) uint8 unlikely to be digits as MNIST has them.

    A line each, of what pixels alone can tell: a white background, a range that is not used, two
    grey levels, empty images, copies. Whether digits are mirrored or turned, they do not tell.
    """
    found, count = [], len(images)
    edges = [images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]]
    white = torch.cat([edge.flatten(1) for edge in edges], dim=1).float().mean(dim=1) > 127
    if white.float().mean() > SOME:
        found.append(
            f"{int(white.sum())} of {count} images have a white background, but MNIST's digits are"
            " white on black: inverted?"
        )
    levels = np.flatnonzero(np.bincount(images.numpy().ravel(), minlength=256))
    if 0 < levels[-1] < 128:
        found.append(f"the brightest pixel is {levels[-1]} of 255: scaled to another range?")
    if len(levels) == 2:
        found.append(f"all pixels are {levels[0]} or {levels[1]}: grey levels lost?")
    flat = images.flatten(1)
    empty = int((flat == flat[:, :1]).all(dim=1).sum())
    if empty > SOME * count:
        found.append(f"{empty} of {count} images are empty")
    copies = count - len({image.tobytes() for image in flat.numpy()})
    if copies > SOME * count:
        found.append(f"{copies} of {count} images are copies of others")
    return found
