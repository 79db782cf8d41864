"""Check that images have the right size, and look for signs that something is wrong."""

import numpy as np
import torch
from torch import Tensor

from config import UserError

SOME = 0.05  # share of images above which a suspicion is reported


def check_shape(images: Tensor, wanted: tuple[int, ...], name: str, like: str = "") -> None:
    """Raise UserError, with a hint at a fix, unless `images` (N, C, H, W) are `wanted` (C, H, W).

    name: what the images are, like "--images a.npz". like: something that has the wanted size.
    """
    have = tuple(images.shape[1:])
    if have == tuple(wanted):
        return
    sizes = [" x ".join(map(str, size)) for size in (have, wanted)]
    like = f" as in {like}" if like else ""
    hint = _hint(images, tuple(wanted))
    raise UserError(f"{name}: contains images of {sizes[0]}, must be {sizes[1]}{like}{hint}")


def _hint(images: Tensor, wanted: tuple[int, ...]) -> str:
    """How to convert images of another size to `wanted`, or ''."""
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
        return "; the number of pixels is the same: reshape them if they are the same images"
    return ""


def suspicions(images: Tensor) -> list[str]:
    """Reasons to doubt that grey images (N, 1, H, W) uint8 are digits like MNIST's.

    One line for each problem that the pixels alone reveal: a white background, an unused range,
    only two grey levels, empty images, copies. Mirrored or rotated digits are not detected.
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
