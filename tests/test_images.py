"""Images of strangers: read rightly, or refused in a line that says what they are."""

import functools
import gzip
import io
import os
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from tests.fuzz_images import DIGITS, KINDS, archive, fuzz, peak_memory
from utils.image_checks import check_shape, suspicions
from utils.images import load_images, read_images

GREY = DIGITS[:, 0]  # (20, 28, 28)
COLOUR = np.stack([DIGITS[:10, 0], DIGITS[10:, 0], DIGITS[:10, 0]], axis=1)  # (10, 3, 28, 28)


def read(path="in.npz", **options):
    return read_images(Path(path), "--images", **options)


def refused(path="in.npz", *words, **options):
    """Check that a path is refused, in a line with all `words`."""
    with pytest.raises(UserError) as error:
        read(path, **options)
    line = str(error.value)
    assert line.startswith(f"--images {path}") and "\n" not in line
    assert all(word in line for word in words), line


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def save(path, array, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def test_a_folder_is_read_whole_in_natural_order(monkeypatch):
    names = ["1.png", "2.PNG", "10.png", "a/b/3.jpg", "a/4.JPEG", "a/20.Png", "b/5.bmp", "b/6.TIF"]
    for name, image in random.Random(0).sample(list(zip(names, GREY, strict=False)), len(names)):
        save(f"in/{name}", image, **({"quality": 100} if "j" in name.lower() else {}))
    first = read("in")
    order = [0, 1, 2, 4, 5, 3, 6, 7]  # 10 after 2, in folders too; files of a folder by their path
    differences = first.images.numpy()[:, 0].astype(int) - GREY[order]
    assert abs(differences).max() < 20 and not differences[[0, 1, 2, 4, 6, 7]].any()
    assert any("folders" in note for note in first.notes)
    assert any("2 of 8 pictures: JPEG" in note for note in first.notes)

    walk = os.walk

    def backwards(*arguments, **options):
        for top, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield top, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert torch.equal(read("in").images, first.images)


def test_what_is_left_out_of_a_folder_is_said():
    save("in/a.png", GREY[0])
    save("in/b.png", GREY[1])
    assert read("in").notes == ()
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden/c.png"):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).write_bytes(b"system")
    Path("in/__MACOSX").mkdir()
    Path("in/__MACOSX/._b.png").write_bytes(b"system")
    Path("in/scores.json").write_text("{}")
    Path("elsewhere").mkdir()
    Path("in/link").symlink_to("../elsewhere")
    found = read("in")
    assert len(found.images) == 2
    (note,) = found.notes
    assert "left out 8 others, like link" in note or "left out 8 others, like scores.json" in note


def test_folders_without_pictures():
    Path("in").mkdir()
    refused("in", "without pictures", "PNG")
    np.save("in/samples.npy", GREY)
    refused("in", "name it: in/samples.npy")


def picture(**options):
    buffer = io.BytesIO()
    image = options.pop("image")
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


@functools.cache
def modes():
    """Pictures that hold just the pixels of GREY[0], in other ways."""
    grey = Image.fromarray(GREY[0])
    rgba = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 255)])
    palette = grey.convert("P")  # whose palette is not in order of brightness
    order = np.random.default_rng(0).permutation(256)
    palette.putpalette(np.repeat(order[:, None], 3, axis=1).astype(np.uint8).tobytes())
    palette.putdata(np.argsort(order)[GREY[0]].ravel().tolist())
    return {
        "L": picture(image=grey),
        "RGB": picture(image=grey.convert("RGB")),
        "RGBA": picture(image=rgba),
        "LA": picture(image=rgba.convert("LA")),
        "P": picture(image=palette),
        "16 bits": picture(image=Image.fromarray(GREY[0].astype(np.uint16) * 257)),
        "TIFF of 16 bits": picture(
            image=Image.fromarray(GREY[0].astype(np.uint16) * 257), format="TIFF"
        ),
        "BMP": picture(image=grey, format="BMP"),
        "TIFF": picture(image=grey.convert("RGB"), format="TIFF", compression="tiff_lzw"),
        "turned": picture(image=grey.transpose(Image.Transpose.ROTATE_90), exif=turned()),
    }


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    return exif


@pytest.mark.parametrize("mode", modes())
def test_grey_pictures_in_any_mode(mode):
    Path("in.png").write_bytes(modes()[mode])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of torch, where memory is not its own
        images = load_images(Path("in.png"), "--images", at_least=1)
    assert images.shape == (1, 1, 28, 28) and (images.numpy() == DIGITS[:1]).all()


def test_bilevel_pictures():
    Image.fromarray(GREY[0] > 127).save("in.png")
    assert (read("in.png", at_least=1).images.numpy() == np.where(DIGITS[:1] > 127, 255, 0)).all()


def test_grey_pictures_among_colours_are_colours():
    save("in/0.png", GREY[0])
    save("in/1.png", COLOUR[1].transpose(1, 2, 0))
    images = read("in").images.numpy()
    assert (images[0] == GREY[0]).all() and (images[1] == COLOUR[1]).all()


