"""The last step from noise to an 8-bit image: a probability for each value of each pixel."""

import torch
from torch import Tensor
from torch.nn import functional as F

BIN = 2 / 255  # between neighbouring pixel values
BEYOND = 25  # bins of x_hat below black and above white
BINS = 256 + 2 * BEYOND
NEAR = 3  # grey levels; all larger differences to a neighbour count as one
CONTEXTS = (2 * NEAR + 2) ** 2  # that two neighbours can form


def bins(x_hat: Tensor) -> Tensor:
    """The nearest pixel value, counted from `BEYOND` values below black."""
    nearest = ((x_hat + 1) / BIN).round().long()
    return nearest.clamp(-BEYOND, 255 + BEYOND) + BEYOND


def neighbours(k: Tensor, cell: Tensor) -> Tensor:
    """The context of each of the pixels k (B, C, H, W), as one of CONTEXTS numbers.

    It depends on the pixels to the left and above. Grey levels repeat exactly along a straight
    stroke, so the context tells how far each neighbour is from the value that x_hat predicts here,
    up to a few grey levels.
    """
    k = k.long()
    left, above = F.pad(k, (1, 0))[..., :-1], F.pad(k, (0, 0, 1, 0))[..., :-1, :]
    apart = torch.stack([left, above]) - (cell - BEYOND)
    left, above = torch.where(apart.abs() <= NEAR, apart + NEAR, 2 * NEAR + 1)
    return left * (2 * NEAR + 2) + above


def leaning(counts: Tensor, on: Tensor, weight: float) -> Tensor:
    """Rows of probabilities from rows of counts, as if `on` had been seen `weight` more times."""
    return (counts + weight * on) / (counts.sum(-1, keepdim=True) + weight)


def table_of(cell: Tensor, k: Tensor) -> Tensor:
    """p(k | bin of x_hat), (BINS, 256), counted on pixels k in the bins `cell`."""
    counts = torch.bincount((cell * 256 + k.long()).flatten(), minlength=BINS * 256).float()
    counts = counts.view(BINS, 256)
    anywhere = leaning(counts.sum(0), torch.full((256,), 1 / 256), 256)
    return leaning(counts, anywhere, 5)


class Decoder:
    """p(k | z_0): pixel by pixel in reading order, given x_hat(z_0) and earlier pixels.

    Any table of probabilities gives a valid bound. This one is counted on training images. Rarely
    seen rows are smoothed towards the row of their bin, and that one towards the counts of all
    pixels.

    Attributes:
        by_bin: (BINS, 256), p(k | bin of x_hat), each row summing to 1.
        table: (CONTEXTS, BINS, 256), p(k | neighbours, bin of x_hat).
    """

    def __init__(self, x_hat: Tensor, k: Tensor):
        """x_hat at the lowest level, and the images k, uint8 (N, C, H, W)."""
        cell = bins(x_hat)
        where = (neighbours(k, cell) * BINS + cell) * 256 + k.long()
        counts = torch.bincount(where.flatten(), minlength=CONTEXTS * BINS * 256).float()
        self.by_bin = table_of(cell, k)
        self.table = leaning(counts.view(CONTEXTS, BINS, 256), self.by_bin, 20)

    def nats(self, x_hat: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(k | z_0) of images k, (B,), with the neighbours and without them."""
        cell, value = bins(x_hat), k.long()
        found = self.table[neighbours(k, cell), cell, value], self.by_bin[cell, value]
        return tuple(-p.log().double().flatten(1).sum(1) for p in found)


def held_out_nats(x_hat: Tensor, k: Tensor) -> float:
    """Mean -log p(k | z_0) of held-out images, by a decoder without neighbours.

    The table is counted on four of five images; the mean is over the others.
    """
    cell, value = bins(x_hat), k.long()
    held = torch.arange(len(k)) % 5 == 0
    table = table_of(cell[~held], k[~held])
    return -table[cell[held], value[held]].log().flatten(1).sum(1).mean().item()
