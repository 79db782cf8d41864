"""Data sets, each loaded as one uint8 tensor, and the metadata that other modules read."""

import contextlib
import gzip
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import DATA_DIR, UserError
from utils.image_folder import LARGEST_SIDE, SIDE_MULTIPLE, load_image_folder
from utils.random import Stream, generator
from utils.synthetic import synthetic_digits

SYNTHETIC_SIZE = {"train": 20_000, "test": 10_000}
SYNTHETIC_SEED = {"train": 1, "test": 2}
DIGITS = tuple("0123456789")
HELD_OUT = 6  # one training image in six; for MNIST that is 10,000, like its test set


@dataclass(frozen=True)
class DatasetInfo:
    """Metadata that the rest of the project needs about a data set. Every checkpoint stores one.

    Attributes:
        name: a key of DATASETS.
        channels: 1 (grey) or 3 (RGB).
        height, width: in pixels.
        class_names: one per label; () if the images have no labels.
        label_shares: each label's share of the training images; they sum to about 1.
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

    def check_same(self, trained: "DatasetInfo", source: str, what: str) -> None:
        """Raises UserError, naming `source`, unless images and classes are those of `trained`.

        what: what was trained on those.
        """
        if (self.shape, self.class_names) != (trained.shape, trained.class_names):
            raise UserError(
                f"{source}: has {self._kind()}; {what} was trained on {trained._kind()}"
            )

    def _kind(self) -> str:
        names = ", ".join(self.class_names[:10]) + ", ..." * (self.num_classes > 10)
        return f"images {self.shape} of {self.num_classes} classes" + f" ({names})" * bool(names)

    @classmethod
    def from_dict(cls, values: dict) -> "DatasetInfo":
        """Rebuild the metadata in a checkpoint. Raises ValueError if it is invalid."""
        if not isinstance(values, dict) or set(values) != {f.name for f in fields(cls)}:
            raise ValueError("its data set fields are not those that this version knows")
        info = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        sizes = (info.channels, info.height, info.width)
        if not all(type(n) is int for n in sizes) or info.channels not in (1, 3):
            raise ValueError("its images are neither grey nor RGB")
        if not all(1 <= n <= LARGEST_SIDE for n in sizes) or info.name not in list(DATASETS):
            raise ValueError("its data set or image size is unknown to this version")
        if info.height % SIDE_MULTIPLE or info.width % SIDE_MULTIPLE:
            raise ValueError(f"its image sides are not multiples of {SIDE_MULTIPLE}")
        names, shares = info.class_names, info.label_shares
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError("its classes have no names")
        if not isinstance(shares, tuple) or len(shares) != len(names):
            raise ValueError("its classes have no shares")
        fits = all(isinstance(share, float) and 0 <= share < math.inf for share in shares)
        if not fits or (shares and not sum(shares)):
            raise ValueError("label_shares must be finite, at least 0 and not all 0")
        return info


@dataclass(frozen=True)
class Dataset:
    """One split: images (N, C, H, W) uint8, labels (N,) int64 (0 without classes), and metadata."""

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
    """Load the "train" or "test" split of one of DATASETS: all images, or the first `limit`.

    With `held_out`, "test" is the last sixth of the training images and "train" is the rest. Use
    it for choices made by score, so that the real test set is used only for reported results.
    `test_dir` is only for `folder`. Raises UserError if the files are missing and cannot be
    downloaded, or are invalid.
    """
    if test_dir and name != "folder":
        raise UserError(f"--test_dir {test_dir}: only allowed with --dataset folder")
    images, labels, class_names = DATASETS[name](data_dir, "train" if held_out else split, test_dir)
    if held_out:
        first = len(images) - len(images) // HELD_OUT
        chosen = slice(first, None) if split == "test" else slice(first)
        images, labels = images[chosen], labels[chosen]
    images, labels = images[:limit], labels[:limit]
    if not len(images):
        raise UserError(f"--data_dir {data_dir}: contains too few images, none left for {split}")
    counts = labels.bincount(minlength=len(class_names))[: len(class_names)]
    shares = tuple((counts.double() / len(labels)).tolist())
    return Dataset(images, labels, DatasetInfo(name, *images.shape[1:], class_names, shares))


def describe(name: str, images: Tensor) -> DatasetInfo:
    """Metadata for images (N, C, H, W) that imitate the data set `name`, without loading it.

    The class names are the known ones of that data set. All classes are taken as equally frequent.
    """
    names = DIGITS if name in ("mnist", "synthetic") else ()
    if not names and name in TORCHVISION:
        names = _short_names(getattr(_class(name), "classes", None) or ())
    shares = (1 / max(1, len(names)),) * len(names)
    return DatasetInfo(name, *images.shape[1:], names, shares)


def _short_names(classes: Sequence[str]) -> tuple[str, ...]:
    """torchvision's class names, with MNIST's "7 - seven" shortened to "7"."""
    return tuple(text.split(" - ")[0] for text in classes)


Split = tuple[Tensor, Tensor, tuple[str, ...]]  # images, labels and class names


def _synthetic(data_dir: str, split: str, test_dir: str | None) -> Split:
    images, labels = synthetic_digits(SYNTHETIC_SIZE[split], SYNTHETIC_SEED[split])
    return images, labels, DIGITS


TORCHVISION = {  # torchvision's class, the folder of its files, and the image shape (C, H, W)
    "mnist": ("MNIST", "MNIST/raw", (1, 28, 28)),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", (1, 28, 28)),
    "kmnist": ("KMNIST", "KMNIST/raw", (1, 28, 28)),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", (3, 32, 32)),
}


def _class(name: str) -> type:
    from torchvision import datasets  # slow to import, and seldom needed

    return getattr(datasets, TORCHVISION[name][0])


def _torchvision(name: str, data_dir: str, split: str, test_dir: str | None) -> Split:
    """Read one of torchvision's data sets from disk, and download it first if it is missing."""
    root = Path(data_dir).expanduser()
    _, files, shape = TORCHVISION[name]
    read = _read_cifar10 if name == "cifar10" else partial(_read_idx, name)
    try:
        try:  # existing files: no network access, no writing
            images, labels, names = read(root, split)
        except FileNotFoundError:
            _download(name, root)
            images, labels, names = read(root, split)
        if images.shape != (len(labels), *shape) or not len(labels):
            raise ValueError(f"{len(labels)} labels for images {tuple(images.shape)}")
        if not 0 <= labels.min() <= labels.max() < len(names):
            raise ValueError(f"labels up to {labels.max()} for {len(names)} classes")
    except UserError:
        raise
    except Exception as error:  # half a dozen kinds, depending on which byte is wrong
        problem = getattr(error, "strerror", None)
        problem = f"cannot be read: {problem}" if problem else f"are corrupt: {error}"
        where = f"--data_dir {data_dir}: {split} files in {root / files}"
        raise UserError(f"{where} {problem}") from None
    return images.contiguous(), labels.long(), names


