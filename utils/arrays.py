"""Read arrays from untrusted .npy and .npz files, and convert them to pixels.

A file may be damaged or malicious. So nothing is unpickled, no more memory is allocated than the
size of the file justifies, and an array is chosen by its name, never by its position.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

MOST_STORED = 7 * 2**26  # bytes of an array as stored
MOST_PIXELS = 3 * 2**26  # bytes of all images as uint8; reading takes less than 1 GiB
HEADER = 2**14  # bytes: the longest .npy header that is read
TAKEN = "a folder of pictures (PNG, JPEG, BMP, TIFF), a picture, a .npz or a .npy"
ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff")  # of pictures
CHUNK = 2**20  # bytes or pixels processed at a time

NAMES = ("images", "arr_0")  # names for an array of images; arr_0 is NumPy's default
LAYOUTS = "(N, H, W), (N, 1 or 3, H, W) or (N, H, W, 1 or 3)"
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Refused(ValueError):
    """Why a file is refused, in words that follow its name, such as 'is encrypted'."""


def read_npy(stream: BinaryIO, size: int) -> np.ndarray:
    """Read the array of a .npy `stream` of `size` bytes. Raises Refused; ValueError if damaged."""
    head = io.BytesIO(stream.read(HEADER))
    shape, fortran, dtype = _read_header(head)
    if dtype.kind not in "buif" or dtype.shape:
        kind = "Python objects" if dtype.hasobject else f"values of type {str(dtype)[:40]}"
        raise Refused(f"contains {kind}, must be numbers")
    stored = math.prod(shape) * dtype.itemsize
    if stored > MOST_STORED:
        raise Refused(f"claims to be {dtype} {shape}, more than {MOST_STORED >> 20} MiB")
    if min(shape, default=0) < 0 or head.tell() + stored != size:
        raise Refused(f"is damaged: {dtype} {shape} does not fit its size")
    buffer = np.empty(stored, np.uint8)
    rest = head.read()
    buffer[: len(rest)] = np.frombuffer(rest, np.uint8)
    done, view = len(rest), memoryview(buffer)
    while done < stored:
        got = stream.readinto(view[done : done + CHUNK])
        if not got:
            raise Refused("is cut short")
        done += got
    if stream.read(1):  # at the end, an archive verifies the checksum
        raise Refused("is damaged: it has data after its end")
    return buffer.view(dtype).reshape(shape, order="F" if fortran else "C")


def _read_header(head: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(head)
    if version not in HEADERS:
        raise Refused(f"is .npy format {version}, must be (1, 0) or (2, 0)")
    return HEADERS[version](head)


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Read the images of a .npz, its `labels` if it has any, and notes on what was left out.

    The images are the array `images`, else `arr_0`, else the only array. Raises Refused.
    """
    with zipfile.ZipFile(path) as archive:
        arrays = _list_arrays(archive)
        chosen = [name for name in NAMES if name in arrays] or list(arrays)
        if chosen[0] not in NAMES and len(chosen) > 1:
            shown = listed([f"{name} {_sketch(archive, arrays[name])}" for name in arrays])
            raise Refused(f"contains {shown}; the array of images must be called images or arr_0")
        others = [name for name in arrays if name not in (chosen[0], "labels")]
        notes = [f"read {chosen[0]}, left out {listed(others)}"] if others else []
        labels = None
        if "labels" in arrays and chosen[0] != "labels":
            labels = _extract(archive, arrays["labels"])
        return _extract(archive, arrays[chosen[0]]), labels, notes


