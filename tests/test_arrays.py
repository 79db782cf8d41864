"""Arrays of strangers: chosen by name, understood in any clear form, and never trusted."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fuzz_images import DIGITS, archive, peak_memory
from tests.test_images import COLOUR, GREY, npy, read, refused
from utils.arrays import Refused, read_npy
from utils.images import load_images


def test_arrays_are_chosen_by_name_never_by_place():
    np.savez("in.npz", x_test=GREY, y_test=np.arange(20), x_train=GREY[:5])
    refused("in.npz", "x_test uint8 (20, 28, 28)", "y_test int64 (20,)", "x_train", "images")
    np.savez("in.npz", a=GREY[:5], images=GREY, arr_0=GREY[:3])
    found = read()
    assert len(found.images) == 20 and "left out a, arr_0" in found.notes[0]
    np.savez("in.npz", GREY, GREY[:3])
    assert len(read().images) == 20 and "read arr_0, left out arr_1" in read().notes[0]
    np.savez("in.npz", anything=GREY)
    assert len(read().images) == 20 and read().notes == ()


def test_labels_come_with_their_images():
    labels = np.arange(20, dtype=np.uint8) % 10
    np.savez("in.npz", images=GREY, labels=labels)
    assert read().labels.dtype == torch.int64 and read().labels.tolist() == labels.tolist()
    assert read().notes == ()
    for bad in (labels[:5], labels / 2, np.eye(20), labels.astype(int) - 1):
        np.savez("in.npz", images=GREY, labels=bad)
        assert read().labels is None and "labels" in read().notes[0]


UNAMBIGUOUS = {
    "(N, H, W)": GREY,
    "(N, 1, H, W)": DIGITS,
    "(N, H, W, 1)": GREY[..., None],
    "grey as colour": DIGITS.repeat(3, axis=1),
    "grey as colour, channels last": GREY[..., None].repeat(3, axis=3),
    "Fortran order": np.asfortranarray(GREY),
    "int64": DIGITS.astype(np.int64),
    "big-endian": DIGITS.astype(">u4"),
    "float 0 to 255": DIGITS.astype(np.float32),
    "float 0 to 1": DIGITS / 255,
    "half 0 to 1": (DIGITS / 255).astype(np.float16),
    "float -1 to 1": (DIGITS / 127.5 - 1).astype(np.float32),
    "float with overshoot": (DIGITS / 255 - 1e-6).astype(np.float32),
    "8 bits in 16": DIGITS.astype(np.uint16) * 257,
}


@pytest.mark.parametrize("kind", UNAMBIGUOUS)
def test_ranges_and_layouts_that_are_clear(kind):
    np.save("in.npy", UNAMBIGUOUS[kind])
    np.savez_compressed("in.npz", images=UNAMBIGUOUS[kind])
    for path in ("in.npy", "in.npz"):
        found = read(path)
        assert found.images.dtype == torch.uint8 and found.images.is_contiguous()
        assert (found.images.numpy() == DIGITS).all()
        assert len(found.notes) == (kind[:5] in ("float", "half ", "8 bit"))


def test_colour_stays():
    for array in (COLOUR, COLOUR.transpose(0, 2, 3, 1), COLOUR / 255):
        np.save("in.npy", array)
        assert (load_images(Path("in.npy"), "--images").numpy() == COLOUR).all()


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int8, np.int64, np.float32])
def test_masks_become_black_and_white_with_a_note(kind):
    np.save("in.npy", (DIGITS > 127).astype(kind))
    assert (read("in.npy").images.numpy() == np.where(DIGITS > 127, 255, 0)).all()
    assert len(read("in.npy").notes) == 1


NAN, INF = DIGITS / 255, DIGITS / 255
NAN[3, 0, 4, 4], INF[3, 0, 4, 4] = np.nan, np.inf
AMBIGUOUS = {
    "0 to 16": (DIGITS / 16, "from 0 to"),
    "standardised": ((DIGITS / 255 - 0.1307) / 0.3081, "float64 from -0.4"),
    "around 0": (DIGITS / 255 - 0.5, "float64 from -0.5 to 0.5"),
    "overshoot": (DIGITS / 240, "from 0 to 1.06"),
    "scaled twice": (DIGITS / 255**2, "float64"),
    "all zero": (DIGITS * 0.0, "float64 from 0 to 0"),
    "NaN": (NAN, "NaN or infinity"),
    "infinity": (INF, "NaN or infinity"),
    "negative": (DIGITS.astype(int) - 128, "int64 from -128 to 127"),
    "beyond 255": (DIGITS.astype(int) * 2, "int64 from 0 to 510"),
    "16 bits": (DIGITS.astype(np.uint16) * 256, "16-bit"),
    "complex": (DIGITS * 1j, "complex128", "numbers"),
    "text": (DIGITS.astype(str), "numbers"),
    "objects": (np.array([{}], dtype=object), "Python objects"),
    "records": (np.zeros(9, [("a", int)]), "numbers"),
    "no axis": (np.array(7), "()", "(N, H, W)"),
    "rows": (GREY.reshape(20, -1), "(20, 784)"),
    "nothing": (DIGITS[:0], "(0, 1, 28, 28)"),
    "empty images": (DIGITS[..., :0], "no pixels"),
    "one in colour?": (GREY[:3], "(3, 28, 28)", "in colour"),
    "one in colour, channels last?": (COLOUR[0].transpose(1, 2, 0), "(28, 28, 3)", "in colour"),
    "channels first or last?": (DIGITS[..., :3], "(20, 1, 28, 3)", "first or last"),
    "RGBA": (GREY[..., None].repeat(4, axis=3), "(20, 28, 28, 4)"),
    "film": (DIGITS[None], "(1, 20, 1, 28, 28)"),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused(kind):
    array, *words = AMBIGUOUS[kind]
    np.save("in.npy", array)
    np.savez("in.npz", images=array)
    for path in ("in.npy", "in.npz"):
        refused(path, *words)


def test_nothing_is_allocated_that_a_file_only_claims():
    header = b"\x93NUMPY\1\0\x76\0" + (
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 28, 28)}".ljust(118)
    )
    before = peak_memory()
    Path("in.npy").write_bytes(header + bytes(1000))
    refused("in.npy", "claims")
    Path("in.npz").write_bytes(archive({"images": header}))
    refused("in.npz", "claims")
    Path("in.npy").write_bytes(header.replace(b"1099511627776", b"400000       ") + bytes(1000))
    refused("in.npy", "does not fit its size")
    Path("in.npy").write_bytes(header)
    with open("in.npy", "r+b") as file:  # a file with holes is as large as it likes
        file.truncate(2**40)
    refused("in.npy", "claims")
    with zipfile.ZipFile("in.npz", "w", zipfile.ZIP_DEFLATED) as file:  # a bomb: 512 MiB of zeros
        with file.open("images.npy", "w") as stream:
            stream.write(npy(np.zeros((0, 1024, 1024), np.uint8)).replace(b"(0, ", b"(512, ", 1))
            for _ in range(512):
                stream.write(bytes(2**20))
    refused("in.npz", "claims")
    assert peak_memory() - before < 100 * 2**20


def test_archives_that_are_not_numpys():
    data = bytearray(archive({"images": npy(DIGITS)}))
    data[data.index(b"PK\1\2") + 8] |= 1
    Path("in.npz").write_bytes(data)
    refused("in.npz", "npz: is encrypted")
    with zipfile.ZipFile("in.npz", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("images.npy", npy(DIGITS))
    refused("in.npz", "compressed by a method")
    with pytest.warns(UserWarning), zipfile.ZipFile("in.npz", "w") as file:
        file.writestr("images.npy", npy(DIGITS))
        file.writestr("images.npy", npy(DIGITS))
    refused("in.npz", "two arrays")
    np.savez("in.npz", **{"a/../images": GREY})
    assert len(read().images) == 20


def test_a_file_that_ends_early_or_late_or_is_of_another_version():
    whole = npy(DIGITS.repeat(2, axis=0))  # more than is read for the header
    for data, words in ((whole[:-1], "cut short"), (whole + b"0", "data after its end")):
        with pytest.raises(Refused, match=words):
            read_npy(io.BytesIO(data), len(whole))
    Path("in.npy").write_bytes(whole.replace(b"\1\0", b"\3\0", 1))
    refused("in.npy", ".npy format (3, 0)")


def test_archives_without_arrays():
    for name, words in (("model/data.pkl", "a PyTorch file"), ("a/1.png", "unpack it")):
        with zipfile.ZipFile("in.npz", "w") as file:
            file.writestr(name, b"")
        refused("in.npz", words)
