import errno
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from config import TrainConfig, UserError
from models.trained import load_trained
from tests.conftest import DIGITS, ROOT, WITH_PATH, same, save_model
from utils.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
)
from utils.files import writable_folder, write_atomically

KILLER = """
import os, random, time
from pathlib import Path
import torch
from config import TrainConfig
from tests.conftest import save_model
from utils.checkpoint import load_checkpoint, remove_leftovers

torch.set_num_threads(1)  # a fork does not take the thread pool along
path = Path("model_epoch_0.pth")

def save(n):
    save_model(path, TrainConfig(), {"w": torch.full((2_000_000,), float(n))})

save(0)
random.seed(0)
torn = 0
for _ in range(12):
    child = os.fork()
    if child == 0:
        for n in range(1, 10**9):
            save(n)
    while not list(Path().glob(".*.tmp")):  # a write has begun
        pass
    time.sleep(0.01 * random.random())
    os.kill(child, 9)
    os.waitpid(child, 0)
    torn += bool(list(Path().glob(".*.tmp")))
    w = load_checkpoint(path)["ema"]["w"]
    assert (w == w[0]).all()
    remove_leftovers(Path())
print("torn writes:", torn)
"""


def test_kill_9_while_writing_leaves_the_previous_checkpoint(own_folder):
    result = subprocess.run(
        [sys.executable, "-c", KILLER],
        cwd=own_folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split(":")[1]) > 0, "no kill fell inside a write"


def test_a_failed_write_leaves_the_old_file_and_no_other(own_folder, monkeypatch):
    path = own_folder / "a.bin"
    write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(own_folder.iterdir()) == [path]


def test_processes_that_write_one_file_do_not_disturb_each_other(own_folder):
    code = (
        "from pathlib import Path\nfrom utils.files import write_atomically\n"
        "for _ in range(100): write_atomically(Path('a.bin'), b'x' * 100_000)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code], env=WITH_PATH, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for writer in writers:
        _, stderr = writer.communicate(timeout=100)
        assert writer.returncode == 0, stderr
    assert [path.name for path in own_folder.iterdir()] == ["a.bin"]
    assert Path("a.bin").read_bytes() == b"x" * 100_000


def test_a_folder_that_cannot_be(own_folder):
    (own_folder / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        writable_folder(own_folder / "file" / "below")


def test_checkpoints_are_ordered_by_number_and_pruned_from_the_first(own_folder):
    for n in (2, 10, 9, 1, 7):
        (own_folder / f"model_epoch_{n}.pth").touch()
    (own_folder / "notes.txt").touch()
    prune_checkpoints(own_folder, keep=2)
    assert [p.name for p in list_checkpoints(own_folder)] == [
        "model_epoch_9.pth",
        "model_epoch_10.pth",
    ]
    assert (own_folder / "notes.txt").exists()


def damaged(path, how):
    data = path.read_bytes()
    values = torch.load(path, weights_only=True)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "text":
        path.write_text("hello")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"format": subprocess.run}))
    elif how == "tensor":
        torch.save(torch.zeros(3), path)
    elif how == "other dict":
        torch.save({"model": 1}, path)
    elif how == "version":
        torch.save({**values, "version": 99}, path)
    elif how == "no ema":
        values.pop("ema")
        torch.save(values, path)
    elif how == "ema of another kind":
        torch.save({**values, "ema": 3}, path)
    elif how == "ema of numbers":
        torch.save({**values, "ema": {"w": 3}}, path)
    elif how == "config of another version":
        torch.save({**values, "config": {"colour": 1}}, path)
    elif how == "weights of another shape":
        torch.save({**values, "ema": {k: v[:1] for k, v in values["ema"].items()}}, path)


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "empty",
        "truncated",
        "text",
        "pickle",
        "tensor",
        "other dict",
        "version",
        "no ema",
        "ema of another kind",
        "ema of numbers",
        "config of another version",
        "weights of another shape",
    ],
)
def test_bad_checkpoints_are_refused_with_a_line(refuses, tiny_checkpoint, how):
    path = tiny_checkpoint()
    damaged(path, how)
    refuses("generate", "--checkpoint", path, words=(f"--checkpoint {path}",))
    refuses("validation", "--path_to_model", path, words=(f"--path_to_model {path}",))