def _list_arrays(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    arrays = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name in arrays:
            raise Refused(f"contains two arrays called {name[:60]}")
        if name != entry.filename:
            arrays[name] = entry
    if not arrays:
        raise Refused(_what_archive(archive.namelist()))
    return arrays


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    if entry.flag_bits & 0x41:
        raise Refused("is encrypted")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused("is compressed by a method that NumPy does not use")
    with archive.open(entry) as stream:
        return read_npy(stream, entry.file_size)


def _sketch(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    """Type and shape of an array, like 'uint8 (300, 28, 28)'."""
    try:
        with archive.open(entry) as stream:
            shape, _, dtype = _read_header(io.BytesIO(stream.read(HEADER)))
        return f"{str(dtype)[:20]} {str(shape)[:40]}"
    except Exception:  # the array is only mentioned
        return "(unreadable)"


def _what_archive(names: list[str]) -> str:
    if any(Path(name).name == "data.pkl" for name in names):
        return f"is a PyTorch file, must be {TAKEN}"
    if any(name.lower().endswith(ENDINGS) for name in names):
        return "is a zip archive of pictures: unpack it and name the folder"
    return f"is a zip archive without arrays, must be {TAKEN}"


def listed(names: list[str], most: int = 6) -> str:
    """'a, b, c and 4 more'."""
    shown = ", ".join(name[:80] for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def to_pixels(array: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Convert to uint8 (N, C, H, W) with C 1 or 3; also return notes on what had to be guessed.

    Accepts any of LAYOUTS; values from 0 to 255, floats from 0 to 1 or from -1 to 1, and masks.
    Raises Refused if the layout or the range is ambiguous.
    """
    array = _channels_first(array)
    if array.size > MOST_PIXELS:
        raise Refused(f"contains {array.shape}, more than {MOST_PIXELS >> 20} million pixels")
    if not array.size:
        raise Refused(f"contains {array.shape}, no pixels")
    convert, note = _reading(array)
    if array.dtype != np.uint8 or note:
        pixels = np.empty(array.shape, np.uint8)
        for part in _parts(pixels):
            pixels[part] = convert(array[part])
        array = pixels
    return without_equal_channels(np.ascontiguousarray(array)), [note] if note else []


def _channels_first(array: np.ndarray) -> np.ndarray:
    """Return a view as (N, C, H, W) with C 1 or 3. Raises Refused if the layout is unclear."""
    shape, held = array.shape, f"contains {array.dtype} {array.shape}"
    if array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] != 3:
        return array[:, None]
    if array.ndim == 4:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and not last:
            return array
        if last and not first:
            return array.transpose(0, 3, 1, 2)
        if first and last:
            raise Refused(f"{held}: channels first or last? must be {LAYOUTS}")
    if array.ndim == 3:
        raise Refused(f"{held}: one picture in colour, or several in grey? must be {LAYOUTS}")
    raise Refused(f"{held}, must be {LAYOUTS}")


def _parts(array: np.ndarray) -> Iterator[slice]:
    """Slices along the first axis, of about CHUNK values each."""
    step = max(1, CHUNK * len(array) // max(1, array.size))
    return (slice(k, k + step) for k in range(0, len(array), step))


def _reading(array: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Return a function that maps values to 0..255, and a note; '' if nothing was guessed."""
    if array.dtype.kind == "b":
        return lambda x: np.where(x, 255, 0), "contains true and false, read as white and black"
    low, high = array.min(), array.max()  # NaN if there is one
    held = f"contains {array.dtype} from {low:g} to {high:g}"
    if array.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise Refused("contains NaN or infinity")
        return _float_reading(float(low), float(high), held)
    if low < 0 or high > 255:
        if array.dtype.kind == "u" and array.dtype.itemsize == 2:
            return eight_bits(array)
        raise Refused(f"{held}, must be from 0 to 255")
    if high == 1:
        return lambda x: np.where(x, 255, 0), "contains only 0 and 1, read as black and white"
    return lambda x: x, ""


def _float_reading(low: float, high: float, held: str) -> tuple[Callable, str]:
    """Guess the range of floats. Raises Refused unless most of one range is used."""
    if -1e-3 <= low and 0.5 <= high <= 1 + 1e-3:
        scale, shift, black, white = 255, 0, 0, 1
    elif -1 - 1e-3 <= low <= -0.9 and high <= 1 + 1e-3:
        scale, shift, black, white = 127.5, 127.5, -1, 1
    elif -0.5 <= low and 128 <= high <= 255.5:
        scale, shift, black, white = 1, 0, 0, 255
    else:
        ranges = "0 to 1, -1 to 1 or 0 to 255"
        raise Refused(f"{held}: black to white must be {ranges}")
    note = f"contains floats, read as {black} (black) to {white} (white) and rounded to 8 bits"
    return lambda x: np.rint(x.astype(np.float32) * scale + shift).clip(0, 255), note


def eight_bits(array: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """Convert 16-bit pixels that are 8-bit ones times 257. Raises Refused for any others."""
    if array.min() < 0 or any((array[part] % 257).any() for part in _parts(array)):
        raise Refused("contains 16-bit pixels, must be 8-bit ones")
    return lambda x: x // 257, "contains 16-bit pixels, 8-bit ones times 257: read as 8-bit"


def without_equal_channels(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 3, H, W) with equal channels -> (N, 1, H, W); others are returned unchanged."""
    if images.shape[1] == 3 and all(
        (images[part, 1:] == images[part, :1]).all() for part in _parts(images)
    ):
        return images[:, :1].copy()
    return images
