"""Read a user's images: folders of pictures, single pictures, .npz and .npy files.

All images are returned as uint8 (N, C, H, W). A file's content decides how it is read, not its
name. A file that could be read in two ways is refused, with an error line that describes it.
"""

import io
import os
import re
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from config import UserError
from utils.arrays import (
    ENDINGS,
    MOST_PIXELS,
    TAKEN,
    Refused,
    eight_bits,
    read_npy,
    read_npz,
    to_pixels,
    without_equal_channels,
)

FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # formats whose pixels Pillow reads unchanged
MOST_PICTURE = 2**24  # pixels in one picture
MOST_FILE = 2**28  # bytes in the file of one picture

PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")  # first bytes of their files
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF

SYSTEM = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}
SIGNATURES = {  # first bytes of files that users often pass instead of images
    b"\x1f\x8b": "is compressed by gzip (unpack it first)",
    b"BZh": "is compressed by bzip2 (unpack it first)",
    b"\xfd7zXZ": "is compressed by xz (unpack it first)",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd (unpack it first)",
    b"7z\xbc\xaf": "is a 7z archive (unpack it first)",
    b"Rar!": "is a RAR archive (unpack it first)",
    b"\0\0\x08": "is an IDX file, like MNIST's own",
    b"\x89HDF": "is an HDF5 file",
    b"PAR1": "is a Parquet file",
    b"GIF8": "is a GIF",
    b"RIFF": "is a WebP picture, a video or an audio file",
    b"%PDF": "is a PDF",
    b"\x80": "is a Python pickle or an old PyTorch file",
}


@dataclass(frozen=True)
class ImageSet:
    """The images that were read.

    images: uint8 (N, C, H, W); C is 1 or 3; grey pictures stored as RGB have 1.
    labels: (N,) int64, the array `labels` of a .npz, or None.
    notes: lines on what was left out or had to be guessed, to be printed to stderr.
    """

    images: Tensor
    labels: Tensor | None = None
    notes: tuple[str, ...] = ()


def load_images(path: Path, flag: str, at_least: int = 2) -> Tensor:
    """The images of `read_images`; its notes are printed."""
    found = read_images(path, flag, at_least)
    tell(found.notes)
    return found.images


