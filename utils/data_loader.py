"""Data sets as one resident uint8 tensor: no worker processes, no per-image transforms."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from config import IMAGE_SIZE, NUM_CLASSES, UserError
from utils.device import seeded_generator
from utils.synthetic import synthetic_digits

TORCHVISION = {
    "mnist": torchvision.datasets.MNIST,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
    "kmnist": torchvision.datasets.KMNIST,
}
SYNTHETIC_SIZE = {"train": 20_000, "test": 10_000}
SYNTHETIC_SEED = {"train": 1, "test": 2}


def load_dataset(name: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of `split` "train" or "test".

    Raises UserError when the files are neither there nor to be had, or are not what they should be.
    """
    if name == "synthetic":
        return synthetic_digits(SYNTHETIC_SIZE[split], SYNTHETIC_SEED[split])
    images, labels = _load_torchvision(name, data_dir, split)
    shapes_fit = images.shape == (len(labels), IMAGE_SIZE, IMAGE_SIZE) and len(labels) > 0
    if not shapes_fit or not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise UserError(f"--data_dir {data_dir}: its {name} {split} files are corrupt")
    return images[:, None].contiguous(), labels.long()


def _load_torchvision(name: str, data_dir: str, split: str) -> tuple[Tensor, Tensor]:
    dataset, train = TORCHVISION[name], split == "train"
    raw = Path(data_dir) / dataset.__name__ / "raw"
    try:  # what is there already: no network, no writing
        present = dataset(data_dir, train=train, download=False)
        return present.data, present.targets
    except RuntimeError as error:
        if "not found" not in str(error):
            raise UserError(f"--data_dir {data_dir}: files in {raw} are corrupt: {error}") from None
    except Exception as error:
        raise UserError(f"--data_dir {data_dir}: files in {raw} are corrupt: {error}") from None
    try:
        fetched = dataset(data_dir, train=train, download=True)
        return fetched.data, fetched.targets
    except Exception as error:
        raise UserError(
            f"--dataset {name}: no files in {raw} and the download failed"
            f" ({type(error).__name__}): point --data_dir at a copy, or use --dataset synthetic"
        ) from None


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Index batches of one pass in an order fixed by (seed, epoch). A last, short one is dropped.

    Training sees other images dropped in each epoch; `batch_size` above `count` gives one batch.
    """
    order = torch.randperm(count, generator=seeded_generator(seed, epoch))
    size = min(batch_size, count)
    return iter(order[: count // size * size].split(size))


def to_model_range(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1] -> the nearest uint8 in 0..255."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def main() -> None:
    """Print the data set a demonstration can use here: mnist if it can be had, else synthetic."""
    try:
        load_dataset("mnist", "./data", "train")
        print("mnist")
    except UserError as error:
        print(error, file=sys.stderr)
        print("synthetic")


if __name__ == "__main__":
    main()
