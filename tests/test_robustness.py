"""What a training run goes through: signals, kills, full disks, bad numbers, a second run."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.diffusion import Diffusion
from tests.conftest import TINY, WITH_PATH, same, shell
from training.denoising import DenoisingTrainer
from training.graphed import GraphedOptimization
from training.guard import locked
from training.optimization import Optimization
from utils.checkpoint import list_checkpoints


def last_checkpoint(name, folder=Path()):
    return torch.load(list_checkpoints(folder / "checkpoints" / name)[-1], weights_only=True)


def wait_for(path, process):
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal\nfrom training.guard import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.received, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=WITH_PATH, capture_output=True, text=True
    )
    assert result.returncode == 128 + signal.SIGINT
    assert result.stdout == f"{int(signal.SIGTERM)}\n"


def test_kill_9_at_any_moment_loses_nothing(own_folder):
    """Four of the kills that `python -m tests.kill 200` makes."""
    code = (
        "from tests.kill import kill_often\n"
        "print(kill_often(kills=4, epochs=4, seconds=0.8), 'hits')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=WITH_PATH, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-2]) >= 1


def test_a_slow_step_saves_and_shows_by_the_clock(cli, monkeypatch):
    """Not at every 50th step alone, which on a slow computer comes after minutes."""
    flags = [*TINY, "--batch_size", 10, "--epochs", 1, "--device", "cpu", "--experiment_name"]
    assert cli("main", *flags, "whole")[0] == 0
    step = DenoisingTrainer.train_step

    def slow(trainer, *given):
        time.sleep(0.02)
        if trainer.optimization.taken == 15:
            raise KeyboardInterrupt
        return step(trainer, *given)

    with monkeypatch.context() as patch:
        patch.setattr(DenoisingTrainer, "train_step", slow)
        patch.setattr("training.loop.SHOW_EVERY", 0.05)
        status, _, stderr = cli("main", *flags, "cut", "--save_every", 0.001)
    assert status == 130 and "loss" in stderr
    assert 8 <= last_checkpoint("cut")["step"] <= 15
    assert cli("main", *flags, "cut")[0] == 0
    one, other = last_checkpoint("whole"), last_checkpoint("cut")
    assert same(one["ema"], other["ema"]) and same(one["optimizers"], other["optimizers"])


def test_two_runs_in_one_folder(cli, refuses):
    Path("checkpoints/a").mkdir(parents=True)
    flags = [*TINY, "--epochs", 1, "--experiment_name", "a"]
    with locked(Path("checkpoints/a")):
        words = ("--experiment_name a", "in use by", f"process {os.getpid()}")
        refuses("main", *flags, words=words)
    assert not list_checkpoints(Path("checkpoints/a"))
    assert cli("main", *flags)[0] == 0
    assert [p.name for p in Path("checkpoints/a").iterdir()] == ["model_epoch_0.pth"]


def test_a_crash_leaves_no_lock_behind(cli, own_folder):
    code = (
        "import os, pathlib\nfrom training.guard import locked\n"
        "pathlib.Path('checkpoints/a').mkdir(parents=True)\n"
        "with locked(pathlib.Path('checkpoints/a')):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=WITH_PATH, cwd=own_folder)
    assert Path("checkpoints/a/.lock").exists()
    assert cli("main", *TINY, "--epochs", 1, "--experiment_name", "a")[0] == 0


def test_a_full_disk_ends_with_a_line_and_the_old_checkpoint(cli, own_folder):
    flags = [*TINY, "--experiment_name", "full", "--keep", 9]
    assert cli("main", *flags, "--epochs", 1)[0] == 0
    before = Path("checkpoints/full/model_epoch_0.pth").read_bytes()
    limit = len(before) - 1000

    def no_large_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = shell("main", *flags, "--epochs", 2, cwd=own_folder, preexec_fn=no_large_files)
    _, stderr = run.communicate()
    assert run.returncode == 2 and "Traceback" not in stderr
    assert "cannot write checkpoints/full/model_epoch_1.pth: File too large" in stderr
    assert [p.name for p in Path("checkpoints/full").iterdir()] == ["model_epoch_0.pth"]
    assert Path("checkpoints/full/model_epoch_0.pth").read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write")
def test_a_read_only_folder(refuses, own_folder):
    Path("checkpoints").symlink_to("/proc")  # even root cannot write there
    refuses("main", *TINY, "--experiment_name", "a", words=("checkpoints/a", "cannot be written"))
    assert [p.name for p in own_folder.iterdir()] == ["checkpoints"]


def spoil(monkeypatch, steps):
    """Make the loss NaN at these steps, counted from 1."""
    loss, calls = Diffusion.loss, []

    def spoilt(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) in steps else 1.0)

    monkeypatch.setattr(Diffusion, "loss", spoilt)


@pytest.fixture(params=[Optimization, GraphedOptimization])
def either_kind(request, monkeypatch):
    """On a CPU too, the step without `if` that a GPU takes."""
    monkeypatch.setattr("training.denoising.Optimization", request.param)


def test_a_step_that_is_not_finite_is_skipped(cli, monkeypatch, either_kind):
    spoil(monkeypatch, {1, 4, 5})
    flags = [*TINY, "--device", "cpu", "--epochs", 2]  # a GPU records the loss and calls it no more
    status, _, stderr = cli("main", *flags, "--experiment_name", "a")
    assert status == 0 and "3 steps skipped" in stderr
    end = last_checkpoint("a")
    assert end["skipped"] == 3 and end["step"] == 8
    assert all(w.isfinite().all() for w in [*end["network"].values(), *end["ema"].values()])
    assert end["optimizers"][0]["state"][0]["step"] == 5


def test_three_of_them_in_a_row_end_the_run(cli, monkeypatch, either_kind):
    flags = [*TINY, "--device", "cpu", "--experiment_name", "a"]
    assert cli("main", *flags, "--epochs", 1)[0] == 0
    before = Path("checkpoints/a/model_epoch_0.pth").read_bytes()
    spoil(monkeypatch, {2, 3, 4})
    words = ("step 8", "not finite", "--lr", "--precision fp32")
    status, _, stderr = cli("main", *flags, "--epochs", 2)
    assert status == 2 and all(word in stderr for word in words) and "Traceback" not in stderr
    assert [p.name for p in Path("checkpoints/a").iterdir()] == ["model_epoch_0.pth"]
    assert Path("checkpoints/a/model_epoch_0.pth").read_bytes() == before


def test_a_run_records_what_ran_it_and_what_was_changed(cli):
    flags = [*TINY, "--experiment_name", "a"]
    assert cli("main", *flags, "--epochs", 1)[0] == 0
    status, stdout, _ = cli("main", *flags, "--epochs", 2, "--save_every", 5, "--deterministic")
    torch.use_deterministic_algorithms(False)
    assert status == 0 and "--epochs 1 -> 2 at step 4" in stdout
    record = json.loads(Path("outputs/a/run.json").read_text())
    assert record["changes"] == [
        "--epochs 1 -> 2 at step 4",
        "--deterministic False -> True at step 4",
        "--save_every 10.0 -> 5.0 at step 4",
    ]
    assert record["config"]["epochs"] == 2
    end = last_checkpoint("a")
    assert end["changes"] == record["changes"]
    assert record["environments"] == end["environments"]
    first, second = end["environments"]
    assert (first["from_step"], second["from_step"]) == (0, 4)
    assert "--deterministic" not in first["command"] and "--deterministic" in second["command"]
    assert {"commit", "date", "hardware", "versions"} <= set(first)


def test_the_same_seed_gives_the_same_weights(cli):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = [*TINY, "--epochs", 2, "--seed", seed, "--experiment_name", name]
        flags += ["--device", "cpu"]
        assert cli("main", *flags)[0] == 0
    a, b, c = (last_checkpoint(name)["ema"] for name in "abc")
    assert same(a, b) and not same(a, c)


def test_leftovers_of_a_cut_write_go(cli):
    Path("checkpoints/a").mkdir(parents=True)
    Path("checkpoints/a/.model_epoch_7.pth.tmp").write_bytes(b"half")
    Path("checkpoints/a/.folder.tmp").mkdir()  # nobody's
    assert cli("main", *TINY, "--epochs", 1, "--experiment_name", "a")[0] == 0
    assert {p.name for p in Path("checkpoints/a").iterdir()} == {"model_epoch_0.pth", ".folder.tmp"}


def test_names_with_spaces_and_names_that_are_no_text(cli):
    flags = [*TINY, "--epochs", 1, "--experiment_name", "my run's"]
    status, stdout, stderr = cli("main", *flags, "--data_dir", os.fsdecode(b"\xff"))
    assert status == 0, stderr
    command = shlex.split(stdout.splitlines()[-1].removeprefix("samples: "))
    assert command[:2] == ["python", "generate.py"]
    assert cli("generate", *command[2:], "--num_samples", 1, "--steps", 1)[0] == 0


def test_compiling_without_a_compiler_is_refused(refuses, own_folder, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "cache")
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CC", "CXX", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    refuses("main", *TINY, "--device", "cpu", "--compile", words=("--compile", "compiler"))
    assert not list(own_folder.glob("[!c]*"))


def test_a_checkpoint_that_lacks_what_training_needs(cli, refuses):
    flags = [*TINY, "--experiment_name", "a", "--epochs"]
    assert cli("main", *flags, 1)[0] == 0
    path = Path("checkpoints/a/model_epoch_0.pth")
    values = torch.load(path, weights_only=True)
    for part in ("optimizers", "history"):
        torch.save({key: value for key, value in values.items() if key != part}, path)
        refuses("main", *flags, 2, words=(f"checkpoint {path}", "damaged", part))