def read_images(path: Path, flag: str, at_least: int = 2) -> ImageSet:
    """Read at least `at_least` images of one size from a folder, a picture, a .npz or a .npy.

    A folder is searched recursively for files with a picture's extension, in upper or lower case,
    and read in the natural order of the relative paths (2.png before 10.png). Hidden files and
    links to folders are left out. For arrays, see `utils.arrays`. Raises UserError, naming `flag`.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            images, labels, notes = _read(path)
        if len(images) < at_least:
            number = f"{len(images)} image{'s' * (len(images) > 1)}"
            raise Refused(f"contains {number}, must be at least {at_least}")
    except Refused as reason:
        raise UserError(f"{flag} {path}: {reason}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{flag} {path}: is a damaged or truncated .npz") from None
    except OSError as error:
        reason = error.strerror or f"damaged: {error}"
        raise UserError(f"{flag} {path}: cannot be read: {str(reason)[:200]}") from None
    except Exception as error:  # a dozen kinds, depending on which byte is wrong
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{flag} {path}: is damaged: {reason}") from None
    if labels is not None and not _fit(labels, len(images)):
        notes.append(f"its labels are {labels.dtype} {labels.shape}, not classes: left out")
        labels = None
    if labels is not None:
        labels = torch.from_numpy(labels.astype(np.int64))
    return ImageSet(torch.from_numpy(images), labels, tuple(f"{flag} {path}: {n}" for n in notes))


def holds_images(folder: Path, below: bool = True) -> bool:
    """True if `read_images` would find pictures in a folder, or below it if `below`."""
    pictures, _ = _list_pictures(folder)
    return any(below or "/" not in path for path in pictures)


def tell(notes: Iterable[str]) -> None:
    """Print notes to stderr, one per line."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _fit(labels: np.ndarray, count: int) -> bool:
    """True if there is one class per image, an integer of at least 0."""
    whole = labels.dtype.kind in "iu" and labels.shape == (count,)
    return whole and labels.min() >= 0 and labels.max() < 2**31


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Return uint8 (N, C, H, W), the labels as stored in the file, and notes."""
    if path.is_dir():
        images, notes = _read_folder(path)
        return images, None, notes
    if not path.exists():
        raise Refused("no such file or folder")
    if not path.is_file():
        raise Refused(f"is a device or a pipe, must be {TAKEN}")
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"\x93NUMPY"):
            images, notes = to_pixels(read_npy(file, path.stat().st_size))
            return images, None, notes
    if head.startswith(b"PK"):
        array, labels, left_out = read_npz(path)
        images, notes = to_pixels(array)
        return images, labels, left_out + notes
    if head.startswith(PICTURES) or path.suffix.lower() in ENDINGS:
        picture, notes = _read_picture(path)
        return picture[None].copy(), None, notes
    raise Refused(f"{_what_file(head)}, must be {TAKEN}")


def _what_file(head: bytes) -> str:
    """Describe a file that begins with `head`, in words that follow its name."""
    if not head:
        return "is empty"
    for signature, words in SIGNATURES.items():
        if head.startswith(signature):
            return words
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return "is a text file"
    return "is of an unknown type"


def _read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Return all pictures in and below a folder as uint8 (N, C, H, W), and notes."""
    names, left_out = _list_pictures(folder)
    if not names:
        arrays = [name for name in left_out if name.lower().endswith((".npz", ".npy"))]
        hint = f"; to read one of its arrays, name it: {folder / arrays[0]}" if arrays else ""
        raise Refused(f"is a folder without pictures (PNG, JPEG, BMP, TIFF){hint}")
    pictures, counts = [], Counter()
    for name in names:
        try:
            picture, notes = _read_picture(folder / name)
        except Refused as reason:
            raise Refused(f"{name} {reason}") from None
        pictures.append(picture)
        counts.update(notes)
        if picture.shape[1:] != pictures[0].shape[1:]:
            sizes = [" x ".join(map(str, p.shape[1:])) for p in (picture, pictures[0])]
            raise Refused(f"{name} is {sizes[0]} pixels, {names[0]} is {sizes[1]}")
        if len(names) * picture.size > MOST_PIXELS:
            raise Refused(f"contains {len(names)} pictures, too many for {MOST_PIXELS >> 20} MiB")
    channels = max(len(picture) for picture in pictures)  # RGB if any picture is RGB
    images = np.empty((len(pictures), channels, *pictures[0].shape[1:]), np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[:] = picture
    notes = [f"{count} of {len(names)} pictures: {note}" for note, count in counts.items()]
    if any("/" in name for name in names):
        notes.append(f"read from {len({Path(name).parent for name in names})} folders")
    if left_out:
        shown = next((name for name in left_out if not is_hidden(Path(name).name)), left_out[0])
        notes.append(f"read {len(names)} pictures, left out {len(left_out)} others, like {shown}")
    return images, notes


def _list_pictures(folder: Path) -> tuple[list[str], list[str]]:
    """List pictures and all other files as POSIX paths below `folder`, in natural order."""

    def fail(error: OSError) -> None:
        raise error

    pictures, left_out = [], []
    for top, folders, names in os.walk(folder, onerror=fail):
        below = Path(top).relative_to(folder)
        skipped = [n for n in folders if is_hidden(n) or os.path.islink(os.path.join(top, n))]
        folders[:] = [name for name in folders if name not in skipped]
        left_out += [(below / name).as_posix() for name in skipped]
        for name in names:
            known = name.lower().endswith(ENDINGS) and not is_hidden(name)
            (pictures if known else left_out).append((below / name).as_posix())
    return sorted(pictures, key=_natural), sorted(left_out, key=_natural)


def is_hidden(name: str) -> bool:
    """True for hidden files, and for files that operating systems leave in folders."""
    return name.startswith(".") or name.lower() in SYSTEM


def _natural(path: str) -> tuple:
    """Sorting key: compares numbers in names by value, everything else by character."""
    return [
        [int(piece) if k % 2 else piece for k, piece in enumerate(re.split("([0-9]+)", part))]
        for part in path.split("/")
    ], path


def _read_picture(file: Path) -> tuple[np.ndarray, list[str]]:
    """Return uint8 (C, H, W) and notes. Raises Refused, in words that follow the file's name."""
    try:
        if not file.is_file():  # a pipe or a broken link
            raise Refused("is not a file")
        if file.stat().st_size > MOST_FILE:
            raise Refused(f"is a file of more than {MOST_FILE >> 20} MiB")
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MOST_PICTURE:
                raise Refused(f"is too large, {image.width} x {image.height} pixels")
            image.verify()  # a PNG's checksums, which are not checked when its pixels are read
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _pixels(image, data)
    except Refused:
        raise
    except UnidentifiedImageError:
        if data.startswith(PICTURES):
            raise Refused("is damaged") from None
        raise Refused(f"{_what_file(data[:512])}, must be {' or '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused("is too large, hundreds of millions of pixels") from None
    except Exception as error:  # a dozen kinds, depending on which byte is wrong
        reason = getattr(error, "strerror", None) or f"is damaged: {str(error)[:100]}"
        raise Refused(reason) from None


def _pixels(image: Image.Image, data: bytes) -> tuple[np.ndarray, list[str]]:
    """Do the same as `_read_picture`, for an open picture and its file's bytes."""
    notes, mode, bits = [], image.mode, _bits(image, data)
    if getattr(image, "n_frames", 1) > 1:
        raise Refused(f"contains {image.n_frames} pictures, must be one")
    if image.format == "JPEG":
        notes.append("JPEG, whose compression also affects scores")
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        notes.append("reoriented according to its EXIF data")
    if mode.startswith("I;16") or (mode == "I" and image.format == "PNG"):
        array = np.asarray(image)
        convert, note = eight_bits(array)
        return convert(array).astype(np.uint8)[None], [*notes, note]
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise Refused(f"has pixels of kind {mode}, must be grey or RGB")
    if bits > 8:  # Pillow would drop the lower bits
        raise Refused("has 16 bits per channel, must be 8")
    if mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise Refused("has transparent pixels, must be opaque")
    array = np.asarray(image.convert("L" if mode in ("1", "L") else "RGB"))
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return without_equal_channels(array[None])[0], notes


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel in the file, which Pillow's modes do not show."""
    if image.format == "PNG":
        return data[24]  # in its first chunk
    if image.format == "TIFF":
        return max(np.ravel(image.tag_v2.get(BITS_PER_SAMPLE, 8)))
    return 8
