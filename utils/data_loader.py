"""Data sets as one resident uint8 tensor, and the facts of them that everything else reads."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import DATA_DIR, UserError
from utils.image_folder import load_image_folder
from utils.random import Stream, generator
from utils.synthetic import synthetic_digits

SYNTHETIC_SIZE = {"train": 20_000, "test": 10_000}
SYNTHETIC_SEED = {"train": 1, "test": 2}
DIGITS = tuple("0123456789")
HELD_OUT = 6  # one of so many training images, of MNIST 10,000 as in its test set
LARGEST_SIDE = 64  # pixels: what the networks here are made for


@dataclass(frozen=True)
class DatasetInfo:
    """What the rest of the project must know of a data set. A checkpoint carries one.

    Attributes:
        name: an entry of DATASETS.
        channels: 1 (grey) or 3 (RGB).
        height, width: in pixels.
        class_names: one for each label; () where images have none.
        label_shares: how often each label comes in the training images; they sum to about 1.
    """

    name: str
    channels: int
    height: int
    width: int
    class_names: tuple[str, ...]
    label_shares: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.height, self.width

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @classmethod
    def from_dict(cls, values: dict) -> "DatasetInfo":
        """Rebuild what a checkpoint holds. Raises ValueError where it makes no sense."""
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(cls)}:
            raise ValueError("its facts of the data are not those this version knows")
        info = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        sizes = (info.channels, info.height, info.width)
        if not all(type(n) is int for n in sizes) or info.channels not in (1, 3):
            raise ValueError("its images are neither grey nor RGB")
        if not all(1 <= n <= LARGEST_SIDE for n in sizes) or info.name not in list(DATASETS):
            raise ValueError("its images are of no kind this version knows")
        names, shares = info.class_names, info.label_shares
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes have no names")
        if not isinstance(shares, tuple) or len(shares) != len(names):
            raise ValueError("its classes have no shares")
        fits = all(isinstance(share, float) and 0 <= share < math.inf for share in shares)
        if not fits or (shares and not sum(shares)):
            raise ValueError("label_shares must be shares")
        return info


@dataclass(frozen=True)
class Dataset:
    """One split: images (N, C, H, W) uint8, labels (N,) int64 (0 without classes), and facts."""

    images: Tensor
    labels: Tensor
    info: DatasetInfo


def load_dataset(
    name: str,
    data_dir: str,
    split: str,
    test_dir: str | None = None,
    limit: int | None = None,
    held_out: bool = False,
) -> Dataset:
    """The `split` "train" or "test" of one of DATASETS; of it the first `limit` images, or all.

    With `held_out` the last sixth of the training images is the "test", and "train" the rest: what
    is chosen by scores is chosen by those, and the real test set is left for what is reported.
    `test_dir` is for `folder` alone. Raises UserError when the files are neither there nor to be
    had, or are not what they should be.
    """
    if test_dir and name != "folder":
        raise UserError(f"--test_dir {test_dir}: only --dataset folder has one")
    images, labels, class_names = DATASETS[name](data_dir, "train" if held_out else split, test_dir)
    if held_out:
        first = len(images) - len(images) // HELD_OUT
        chosen = slice(first, None) if split == "test" else slice(first)
        images, labels = images[chosen], labels[chosen]
    images, labels = images[:limit], labels[:limit]
    if not len(images):
        raise UserError(f"--data_dir {data_dir}: holds too few images, none is left to {split}")
    counts = labels.bincount(minlength=len(class_names))[: len(class_names)]
    shares = tuple((counts.double() / len(labels)).tolist())
    return Dataset(images, labels, DatasetInfo(name, *images.shape[1:], class_names, shares))


def describe(name: str, images: Tensor) -> DatasetInfo:
    """The facts of images (N, C, H, W) that should look like a data set which is not loaded.

    Its classes are those known by name, and come equally often.
    """
    names = DIGITS if name in ("mnist", "synthetic") else ()
    if not names and name in TORCHVISION:
        names = _short_names(getattr(_class(name), "classes", None) or ())
    shares = (1 / max(1, len(names)),) * len(names)
    return DatasetInfo(name, *images.shape[1:], names, shares)


def _short_names(classes: Sequence[str]) -> tuple[str, ...]:
    """torchvision's names of classes, but MNIST's "7 - seven" is "7"."""
    return tuple(text.split(" - ")[0] for text in classes)


Split = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels and the names of the classes


def _synthetic(data_dir: str, split: str, test_dir: str | None) -> Split:
    images, labels = synthetic_digits(SYNTHETIC_SIZE[split], SYNTHETIC_SEED[split])
    return images, labels, DIGITS


TORCHVISION = {  # its name there, and the shape of an image (C, H, W)
    "mnist": ("MNIST", (1, 28, 28)),
    "fashion_mnist": ("FashionMNIST", (1, 28, 28)),
    "kmnist": ("KMNIST", (1, 28, 28)),
    "cifar10": ("CIFAR10", (3, 32, 32)),
}


def _class(name: str) -> type:
    from torchvision import datasets  # slow to import, and only needed here

    return getattr(datasets, TORCHVISION[name][0])


def _torchvision(name: str, data_dir: str, split: str, test_dir: str | None) -> Split:
    """A data set of torchvision, on the disk already or downloaded to it."""
    dataset, shape = _class(name), TORCHVISION[name][1]
    folder = Path(data_dir) / getattr(dataset, "base_folder", f"{dataset.__name__}/raw")
    read = partial(dataset, data_dir, train=split == "train")
    try:  # what is there already: no network, no writing
        loaded = read(download=False)
    except Exception as error:
        if not isinstance(error, RuntimeError) or "not found" not in str(error):
            raise UserError(
                f"--data_dir {data_dir}: files in {folder} are corrupt: {error}"
            ) from None
        loaded = _download(name, data_dir, folder, read)
    images, labels = torch.as_tensor(loaded.data), torch.as_tensor(loaded.targets).long()
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    names = _short_names(loaded.classes)
    if images.shape != (len(labels), *shape) or not len(labels):
        raise UserError(f"--data_dir {data_dir}: its {name} {split} files are corrupt")
    if not 0 <= labels.min() <= labels.max() < len(names):
        raise UserError(f"--data_dir {data_dir}: its {name} {split} files are corrupt")
    return images.contiguous(), labels, names


def _download(name: str, data_dir: str, folder: Path, read: Callable):
    try:
        return read(download=True)
    except Exception as error:
        raise UserError(
            f"--dataset {name}: no files in {folder} and the download failed"
            f" ({type(error).__name__}): point --data_dir at a copy, or use --dataset synthetic"
        ) from None


DATASETS: dict[str, Callable[[str, str, str | None], Split]] = {
    **{name: partial(_torchvision, name) for name in TORCHVISION},
    "synthetic": _synthetic,
    "folder": load_image_folder,
}


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Index batches of one pass in an order fixed by (seed, epoch). A last, short one is dropped.

    Training sees other images dropped in each epoch; `batch_size` above `count` gives one batch.
    """
    order = torch.randperm(count, generator=generator(Stream.ORDER, seed, epoch))
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
        load_dataset("mnist", DATA_DIR, "train")
        print("mnist")
    except UserError as error:
        print(error, file=sys.stderr)
        print("synthetic")


if __name__ == "__main__":
    main()
