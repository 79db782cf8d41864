"""What only a GPU can show: the CPU's results there, and the same ones again."""

import copy
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
from tests.test_optimization import CFG, KINDS, assert_close, run, start
from training.denoising import DenoisingTrainer
from training.graphed import GraphedOptimization
from utils.checkpoint import list_checkpoints
from utils.device import pick_device
from utils.graphs import Graphed
from utils.synthetic import synthetic_digits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAIN = [*TINY, "--keep", 99]


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


def test_a_torchrun_of_one_process_trains_and_scores(cli, own_folder):
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


def test_a_recorded_step_is_a_plain_step():
    """Losses, weights, averages, counts, and what the generator has drawn; one step is bad."""
    trainings = [start(kind, pick_device("cuda")) for kind in KINDS]
    plain, recorded = (run(*training, range(30), bad=[9]) for training in trainings)
    assert recorded == pytest.approx(plain, rel=1e-3, nan_ok=True)
    (ours, our_loss), (theirs, their_loss) = trainings
    theirs.check()
    assert (ours.taken, ours.skipped) == (theirs.taken, theirs.skipped) == (29, 1)
    assert_close(theirs, ours, atol=1e-4, rtol=1e-2)
    states = [loss.generator.get_state() for loss in (our_loss, their_loss)]
    assert torch.equal(*states)


def test_recorded_steps_go_on_from_a_checkpoint_as_if_never_left():
    one, loss = start(GraphedOptimization, pick_device("cuda"))
    run(one, loss, range(5), bad=[2])
    state, drawn = copy.deepcopy(one.state()), loss.generator.get_state()
    losses = run(one, loss, range(5, 10))
    two, loss = start(GraphedOptimization, pick_device("cuda"))
    run(two, loss, range(2))  # recorded before the checkpoint is read, which must not matter
    two.load_state(state)
    loss.generator.set_state(drawn)
    assert run(two, loss, range(5, 10)) == pytest.approx(losses, rel=1e-5)


def test_a_recorded_network_is_the_network_and_its_hooks_see_every_call():
    device = pick_device("cuda")
    torch.manual_seed(0)
    net = build_model(CFG, DIGITS).to(device).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    graphed, calls = Graphed(net), []
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    with torch.inference_mode(), torch.autocast("cuda", dtype=torch.bfloat16):
        for size in (4, 8, 4):
            x, t = torch.randn(size, 1, 28, 28, device=device), torch.rand(size, device=device)
            for y in (None, torch.arange(size, device=device)):
                found = graphed(x, t, y).clone()
                torch.testing.assert_close(found, net(x, t, y), atol=1e-2, rtol=1e-2)
    assert calls == [4] * 4 + [8] * 4 + [4] * 4


def test_samples_of_recorded_calls_are_those_of_plain_ones(cli, tiny_checkpoint):
    """Batches of 20 are recorded; of 50, there is only one, and it is not."""
    flags = ["--checkpoint", tiny_checkpoint(), "--num_samples", 50, "--precision", "fp32"]
    for name, size in (("recorded", 20), ("plain", 50)):
        more = ["--device", "cuda", "--npz", f"{name}.npz", "--batch_size", size]
        assert cli("generate", *flags, *more)[0] == 0
    found = [np.load(f"{name}.npz")["images"].astype(int) for name in ("recorded", "plain")]
    assert np.abs(found[0] - found[1]).max() <= 1


@pytest.mark.parametrize("compiled", [[], ["--compile"]])
def test_the_trainer_records_whole_steps(cli, monkeypatch, compiled):
    """Of 40 steps and their loss, Python sees but the first, and what precedes the recording."""
    loss, calls = DenoisingTrainer.loss, []
    monkeypatch.setattr(DenoisingTrainer, "loss", lambda *given: calls.append(1) or loss(*given))
    state, _ = train(cli, "recorded", "--epochs", 10, "--device", "cuda", *compiled)
    assert len(calls) <= 4 and (state["step"], state["taken"]) == (40, 40)


def test_the_speeds_of_a_gpu(cli, tiny_checkpoint):
    flags = ["--batch_sizes", 20, "--times", 3, "--settings", "--width 8 --timesteps 20"]
    drawn = ["--checkpoint", tiny_checkpoint(), "--num_samples", 100, "--batch_size", 20]
    status, stdout, stderr = cli("benchmarks", "gpu", *flags, *drawn)
    rows = [line.strip("| ").split(" | ")[0] for line in stdout.splitlines() if line[:2] == "| "]
    assert status == 0 and rows[2:4] == ["batch 20", "batch 20, --compile"], stderr
    assert rows[-1].endswith(" calls")
    compiled = ["--settings", "--width 8 --batch_size 20 --compile"]
    for settings in ([], compiled):
        status, stdout, stderr = cli("benchmarks", "train", "--profile", *settings)
        assert status == 0 and "| muon |" in stdout and "| the whole step |" in stdout, stderr
