"""Shared by the tests: a folder of their own, the scripts' command lines, a tiny trained model."""

import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import TrainConfig
from models import build_model
from utils import data_loader
from utils.checkpoint import save_checkpoint
from utils.data_loader import DatasetInfo
from utils.script import run

ROOT = Path(__file__).parents[1]
TINY = ["--dataset", "synthetic", "--train_size", 200, "--batch_size", 50, "--width", 8]
TINY += ["--timesteps", 20, "--sample_every", 0]
DIGITS = DatasetInfo("synthetic", 1, 28, 28, tuple("0123456789"), (0.1,) * 10)
WITH_PATH = {**os.environ, "PYTHONPATH": str(ROOT)}


# 20,000 synthetic digits take a second and a half: they are drawn once for all runs in a process
data_loader.synthetic_digits = functools.cache(data_loader.synthetic_digits)


def shell(script, *arguments, **options):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=WITH_PATH, stderr=subprocess.PIPE, text=True, **options)


def save_model(path, cfg, weights, data=DIGITS, **more):
    """Write a checkpoint that can be sampled from."""
    values = {"config": vars(cfg), "data": dataclasses.asdict(data), "sampling": {}}
    save_checkpoint(path, {**values, "ema": weights, **more})


def same(a, b):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, so that nothing of the project's own is touched."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("generate", "--steps", 3) -> (exit status, stdout, stderr), as from the shell."""

    def call(script: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capsys.readouterr()
        module = f"{script}.__main__" if script == "benchmarks" else script
        with pytest.raises(SystemExit) as end:
            run(importlib.import_module(module).main)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def refuses(cli):
    """Check that a command ends in one line on stderr, holding all `words`, and status 2."""

    def check(script: str, *arguments, words: tuple[str, ...] = ()) -> None:
        status, _, stderr = cli(script, *arguments)
        assert status == 2, stderr
        assert stderr.count("\n") == 1 and "Traceback" not in stderr, stderr
        for word in words:
            assert word in stderr, (word, stderr)

    return check


@pytest.fixture
def tiny_checkpoint(own_folder):
    """A function that writes an untrained tiny model and returns its path."""

    def make(name: str = "tiny.pth", data: DatasetInfo = DIGITS, sampling=None, **settings) -> Path:
        cfg = TrainConfig(**{"width": 8, "timesteps": 20, "dataset": data.name, **settings})
        torch.manual_seed(0)
        path = own_folder / name
        save_model(path, cfg, build_model(cfg, data).state_dict(), data, sampling=sampling or {})
        return path

    return make
