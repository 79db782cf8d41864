"""Files: written whole or not at all, and pictures of others read with care."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: a reader, or a crash, finds the old file or the new.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another may write it too
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the renaming itself must survive a power cut
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def writable_folder(path: Path) -> Path:
    """Create a folder and make sure that files can be written there. Raises UserError if not."""
    probe = Path(path) / f".probe{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output folder {path}: cannot be written: {error.strerror}") from None
    return Path(path)


ENDINGS = (".png", ".jpg", ".jpeg")


def is_image(path: Path) -> bool:
    """True for the name of a picture that is not hidden."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def load_images(path: Path, flag: str, at_least: int = 2) -> Tensor:
    """uint8 (N, C, H, W), N >= at_least, of equally sized pictures in a folder, or of one file.

    C is 1 (grey) or 3 (RGB). Pictures are PNG or JPEG; a file may also be a .npy, or a .npz that
    holds the array `images` (or one array of any name). Raises UserError, naming `flag`.
    """
    try:
        if path.is_dir():
            images = _read_pictures(sorted(filter(is_image, path.rglob("*"))), path, flag)
        elif is_image(path) and path.is_file():
            images = _read_pictures([path], path, flag)
        else:
            images = _read_array(path, flag)
    except (OSError, ValueError, EOFError, SyntaxError, KeyError) as error:
        raise UserError(f"{flag} {path}: cannot be read: {error}") from None
    if images.ndim == 3:
        images = images[:, None]
    fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
    if not fits or len(images) < at_least:
        raise UserError(
            f"{flag} {path}: holds {images.dtype} {images.shape},"
            f" must be uint8 (N, C, H, W) with C 1 or 3 and N >= {at_least}"
        )
    return torch.from_numpy(np.ascontiguousarray(images))


def _read_array(path: Path, flag: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file or folder")
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    return loaded["images" if "images" in loaded or not loaded.files else loaded.files[0]]


def _read_pictures(files: list[Path], path: Path, flag: str) -> np.ndarray:
    if not files:
        raise UserError(f"{flag} {path}: a folder without PNG or JPEG files")
    arrays = []
    for file in files:
        with Image.open(file) as image:
            if image.mode not in ("L", "RGB"):
                raise UserError(
                    f"{flag} {path}: {file.name} is {image.mode}, must be 8-bit grey or RGB"
                )
            array = np.asarray(image)
        arrays.append(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(
                f"{flag} {path}: {file.name} is not of the size and colour of {files[0].name}"
            )
    return np.stack(arrays)
