"""Damage files of images at random: each is read rightly or refused. `python -m tests.fuzz_images`

Prints, for 1,000 files of each kind (or as many as its argument says), how many were read, the
slowest, and the most memory that the process took.
"""

import io
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError
from utils.images import read_images
from utils.synthetic import synthetic_digits

FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "tif": "TIFF"}
TYPES = "|u1 |b1 |i1 <f4 >f8 <f2 <i8 >u2 |O <c8 <U9 |V9 <M8[s]".split()
KINDS = ("npz", "npy", *FORMATS, "forged")
DIGITS = synthetic_digits(20, seed=5)[0].numpy()


def peak_memory():
    """The most bytes of memory that this process has used so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, drop, double or overwrite some of the bytes."""
    kind, at = rng.randrange(5), rng.randrange(len(data))
    length = rng.choice([1, 1, 4, 64, 1024])
    if kind == 0:
        flipped = bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + length])
        return data[:at] + flipped + data[at + length :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    return data[:at] + rng.randbytes(length) + data[at + length :]


def original(kind: str) -> bytes:
    """An undamaged file."""
    buffer = io.BytesIO()
    if kind == "npz":
        np.savez_compressed(buffer, images=DIGITS, labels=np.arange(20))
    elif kind in FORMATS:
        Image.fromarray(DIGITS[0, 0]).save(buffer, FORMATS[kind])
    else:
        np.save(buffer, DIGITS)
    return buffer.getvalue()


def forge(rng: random.Random) -> bytes:
    """A .npz or .npy with correct checksums that holds, or claims to hold, something strange."""
    if rng.random() < 0.5:  # honest
        scale = rng.choice([0, 1 / 255, 1 / 127.5, 1, 1 / 16, 257])
        with np.errstate(all="ignore"):
            array = DIGITS.astype(float) * scale - rng.choice([0, 0, 1])
            array = array.astype(rng.choice(TYPES[:8]))
        axes = rng.choice([(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)])
        array = np.asarray(array.transpose(axes), order=rng.choice("CF"))
        buffer = io.BytesIO()
        np.save(buffer, array.squeeze() if rng.random() < 0.3 else array)
        data = buffer.getvalue()
    else:
        size = rng.choice([0, 1, 2, 3, 4, 20, 28, -1, 2**31, 2**40, 2**63, 10**30])
        shape = rng.choice([(20, 1, 28, size), (size, 28, 28), (size,), (), (20, 28, 28, 1)])
        header = {"descr": rng.choice(TYPES), "fortran_order": rng.random() < 0.5, "shape": shape}
        text = rng.choice([str(header), str(header)[:-1], "(" * 9000, "9" * 9000])
        text = text.encode().ljust(rng.choice([0, 118, 65000]))
        data = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + DIGITS.tobytes()
    if rng.random() < 0.5:
        return data
    lies = [None, None, 2**40, 10, len(data) + 1]
    return archive({"images": data}, claimed=rng.choice(lies))


def archive(entries: dict[str, bytes], claimed: int | None = None) -> bytes:
    """A .npz of .npy files, the first of which may lie about its size."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)
        if claimed is not None:
            file.infolist()[0].file_size = min(claimed, 2**32 - 2)
    return buffer.getvalue()


def expected(kind: str, path: Path) -> np.ndarray | None:
    """What an independent reader makes of a file that was taken; None where there is none."""
    if kind == "npz":
        return DIGITS  # its checksum admits nothing else
    if kind == "png":
        return DIGITS[:1]
    if kind == "npy":
        array = np.load(path)
        return array.reshape(-1, 1, *array.shape[-2:]) if array.dtype == np.uint8 else None
    if kind == "forged":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(path)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)[None]


def fuzz(kind: str, count: int, folder: Path) -> tuple[int, float]:
    """Damage a file `count` times; how many were read nevertheless, and the slowest in seconds.

    Raises AssertionError where one was read wrongly, and whatever else it meets but UserError.
    """
    rng, data, read, slowest = random.Random(zlib.crc32(kind.encode())), original(kind), 0, 0.0
    path = folder / f"damaged.{'npz' if kind == 'header' else kind}"
    for _ in range(count):
        path.write_bytes(forge(rng) if kind == "forged" else mutate_bytes(data, rng))
        start = time.monotonic()
        try:
            images = read_images(path, "--images", at_least=1).images.numpy()
        except UserError as error:
            line = str(error)
            assert line.startswith(f"--images {path}") and "\n" not in line and len(line) < 600
        else:
            read += 1
            wanted = expected(kind, path)
            assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
            assert wanted is None or (images == wanted).all(), kind
        slowest = max(slowest, time.monotonic() - start)
    return read, slowest


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            start = time.monotonic()
            read, slowest = fuzz(kind, count, Path(folder))
            seconds = time.monotonic() - start
            peak = peak_memory() / 2**20
            print(
                f"{kind:6} {read:4} of {count} read, the others refused; {seconds:.1f} s in all,"
                f" slowest {1000 * slowest:.0f} ms; peak memory {peak:.0f} MiB"
            )
