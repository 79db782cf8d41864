"""Kill a training run again and again, and see that nothing is lost: `python -m tests.kill 200`.

Each time a child process trains on, from what the last one has left, and dies by SIGKILL at a
random moment. It saves every 60 ms, at whatever step that is. In the end the weights must be, bit
by bit, those of a run that nobody disturbed.
"""

import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from config import TrainConfig
from training.denoising import DenoisingTrainer
from training.loop import train
from utils.checkpoint import list_checkpoints, load_checkpoint
from utils.data_loader import Dataset, load_dataset

SETTINGS = {"dataset": "synthetic", "train_size": 200, "batch_size": 20, "width": 8}
SETTINGS |= {"timesteps": 20, "device": "cpu", "sample_every": 0, "save_every": 1e-3, "keep": 2}


def train_quietly(cfg: TrainConfig, data: Dataset) -> None:
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        train(DenoisingTrainer(cfg, data.info, torch.device("cpu")), data)


def child(cfg: TrainConfig, data: Dataset) -> int:
    """Train in a process of its own; its number."""
    pid = os.fork()
    if pid == 0:
        try:
            train_quietly(cfg, data)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return pid


def final_weights(name: str) -> dict:
    checkpoint = load_checkpoint(list_checkpoints(Path("checkpoints") / name)[-1])
    return {**checkpoint["network"], **{f"ema.{k}": v for k, v in checkpoint["ema"].items()}}


def kill_often(kills: int, epochs: int, seconds: float) -> int:
    """Train in the current folder, dying every 0 to `seconds`; how many kills hit a running child.

    Raises AssertionError where a run could not go on, or where its weights differ in the end.
    """
    torch.set_num_threads(1)  # a fork does not take the thread pool along
    cfg = TrainConfig(**SETTINGS, epochs=epochs, experiment_name="killed")
    data = load_dataset(cfg.dataset, cfg.data_dir, "train", limit=cfg.train_size)
    # here, so that no child spends its time importing what training needs
    train_quietly(dataclasses.replace(cfg, experiment_name="undisturbed"), data)
    rng, hit = random.Random(0), 0
    for _ in range(kills):
        pid = child(cfg, data)
        time.sleep(seconds * rng.random())
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status), "a run could not go on"
        hit += os.WIFSIGNALED(status)
    assert os.waitpid(child(cfg, data), 0)[1] == 0, "the run could not be finished"
    one, other = final_weights("undisturbed"), final_weights("killed")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    return hit


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.monotonic()
        hit = kill_often(count, epochs=count, seconds=2.0)
        steps = load_checkpoint(list_checkpoints(Path("checkpoints/killed"))[-1])["step"]
    print(
        f"{hit} of {count} kills hit a running process; resumed each time, and after {steps} steps"
        f" the weights are bitwise those of an undisturbed run; {time.monotonic() - start:.0f} s"
    )