def deep_png():
    """A PNG of 28 x 28 pixels of three channels of 16 bits, which Pillow would cut to 8."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.tobytes() for row in GREY[0].repeat(3, axis=1).astype(">u2") * 200)
    header = struct.pack(">IIBBBBB", 28, 28, 16, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@functools.cache
def bad_pictures():
    grey = Image.fromarray(GREY[0])
    transparent = Image.merge("LA", [grey, grey])
    good = picture(image=grey)
    twelve = Image.fromarray(GREY[0].astype(np.uint16) * 16)
    film = picture(image=grey, save_all=True, append_images=[grey.rotate(90)])
    return {
        "transparent": (picture(image=transparent), "transparent"),
        "12 bits": (picture(image=twelve), "16-bit"),
        "16 bits a channel": (deep_png(), "16 bits per channel"),
        "CMYK": (picture(image=grey.convert("CMYK"), format="JPEG"), "CMYK"),
        "floats": (picture(image=grey.convert("F"), format="TIFF"), "kind F"),
        "film": (film, "2 pictures"),
        "pages": (
            picture(image=grey, format="TIFF", save_all=True, append_images=[grey]),
            "2 pictures",
        ),
        "GIF": (picture(image=grey, format="GIF"), "is a GIF", "must be PNG"),
        "cut": (good[:-30], "damaged"),
        "flipped": (good[:60] + bytes([good[60] ^ 1]) + good[61:], "damaged"),
        "page of errors": (b"<html>404</html>", "a text file"),
        "empty": (b"", "is empty"),
        "bomb": (picture(image=Image.new("1", (20_000, 20_000))), "too large"),
    }


@pytest.mark.parametrize("kind", bad_pictures())
def test_bad_pictures_are_refused_by_name(kind):
    data, *words = bad_pictures()[kind]
    save("in/0.png", GREY[1])
    Path("in/1.png").write_bytes(data)
    refused("in", "1.png", *words)
    refused("in/1.png", *words, at_least=1)


def test_pictures_of_unequal_size_are_both_named():
    save("in/0.png", GREY[0])
    save("in/1.png", GREY[0, :20])
    refused("in", "1.png is 20 x 28", "0.png is 28 x 28")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_not_waited_for():
    save("in/0.png", GREY[0])
    os.mkfifo("in/1.png")
    refused("in", "1.png is not a file")
    refused("in/1.png", "pipe")
    refused("/dev/zero", "device")


@functools.cache
def others():
    buffer, zipped = io.BytesIO(), io.BytesIO()
    torch.save(torch.from_numpy(DIGITS), buffer)
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("digits/0.png", b"")
    return {
        "in.pt": (buffer.getvalue(), "PyTorch"),
        "in.zip": (zipped.getvalue(), "zip archive of pictures: unpack"),
        "in.csv": (b"label,pixel0\n5,0\n", "a text file", ".npz"),
        "images-idx3.gz": (gzip.compress(DIGITS.tobytes()), "gzip", "unpack"),
        "images-idx3-ubyte": (b"\0\0\x08\x03" + bytes(12), "IDX"),
        "in.pkl": (b"\x80\x04}.", "pickle"),
        "in.h5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
        "in.bin": (bytes(100), "unknown"),
        "in.npz": (b"", "empty"),
        "cut.npz": (archive({"images": npy(DIGITS)})[:3000], "damaged or truncated"),
    }


@pytest.mark.parametrize("name", others())
def test_files_of_other_kinds_are_called_by_their_name(name):
    data, *words = others()[name]
    Path(name).write_bytes(data)
    refused(name, *words)


def test_too_few_images():
    np.save("in.npy", DIGITS[:1])
    refused("in.npy", "1 image,", "at least 2")
    assert len(read("in.npy", at_least=1).images) == 1
    refused("nowhere", "no such file")
    refused("x" * 300, "too long")


@pytest.mark.parametrize(
    "shape, wanted, words",
    [
        ((1, 32, 32), (1, 28, 28), "1 x 32 x 32, must be 1 x 28 x 28 as in y; .*crop 2 pixels"),
        ((1, 28, 32), (1, 28, 28), "crop 0 rows, 2 columns"),
        ((1, 14, 56), (1, 28, 28), "1 x 14 x 56.*reshape"),
        ((3, 28, 28), (1, 28, 28), "in colour"),
        ((1, 28, 28), (3, 28, 28), "must be 3 x 28 x 28 as in y$"),
        ((1, 29, 29), (1, 28, 28), "must be 1 x 28 x 28 as in y$"),
    ],
)
def test_images_of_another_size(shape, wanted, words):
    images = torch.zeros(3, *shape, dtype=torch.uint8)
    with pytest.raises(UserError, match=f"^--images x: .*{words}"):
        check_shape(images, wanted, "--images x", "y")
    check_shape(images, shape, "--images x")


def test_a_border_that_holds_something_is_not_to_be_cropped():
    images = torch.zeros(3, 1, 32, 32, dtype=torch.uint8)
    images[1, 0, 31, 5] = 9
    with pytest.raises(UserError, match="must be 1 x 28 x 28$"):
        check_shape(images, (1, 28, 28), "--images x")


def test_suspicions():
    digits = torch.from_numpy(DIGITS)
    assert suspicions(digits) == []
    for images, words in (
        (255 - digits, "white background"),
        (torch.cat([digits, 255 - digits[:3]]), "3 of 23 images have a white background"),
        (digits // 16, "15 of 255"),
        ((digits > 127).byte() * 255, "0 or 255"),
        (torch.cat([digits, digits]), "20 of 40 images are copies"),
        (torch.cat([digits, digits[:2] * 0]), "2 of 22 images are empty"),
    ):
        found = suspicions(images)
        assert any(words in line for line in found), found


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_rightly_or_refused(kind, own_folder):
    """Sixty of each kind, or as many as FUZZ says; `python -m tests.fuzz_images` takes 1,000."""
    before = peak_memory()
    _, slowest = fuzz(kind, int(os.environ.get("FUZZ", 60)), own_folder)
    assert slowest < 5
    assert peak_memory() - before < 200 * 2**20
