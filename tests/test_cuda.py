"""What only a GPU can show: the CPU's results there, and the same ones again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from config import TrainConfig
from models import build_model
from sampling.samplers import SAMPLERS
from scoring.features import MNISTFeatures
from tests.conftest import DIGITS, TINY, same
from tests.test_distributed import finish, torchrun
from utils.checkpoint import list_checkpoints
from utils.device import pick_device
from utils.synthetic import synthetic_digits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAIN = [*TINY, "--sample_every", 0, "--keep", 99]


def train(cli, name, *flags):
    """Run main.py; its last checkpoint and what it printed."""
    status, stdout, stderr = cli("main", *TRAIN, *flags, "--experiment_name", name)
    assert status == 0, stderr
    path = list_checkpoints(Path("checkpoints") / name)[-1]
    return torch.load(path, weights_only=True, map_location="cpu"), stdout


@pytest.mark.parametrize("model_type", ["unet", "cnn", "resnet"])
def test_float32_training_gives_the_cpu_s_losses(cli, model_type):
    """Noise is another there, so the losses of 40 steps agree in their mean alone."""
    flags = ["--epochs", 10, "--model_type", model_type, "--precision"]
    cpu, _ = train(cli, "cpu", *flags, "fp32", "--device", "cpu")
    for precision in ("fp32", "tf32", "bf16"):
        gpu, _ = train(cli, precision, *flags, precision, "--device", "cuda")
        assert gpu["device"] == "cuda" and gpu["skipped"] == 0
        assert gpu["history"]["loss"][-1] == pytest.approx(cpu["history"]["loss"][-1], rel=0.1)


@pytest.mark.parametrize("model_type", ["unet", "cnn", "resnet"])
def test_a_float32_network_s_gradients_are_the_cpu_s(model_type):
    cfg = TrainConfig(model_type=model_type, width=16)
    torch.manual_seed(0)
    net = build_model(cfg, DIGITS)
    for p in net.parameters():  # the last layers begin at 0, where nothing before them matters
        torch.nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(8, 1, 28, 28), torch.arange(8.0) * 30, torch.arange(8)
    gradients = []
    for name in ("cpu", "cuda"):
        device = pick_device(name)
        net = net.to(device, memory_format=torch.channels_last)
        net.zero_grad()
        net(x.to(device), t.to(device), y.to(device)).square().mean().backward()
        gradients.append([p.grad.cpu().clone() for p in net.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * ours.norm() + 1e-7


def test_deterministic_runs_are_bitwise_equal_and_resume(cli):
    flags = ["--epochs", 6, "--deterministic", "--device", "cuda"]
    one, _ = train(cli, "one", *flags)
    again, _ = train(cli, "again", *flags)
    train(cli, "resumed", *flags)
    for path in list_checkpoints(Path("checkpoints/resumed"))[3:]:
        path.unlink()
    resumed, stdout = train(cli, "resumed", *flags)
    assert "resuming" in stdout and "step 12" in stdout
    for key in ("network", "ema", "optimizers", "generator", "step"):
        assert same(one[key], again[key]) and same(one[key], resumed[key]), key


def test_compiled_training_is_training(cli):
    eager, _ = train(cli, "eager", "--epochs", 10, "--precision", "fp32")
    compiled, _ = train(cli, "compiled", "--epochs", 10, "--precision", "fp32", "--compile")
    assert eager["network"].keys() == compiled["network"].keys()
    assert compiled["history"]["loss"] == pytest.approx(eager["history"]["loss"], rel=0.02)


def test_checkpoints_move_between_gpu_and_cpu(cli):
    train(cli, "moved", "--epochs", 2, "--device", "cuda")
    there, stdout = train(cli, "moved", "--epochs", 4, "--device", "cpu")
    assert "resuming" in stdout and there["device"] == "cpu" and there["step"] == 16
    back, stdout = train(cli, "moved", "--epochs", 6, "--device", "cuda")
    assert "resuming" in stdout and back["device"] == "cuda" and back["step"] == 24


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_the_cpu_s(cli, tiny_checkpoint, sampler):
    """At float32: at most one grey level apart, in few pixels."""
    flags = ["--checkpoint", tiny_checkpoint(), "--num_samples", 20, "--precision", "fp32"]
    images = {}
    for device in ("cpu", "cuda"):
        more = ["--device", device, "--npz", f"{device}.npz", "--sampler", sampler]
        assert cli("generate", *flags, *more)[0] == 0
        images[device] = np.load(f"{device}.npz")["images"].astype(int)
    apart = np.abs(images["cpu"] - images["cuda"])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_features_are_the_cpu_s():
    images, _ = synthetic_digits(100, seed=3)
    cpu, cuda = MNISTFeatures("cpu")(images), MNISTFeatures("cuda")(images)
    assert (cpu - cuda).abs().max() <= 1e-4 * cpu.abs().max()


def test_torchrun_trains_by_nccl_and_scores(cli, own_folder):
    whole, _ = train(cli, "whole", "--epochs", 3, "--precision", "fp32", "--deterministic")
    command = [*TRAIN, "--epochs", 3, "--precision", "fp32", "--deterministic"]
    finish(torchrun(1, "main", *command, "--experiment_name", "one"))
    path = list_checkpoints(Path("checkpoints/one"))[-1]
    one = torch.load(path, weights_only=True, map_location="cpu")
    assert same(one["ema"], whole["ema"])
    np.savez("real.npz", images=synthetic_digits(300, seed=5)[0].numpy())
    scored = ["--path_to_model", path, "--num_samples", 100, "--reference_images", "real.npz"]
    finish(torchrun(1, "validation", *scored, "--json", "scores.json"))
    assert json.loads(Path("scores.json").read_text())["fid"] > 0
