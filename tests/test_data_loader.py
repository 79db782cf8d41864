import gzip
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from config import UserError
from tests.conftest import DIGITS
from utils import data_loader
from utils.data_loader import epoch_batches, load_dataset, to_model_range, to_uint8


def write_idx(folder, images, labels, split="train"):
    """The four-file format of MNIST, in the layout that torchvision reads."""
    prefix = {"train": "train", "test": "t10k"}[split]
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">iiii", 2051, *images.shape)
    (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
    header = struct.pack(">ii", 2049, len(labels))
    (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return raw


def tiny(n=20, labels=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=generator)
    return images, torch.arange(n, dtype=torch.uint8) % 10 if labels is None else labels


@pytest.fixture
def mnist(own_folder):
    for split in ("train", "test"):
        write_idx(own_folder, *tiny(), split)
    return own_folder


def test_mnist_files_that_are_there_are_read_without_download(mnist, monkeypatch):
    def no_download(self):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_download)
    for split in ("train", "test"):
        data = load_dataset("mnist", str(mnist), split)
        images, labels = data.images, data.labels
        assert data.info == replace(DIGITS, name="mnist")
        assert images.shape == (20, 1, 28, 28) and images.dtype == torch.uint8
        assert labels.tolist() == list(range(10)) * 2 and labels.dtype == torch.int64
        assert torch.equal(images[:, 0], tiny()[0])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "cifar10"])
def test_a_failed_download_says_what_to_do(refuses, own_folder, monkeypatch, name):
    def cut(self):
        Path(self.root, "half").write_bytes(b"half")
        raise OSError("no network")

    monkeypatch.setattr(data_loader._class(name), "download", cut)
    words = (f"--dataset {name}", "--data_dir", "--dataset synthetic")
    refuses("main", "--dataset", name, "--data_dir", "mistyped/name", words=words)
    if name == "mnist":
        words = ("--data_dir",)
        refuses("scoring.train_classifier", "--data_dir", "mistyped/name", words=words)
    assert not list(own_folder.iterdir())


def test_a_download_completes_what_is_there_and_changes_none_of_it(own_folder, monkeypatch):
    def download(self):
        for split in ("train", "test"):
            write_idx(Path(self.root), *tiny(30), split)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    raw = write_idx(own_folder / "data", *tiny(20))
    (raw / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="corrupt: 30 labels for images"):
        load_dataset("mnist", "data", "train")
    assert len(load_dataset("mnist", "data", "test").images) == 30
    assert len(list(raw.iterdir())) == 4 and [p.name for p in Path("data").iterdir()] == ["MNIST"]


def test_packed_files_are_read_as_they_are(refuses, mnist, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", None)
    whole = load_dataset("mnist", str(mnist), "train")
    for path in (mnist / "MNIST/raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load_dataset("mnist", str(mnist), "train")
    assert torch.equal(whole.images, packed.images) and torch.equal(whole.labels, packed.labels)
    assert len(list((mnist / "MNIST/raw").iterdir())) == 4  # it writes nothing
    path = mnist / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    refuses("main", "--data_dir", mnist, words=(f"--data_dir {mnist}", "corrupt"))


def truncate(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])


def empty(raw):
    (raw / "train-labels-idx1-ubyte").write_bytes(b"")


def bad_magic(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(b"\x00\x00\x09" + path.read_bytes()[3:])


def fewer_labels(raw):
    write_idx(raw.parents[1], tiny()[0], torch.zeros(19, dtype=torch.uint8))


def labels_beyond_nine(raw):
    write_idx(raw.parents[1], tiny()[0], torch.full((20,), 77, dtype=torch.uint8))


def other_size(raw):
    write_idx(raw.parents[1], torch.zeros(20, 27, 27, dtype=torch.uint8), tiny()[1])


@pytest.mark.parametrize(
    "damage", [truncate, empty, bad_magic, fewer_labels, labels_beyond_nine, other_size]
)
def test_corrupt_files_are_refused(refuses, mnist, damage):
    damage(mnist / "MNIST" / "raw")
    refuses("main", "--data_dir", mnist, words=(f"--data_dir {mnist}", "corrupt"))


def test_synthetic_needs_no_files(own_folder):
    test = load_dataset("synthetic", "nowhere", "test")
    images, labels = test.images, test.labels
    assert images.shape == (10_000, 1, 28, 28) and labels.bincount().tolist() == [1000] * 10
    train = load_dataset("synthetic", "nowhere", "train").images
    assert train.shape == (20_000, 1, 28, 28) and not torch.equal(train[:10_000], images)
    assert not list(own_folder.iterdir())


def test_an_epoch_is_a_permutation_fixed_by_seed_and_number():
    def order(seed, epoch):
        return torch.cat(list(epoch_batches(103, 10, seed, epoch)))

    first = order(0, 0)
    assert len(first) == 100 and len(first.unique()) == 100
    assert torch.equal(first, order(0, 0))
    assert not torch.equal(first, order(0, 1)) and not torch.equal(first, order(1, 0))
    dropped = [set(range(103)) - set(order(0, e).tolist()) for e in range(2)]
    assert dropped[0] != dropped[1]


def test_a_batch_larger_than_the_data_is_all_of_it():
    batches = list(epoch_batches(7, 100, 0, 0))
    assert len(batches) == 1 and sorted(batches[0].tolist()) == list(range(7))


def test_ranges_round_trip():
    grey = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(grey)
    assert x[0] == -1 and x[-1] == 1 and x.dtype == torch.float32
    assert torch.equal(to_uint8(x), grey)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("there", [True, False])
def test_a_demonstration_takes_mnist_where_it_can_be_had(cli, monkeypatch, there):
    def load(name, folder, split):
        if not there:
            raise UserError("no network")

    monkeypatch.setattr(data_loader, "load_dataset", load)
    status, stdout, stderr = cli("utils.data_loader")
    assert (status, stdout) == (0, "mnist\n" if there else "synthetic\n")
    assert stderr == ("" if there else "no network\n")
