"""Several processes under torchrun do what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, TINY, WITH_PATH
from utils.checkpoint import list_checkpoints
from utils.synthetic import synthetic_digits

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not Path("/proc/self/task").exists(),
    reason="needs gloo, and Linux to find the processes",
)


def torchrun(ranks, script, *arguments, **options):
    """Start a script as `torchrun` does, on this machine alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(ranks), str(ROOT / f"{script}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{"env": WITH_PATH, **pipes, **options})


def finish(process):
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout


def workers(process):
    """The process numbers of a torchrun's ranks."""
    return list(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )


def wait_for_checkpoint(name, process):
    while process.poll() is None and not list_checkpoints(Path("checkpoints") / name):
        time.sleep(0.01)


def last(name):
    return torch.load(list_checkpoints(Path("checkpoints") / name)[-1], weights_only=True)


LAST_WORDS = """
import atexit, os, pathlib
names = lambda: [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: print("alive at the end:", "".join(names()).split()))
"""


TRAIN = [*TINY, "--precision", "fp32", "--device", "cpu", "--lr", 0.001, "--sample_every", 0]


def test_two_ranks_equal_one_and_checkpoints_move_between_them(cli):
    """20 steps at one global batch: by one, by two, and by two, one and two again."""
    one = [*TRAIN, "--epochs", 5, "--experiment_name", "one", "--keep", 9]
    assert cli("main", *one)[0] == 0
    finish(torchrun(2, "main", *TRAIN, "--epochs", 5, "--experiment_name", "two"))
    start = [*TRAIN, "--experiment_name", "moved", "--keep", 9, "--epochs"]
    run = torchrun(2, "main", *start, 5)
    wait_for_checkpoint("moved", run)
    for worker in workers(run):
        os.kill(worker, signal.SIGTERM)
    run.communicate(timeout=120)
    stopped = last("moved")["step"]
    assert stopped < 20, "it was to be stopped on its way"
    assert "resuming" in cli("main", *start, 5)[1]
    for name in ("two", "moved"):
        a, b = last("one"), last(name)
        assert a["step"] == b["step"] == 20
        for part in ("network", "ema"):
            for key, weight in a[part].items():
                torch.testing.assert_close(b[part][key], weight, atol=2e-5, rtol=1e-4, msg=key)
        assert torch.equal(a["generator"], b["generator"])
    Path("sitecustomize.py").write_text(LAST_WORDS)  # Python imports it first
    env = {**WITH_PATH, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
    stdout = finish(torchrun(2, "main", *start, 6, env=env))
    assert "resuming" in stdout and last("moved")["step"] == 24
    assert stdout.count("alive at the end") == 3 and "gloo" not in stdout  # torchrun's own, too


def test_two_ranks_draw_and_score_what_one_does(cli, tiny_checkpoint):
    path = tiny_checkpoint()
    draw = ["--checkpoint", path, "--num_samples", 35, "--batch_size", 10, "--steps", 4]
    draw += ["--sampler", "ddpm"]
    assert cli("generate", *draw, "--npz", "one.npz")[0] == 0
    stdout = finish(torchrun(2, "generate", *draw, "--npz", "two.npz"))
    assert stdout.count("35 images") == 1  # one of them talks
    one, two = (np.load(f"{name}.npz")["images"] for name in ("one", "two"))
    assert np.array_equal(one, two)
    np.savez("real.npz", images=synthetic_digits(300, seed=5)[0].numpy())
    score = ["--path_to_model", path, "--num_samples", 60, "--batch_size", 10, "--steps", 4]
    score += ["--reference_images", "real.npz", "--seeds", 2, "--floor_draws", 2, "--json"]
    assert cli("validation", *score, "one.json")[0] == 0
    finish(torchrun(2, "validation", *score, "two.json"))
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["fid"] == pytest.approx(two["fid"], rel=1e-6)
    assert one["network_calls"] == two["network_calls"] == 6  # of 4 steps, two are guided


def test_a_rank_that_dies_ends_the_others():
    flags = [*TRAIN, "--epochs", 10_000, "--experiment_name", "a"]
    run = torchrun(2, "main", *flags)
    wait_for_checkpoint("a", run)
    first, second = workers(run)
    os.kill(second, signal.SIGKILL)
    start = time.monotonic()
    run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - start < 45
    assert not Path(f"/proc/{first}").exists()
    assert torch.load(list_checkpoints(Path("checkpoints/a"))[-1], weights_only=True)["step"] > 0


def test_a_batch_that_cannot_be_shared_is_refused():
    run = torchrun(2, "main", *TRAIN, "--batch_size", 49)
    _, stderr = run.communicate(timeout=120)
    line = "main.py: error: --batch_size 49: must be a multiple of the 2 processes"
    assert run.returncode != 0 and stderr.count(line) == 1