def test_a_file_that_torch_would_read_wrongly_is_refused(tiny_checkpoint):
    """It compares no checksum, and believes what an archive says of its sizes."""
    path = tiny_checkpoint()
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile("small.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    where = data.index(parts[largest.filename])
    data[where + largest.file_size // 2] ^= 1
    Path("flipped.pth").write_bytes(data)
    for name in ("small.pth", "flipped.pth"):
        torch.load(name, weights_only=True)
        with pytest.raises(UserError, match=f"--checkpoint {name}: not a checkpoint, or a damaged"):
            load_checkpoint(Path(name))


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_no_code_of_a_checkpoint_runs():
    save_model(Path("a.pth"), TrainConfig(), {}, note=Trap())
    with pytest.raises(UserError, match="--checkpoint a.pth: not a checkpoint, or a damaged one"):
        load_checkpoint(Path("a.pth"))
    assert not Path("sprung").exists()


@pytest.mark.parametrize("sampling", [{"colour": 1}, {"steps": 0}, {"sampler": "magic"}, None])
def test_a_way_of_sampling_that_is_none_is_refused(tiny_checkpoint, sampling):
    path = tiny_checkpoint()
    torch.save({**torch.load(path, weights_only=True), "sampling": sampling}, path)
    with pytest.raises(UserError, match=f"--checkpoint {path}: damaged checkpoint: "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "weight, words",
    [
        (torch.tensor([1.0, float("nan")]), "b is not finite"),
        (torch.ones(2, dtype=torch.int64), "not what they should be"),
        (torch.ones(2).to_sparse(), "not what they should be"),
        (torch.ones(1).expand(10**6), "not what they should be"),
        ([1.0, 2.0], "must hold tensors by name"),
    ],
)
def test_weights_that_cannot_be_are_refused(weight, words):
    save_model(Path("a.pth"), TrainConfig(), {"a": torch.ones(3), "b": weight})
    with pytest.raises(UserError, match=f"--checkpoint a.pth: damaged checkpoint: .*{words}"):
        load_checkpoint(Path("a.pth"))


def test_a_checkpoint_comes_back_as_it_was(own_folder):
    cfg = TrainConfig(model_type="cnn", max_minutes=2.5)
    weights = {"w": torch.randn(5)}
    save_model(own_folder / "a.pth", cfg, weights, step=7)
    loaded = load_checkpoint(own_folder / "a.pth")
    assert loaded["config"] == cfg and loaded["step"] == 7 and loaded["data"] == DIGITS
    assert torch.equal(loaded["ema"]["w"], weights["w"])


def test_export_keeps_what_sampling_needs(cli, refuses, own_folder, tiny_checkpoint):
    Path("run").mkdir()
    own = {"data_dir": "/home/me", "test_dir": "/home/me/test", "teacher": "/home/me/unet.pth"}
    values = torch.load(tiny_checkpoint(**own), weights_only=True)
    for epoch in (9, 10):
        weights = {name: torch.full_like(w, epoch) for name, w in values["ema"].items()}
        torch.save(
            {**values, "ema": weights, "optimizers": {"big": 1}}, f"run/model_epoch_{epoch}.pth"
        )
    status, _, _ = cli("utils.checkpoint", "run", "out.pth")  # a folder is its last checkpoint
    assert status == 0
    whole = Path("out.pth").read_bytes()
    assert cli("utils.checkpoint", "run/model_epoch_10.pth", "out.pth")[0] == 0
    assert Path("out.pth").read_bytes() == whole
    small = torch.load(own_folder / "out.pth", weights_only=True)
    assert set(small) == {"format", "version", "config", "data", "sampling", "ema"}
    assert small["config"]["data_dir"] == "./data" and small["config"]["test_dir"] is None
    assert small["config"]["teacher"] == "unet.pth"
    assert all((weight == 10).all() for weight in small["ema"].values())
    assert {weight.dtype for weight in small["ema"].values()} == {torch.float16}
    assert cli("utils.checkpoint", "run", "out.pth", "--guidance", 1, "--steps", 9)[0] == 0
    assert load_checkpoint(Path("out.pth"))["sampling"] == {"guidance": 1, "steps": 9}
    for flag, value in (("--steps", 21), ("--guidance", 2), ("--churn", 3)):  # T is 20; distilled
        refuses("utils.checkpoint", "run", "new.pth", flag, value, words=(f"{flag} {value}",))
    assert not Path("new.pth").exists()
    assert cli("utils.checkpoint")[0] == 2
    kept = Path("run/model_epoch_10.pth").read_bytes()
    refuses("utils.checkpoint", "run", "run/model_epoch_10.pth", words=("is the file to read",))
    assert Path("run/model_epoch_10.pth").read_bytes() == kept


def test_version_1_still_loads(cli, tiny_checkpoint):
    """It had neither data nor sampling, and the labels' shares among the weights."""
    path = tiny_checkpoint(data=replace(DIGITS, label_shares=(0.0, 1.0) + (0.0,) * 8))
    values = torch.load(path, weights_only=True)
    new = load_trained(path, "cpu")
    shares = torch.tensor(values.pop("data")["label_shares"])
    del values["sampling"]
    values |= {"version": 1, "network": {"condition.label_shares": shares}}
    torch.save(values, path)  # as of a network that was told no labels, it has no shares
    assert load_checkpoint(path)["data"].label_shares == pytest.approx((0.1,) * 10)
    values["ema"] = {**values["ema"], "condition.label_shares": shares}
    torch.save(values, path)
    assert load_checkpoint(path)["network"] == {}
    old = load_trained(path, "cpu")
    assert old.data == new.data and old.sampling == {} and old.config == new.config
    assert same(old.net.state_dict(), new.net.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 2},
        {"height": 10**6},
        {"height": 30},
        {"label_shares": [0.1] * 9},
        {"label_shares": [-1.0] + [0.1] * 9},
        {"name": "faces"},
        {"colour": 1},
    ],
)
def test_facts_that_make_no_sense_are_refused(refuses, tiny_checkpoint, change):
    path = tiny_checkpoint()
    values = torch.load(path, weights_only=True)
    torch.save({**values, "data": {**values["data"], **change}}, path)
    refuses("generate", "--checkpoint", path, words=(f"--checkpoint {path}", "damaged"))


def test_a_checkpoint_that_may_not_be_read(tiny_checkpoint, monkeypatch):
    def denied(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tiny_checkpoint()
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        load_checkpoint(path)
