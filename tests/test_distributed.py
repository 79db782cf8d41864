"""Several processes under torchrun do what one does."""

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig, UserError
from tests.conftest import DIGITS, ROOT, TINY, WITH_PATH
from tests.processes import ranks
from tests.test_data_loader import tiny, write_idx
from training.denoising import DenoisingTrainer
from training.loop import Run
from utils import distributed
from utils.checkpoint import list_checkpoints
from utils.data_loader import to_model_range
from utils.device import pick_device
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
    """The process numbers of a torchrun's ranks, the first one's first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()

    def rank(number):
        return int(re.search(r"\0RANK=(\d+)", Path(f"/proc/{number}/environ").read_text())[1])

    return sorted(map(int, children), key=rank)


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


TRAIN = [*TINY, "--precision", "fp32", "--device", "cpu", "--lr", 0.001]


def test_two_ranks_equal_one_and_checkpoints_move_between_them(cli):
    """20 steps at one global batch: by one, and by two, one and two again."""
    one = [*TRAIN, "--epochs", 5, "--experiment_name", "one", "--keep", 9]
    assert cli("main", *one)[0] == 0
    start = [*TRAIN, "--experiment_name", "moved", "--keep", 9, "--epochs"]
    Path("sitecustomize.py").write_text(LAST_WORDS)  # Python imports it first
    env = {**WITH_PATH, "PYTHONPATH": f"{ROOT}:{Path.cwd()}"}
    run = torchrun(2, "main", *start, 5, env=env)
    wait_for_checkpoint("moved", run)
    os.kill(workers(run)[1], signal.SIGTERM)  # and the first, which writes, hears of it
    stdout, _ = run.communicate(timeout=120)
    assert "stopped: checkpoints/moved" in stdout
    assert stdout.count("alive at the end") == 3 and "gloo" not in stdout  # torchrun's own, too
    assert last("moved")["step"] < 20, "it was to be stopped on its way"
    assert "resuming" in cli("main", *start, 5)[1]
    a, b = last("one"), last("moved")
    assert a["step"] == b["step"] == 20
    for part in ("network", "ema"):
        for key, weight in a[part].items():
            torch.testing.assert_close(b[part][key], weight, atol=2e-5, rtol=1e-4, msg=key)
    assert torch.equal(a["generator"], b["generator"])
    assert "resuming" in ranks(2, "main", *start, 6) and last("moved")["step"] == 24


def test_two_ranks_draw_and_score_what_one_does(cli, tiny_checkpoint):
    path = tiny_checkpoint()
    draw = ["--checkpoint", path, "--num_samples", 35, "--batch_size", 10, "--steps", 4]
    draw += ["--sampler", "ddpm", "--device", "cpu"]
    assert cli("generate", *draw, "--npz", "one.npz")[0] == 0
    stdout = ranks(2, "generate", *draw, "--npz", "two.npz")
    assert stdout.count("35 images") == 1  # one of them talks
    one, two = (np.load(f"{name}.npz")["images"] for name in ("one", "two"))
    assert np.array_equal(one, two)
    np.savez("real.npz", images=synthetic_digits(300, seed=5)[0].numpy())
    score = ["--path_to_model", path, "--num_samples", 60, "--batch_size", 10, "--steps", 4]
    score += ["--device", "cpu"]
    score += ["--reference_images", "real.npz", "--seeds", 2, "--floor_draws", 2, "--json"]
    assert cli("validation", *score, "one.json")[0] == 0
    ranks(2, "validation", *score, "two.json")
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


class SlowMirror(ThreadingHTTPServer):
    """Serves `files`, each a while after it was asked for; `asked` are their names."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), SlowMirrorHandler)
        self.files, self.asked = files, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class SlowMirrorHandler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        content = self.server.files[self.path[1:]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return content

    def do_GET(self):
        self.server.asked.append(self.path[1:])
        time.sleep(0.3)
        self.wfile.write(self.do_HEAD())

    def log_message(self, *arguments):
        pass


MIRROR = """
from torchvision.datasets import MNIST
MNIST.mirrors, MNIST.resources = ["http://127.0.0.1:{}/"], {}
os.environ["no_proxy"] = "127.0.0.1"
"""


def test_one_of_two_processes_downloads_the_data():
    for split in ("train", "test"):
        raw = write_idx(Path("original"), *tiny(60), split)
    files = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in raw.iterdir()}
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
    with SlowMirror(files) as mirror:
        flags = ["--batch_size", 20, "--width", 8, "--timesteps", 20, "--epochs", 1]
        flags += ["--device", "cpu", "--experiment_name", "a"]
        ranks(2, "main", *flags, first=MIRROR.format(mirror.server_port, sums))
        mirror.shutdown()
    assert set(mirror.asked) == set(files)
    assert len(mirror.asked) <= 2 * len(files)  # torchvision first asks where a file really is
    assert last("a")["step"] == 3 and last("a")["config"]["dataset"] == "mnist"


