"""A folder of image files as a data set: its subfolders are the classes."""

import os
from pathlib import Path

import torch
from torch import Tensor

from config import UserError
from utils.images import holds_images, is_hidden, load_images

HELD_OUT = 0.1  # share of the images that become the test set if there is no test folder
HOLD_OUT_SEED = 0
SIDE_MULTIPLE, LARGEST_SIDE = 4, 64  # pixels, of images that the networks are designed for


def load_image_folder(
    data_dir: str, split: str, test_dir: str | None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Load images (N, C, H, W) uint8, labels (N,) int64, and class names.

    Each subfolder with images is a class, ordered by name. A folder without such subfolders has no
    classes, and its labels are 0. "test" is `test_dir`, or else a tenth of the images, drawn at
    random with a fixed seed. "train" is the rest, in random order.
    Raises UserError if images are missing or differ in size, if a side is not a multiple of 4 or
    exceeds 64, or if `test_dir` differs in size, colour or classes.
    """
    if test_dir and not os.path.isdir(test_dir):  # report it before training, not after
        raise UserError(f"--test_dir {test_dir}: no such folder")
    images, labels, names = _read(Path(data_dir), "--data_dir")
    _check_size(images, data_dir)
    generator = torch.Generator().manual_seed(HOLD_OUT_SEED)
    order = torch.randperm(len(images), generator=generator)
    held_out = max(1, round(HELD_OUT * len(images)))
    if test_dir:
        if split == "train":
            return images[order], labels[order], names
        test_images, test_labels, test_names = _read(Path(test_dir), "--test_dir")
        if test_names != names or test_images.shape[1:] != images.shape[1:]:
            raise UserError(
                f"--test_dir {test_dir}: contains {_describe(test_images, test_names)}, must be"
                f" {_describe(images, names)} as in --data_dir {data_dir}"
            )
        return test_images, test_labels, names
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return images[chosen], labels[chosen], names


def _read(folder: Path, flag: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read all images of a folder, by class. Grey images become RGB if others are in colour."""
    try:
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
        folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
        classes = [path for path in folders if not is_hidden(path.name) and holds_images(path)]
        beside = bool(classes) and holds_images(folder, below=False)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be read: {error.strerror}") from None
    if not classes:
        images = load_images(folder, flag, at_least=1)
        return images, torch.zeros(len(images), dtype=torch.long), ()
    if beside:
        raise UserError(
            f"{flag} {folder}: contains images beside the subfolders {classes[0].name}, ...: move"
            " them into subfolders, one per class"
        )
    sets = [load_images(path, flag, at_least=1) for path in classes]
    for path, images in zip(classes, sets, strict=True):
        if images.shape[2:] != sets[0].shape[2:]:
            raise UserError(
                f"{flag} {folder}: {path.name} contains {_size(images)},"
                f" {classes[0].name} contains {_size(sets[0])}"
            )
    channels = max(images.shape[1] for images in sets)
    counts = torch.tensor([len(images) for images in sets])
    labels = torch.arange(len(sets)).repeat_interleave(counts)
    together = torch.cat([images.expand(-1, channels, -1, -1) for images in sets])
    return together, labels, tuple(path.name for path in classes)


def _size(images: Tensor) -> str:
    colour = {1: "grey", 3: "RGB"}[images.shape[1]]
    return f"{colour} images of {images.shape[2]} x {images.shape[3]} pixels"


def _describe(images: Tensor, names: tuple[str, ...]) -> str:
    return f"{_size(images)} in {len(names)} classes"


def _check_size(images: Tensor, data_dir: str) -> None:
    if any(side % SIDE_MULTIPLE or side > LARGEST_SIDE for side in images.shape[2:]):
        raise UserError(
            f"--data_dir {data_dir}: contains {_size(images)}; both sides must be multiples of"
            f" {SIDE_MULTIPLE} and at most {LARGEST_SIDE}"
        )