def _read_idx(name: str, root: Path, split: str) -> Split:
    """Read files in MNIST's IDX format, gzipped or not. Raises FileNotFoundError, ValueError."""
    arrays, prefix = [], {"train": "train", "test": "t10k"}[split]
    for part in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        path = root / TORCHVISION[name][1] / f"{prefix}-{part}"
        packed = path.with_name(f"{path.name}.gz")
        data = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        if data[:3] != b"\0\0\x08":
            raise ValueError(f"{path.name} is not an IDX file of bytes")
        shape = np.frombuffer(data, ">i4", data[3], offset=4)
        array = np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
        arrays.append(torch.from_numpy(array.copy()))
    names = DIGITS if name == "mnist" else _short_names(_class(name).classes)
    return arrays[0][:, None], arrays[1], names


def _read_cifar10(root: Path, split: str) -> Split:
    """Read CIFAR-10 with torchvision, which verifies checksums. Raises FileNotFoundError."""
    try:
        loaded = _class("cifar10")(root, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from None
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2)
    return images, torch.tensor(loaded.targets), tuple(loaded.classes)


def _download(name: str, root: Path) -> None:
    """Let torchvision download a data set to `root`. Raises UserError.

    It downloads to a temporary folder first, so that other processes never read incomplete files.
    Existing files stay unchanged.
    """
    folder = root / TORCHVISION[name][1]
    near = next(path for path in (root.absolute(), *root.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".download_", dir=near) as private:
            for packed in root.glob("*.tar.gz"):  # CIFAR-10's, to save a download
                with contextlib.suppress(OSError):  # a file system without links
                    Path(private, packed.name).symlink_to(packed.absolute())
            _class(name)(private, download=True)
            folder.mkdir(parents=True, exist_ok=True)
            for path in Path(private, TORCHVISION[name][1]).iterdir():
                if not (folder / path.name).exists():
                    os.replace(path, folder / path.name)
    except Exception as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"--dataset {name}: no files in {folder} and the download failed"
            f" ({reason}): point --data_dir at a copy, or use --dataset synthetic"
        ) from None


DATASETS: dict[str, Callable[[str, str, str | None], Split]] = {
    **{name: partial(_torchvision, name) for name in TORCHVISION},
    "synthetic": _synthetic,
    "folder": load_image_folder,
}


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Index batches of one epoch, in an order fixed by (seed, epoch). Drops a short last batch.

    Each epoch drops different images. A `batch_size` above `count` gives one batch of all of them.
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
    """Print the data set that a demo can use here: mnist if it is available, else synthetic."""
    try:
        load_dataset("mnist", DATA_DIR, "train")
        print("mnist")
    except UserError as error:
        print(error, file=sys.stderr)
        print("synthetic")


if __name__ == "__main__":
    main()