FAILING = """
import torch
from config import UserError
from utils import distributed
from utils.script import run

def main():
    with distributed.joined(torch.device("cpu")):
        if distributed.rank() == 1:
            raise UserError("--flag: bad")
        distributed.total(1)  # never comes about

run(main)
"""


def test_an_error_of_any_process_is_told_once():
    Path("failing.py").write_text(FAILING)
    run = torchrun(3, Path("failing").absolute())
    _, stderr = run.communicate(timeout=60)
    assert run.returncode != 0 and stderr.count("failing.py: error: --flag: bad\n") == 1
    assert "RuntimeError" not in stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE=2", "without RANK", "MASTER_ADDR", "torchrun")),
        ({"RANK": "1"}, ("RANK=1", "without WORLD_SIZE")),
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE=two", "number")),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, ("LOCAL_RANK=-1",)),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE=0 without RANK",)),
    ],
)
def test_half_of_what_torchrun_sets_is_refused(
    refuses, tiny_checkpoint, monkeypatch, variables, words
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refuses("generate", "--checkpoint", tiny_checkpoint(), words=words)


def test_a_batch_that_cannot_be_shared_is_refused(own_folder, monkeypatch):
    cfg = TrainConfig(width=8, batch_size=49)
    trainer = DenoisingTrainer(cfg, DIGITS, torch.device("cpu"))
    monkeypatch.setattr(distributed, "size", lambda: 2)
    line = "--batch_size 49: must be a multiple of 2, the number of processes"
    with pytest.raises(UserError, match=line):
        Run(trainer, 200, Path("checkpoints"))


@pytest.fixture(params=["cpu", "cuda"])
def group_of_one(request, monkeypatch):
    """The device of a process that is a group by itself: what it sends, gloo or NCCL takes."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    device = pick_device(request.param)
    with distributed.group(device):
        yield device


def test_each_kind_of_message_arrives(group_of_one, monkeypatch):
    """From this process to itself: numbers by the CPU, tensors from where they are."""
    assert ("cuda:nccl" in dist.get_backend_config()) == (group_of_one.type == "cuda")
    sent, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(
        dist, "all_reduce", lambda x, *how: sent.append(x.device.type) or all_reduce(x, *how)
    )
    tensors = [torch.full((2, 3), 5.0, device=group_of_one), torch.ones(1, device=group_of_one)]
    distributed.average(tensors)
    assert [x.flatten().tolist() for x in tensors] == [[5.0] * 6, [1.0]]
    assert distributed.mean(tensors[0]).mean() == 5
    assert distributed.total(2.5) == 2.5 and distributed.largest(0.5, 15) == [0.5, 15.0]
    assert sent == [group_of_one.type] * 2 + ["cpu"] * 2
    assert distributed.of_first({"path": [Path("a")]}) == {"path": [Path("a")]}
    assert [x.tolist() for x in distributed.interleave([torch.ones(1)])] == [[1.0]]


def test_gradients_that_processes_share_are_those_of_one(group_of_one, monkeypatch):
    cfg = TrainConfig(width=8, timesteps=20, precision="fp32", batch_size=20)
    images, labels = (x.to(group_of_one) for x in synthetic_digits(20, seed=1))
    gradients = []
    for several in (2, 1):
        with monkeypatch.context() as patch:  # for now, there seem to be others
            patch.setattr(distributed, "size", lambda: 2)
            trainer = DenoisingTrainer(cfg, DIGITS, group_of_one)
        assert isinstance(trainer.called, DistributedDataParallel)
        if several == 1:
            trainer.called = trainer.net
        torch.manual_seed(0)
        for p in trainer.net.parameters():  # the last layers begin at 0: nothing before them learns
            torch.nn.init.normal_(p, std=0.05)
        trainer.loss(to_model_range(images), labels).backward()
        gradients.append({name: p.grad for name, p in trainer.net.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient.norm() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-6, rtol=1e-3, msg=name)
