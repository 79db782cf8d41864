"""Distilled networks: how they are sampled, and what is refused."""

import numpy as np
import pytest
import torch

from config import FEW_STEP_SAMPLER, SamplingConfig
from models.trained import load_trained
from sampling.draw import count_evaluated, draws_noise, resolve, sample_images
from sampling.samplers import sample_consistency
from tests.conftest import ROOT
from utils.data_loader import DATASETS

MEAN, SPREAD = 0.3, 0.2
FEW_STEP = {"sampler": FEW_STEP_SAMPLER, "steps": 1, "spacing": "fewstep", "guidance": 1.0}


def ideal(x, sigma):
    """Where the probability flow of data ~ N(MEAN, SPREAD^2) leads from x at sigma."""
    return MEAN + (x - MEAN) * SPREAD / (SPREAD**2 + sigma**2) ** 0.5


@pytest.mark.parametrize("levels", [[80.0], [80.0, 0.5], [80.0, 2.0, 0.3]])
def test_any_number_of_calls_of_the_ideal_function_draws_the_gaussian(levels):
    generator, called = torch.Generator().manual_seed(0), []

    def noise():
        return torch.randn(100_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    def denoise(x, sigma):
        called.append(float(sigma))
        return ideal(x, sigma)

    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    x0 = sample_consistency(denoise, MEAN + 80 * noise(), sigmas, noise)
    assert called == levels
    assert abs(x0.mean() - MEAN) < 3e-3 and abs(x0.std() - SPREAD) < 3e-3


@pytest.fixture
def distilled(tiny_checkpoint):
    """The path of an untrained model that says it was distilled."""
    return tiny_checkpoint("distilled.pth", sampling=FEW_STEP, teacher="teacher.pth")


def test_a_distilled_network_is_called_as_often_as_it_is_asked_to(distilled):
    model = load_trained(distilled, "cpu")
    evaluated = count_evaluated(model.net)
    for steps, calls in ((None, 1), (1, 1), (2, 2), (4, 4)):
        evaluated.clear()
        list(sample_images(model, 5, SamplingConfig(steps=steps), labels=torch.arange(5)))
        assert sum(evaluated) == 5 * calls
    assert not draws_noise(resolve(SamplingConfig(), model))
    assert draws_noise(resolve(SamplingConfig(steps=2), model))


def test_between_two_seeds_one_call_leads_from_image_to_image(cli, distilled):
    flags = ["--checkpoint", distilled, "--label", 3, "--npz", "row.npz"]
    assert cli("generate", *flags, "--interpolate", "3,4", "--num_samples", 5)[0] == 0
    row = np.load("row.npz")["images"].astype(int)
    for image, seed in ((row[0], 3), (row[-1], 4)):
        assert cli("generate", *flags, "--seed", seed, "--num_samples", 1)[0] == 0
        assert np.abs(image - np.load("row.npz")["images"][0]).max() <= 1


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sampler", "ddim"], ("--sampler ddim", "consistency")),
        (["--guidance", "2"], ("--guidance 2", "must be 1")),
        (["--reconstruct", "test"], ("--reconstruct", "distilled")),
        (["--inpaint", "test", "--mask", "left"], ("--inpaint", "distilled")),
        (["--interpolate", "1,2"], ("--interpolate", "give --label")),
        (["--interpolate", "1,2", "--label", "3", "--steps", "2"], ("--steps 2", "must be 1")),
        (["--eta", "0.5"], ("--eta 0.5", "--sampler ddim")),
    ],
)
def test_what_a_distilled_network_cannot_do_is_said_in_a_line(refuses, distilled, flags, words):
    refuses("generate", "--checkpoint", distilled, *flags, words=words)


def test_the_benchmark_of_samplers_has_a_row_for_a_distilled_network(cli, distilled, monkeypatch):
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["synthetic"])
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 100, "test": 100})
    flags = ["--checkpoint", ROOT / "checkpoints/pretrained/cnn.pth", "--distilled", distilled]
    flags += ["--sampler", FEW_STEP_SAMPLER, "--calls", "1,2,8", "--num_samples", 40]
    status, stdout, stderr = cli("benchmarks", "samplers", *flags)
    assert status == 0, stderr
    (row,) = (line for line in stdout.splitlines() if line.startswith("| consistency, distilled"))
    one, two, eight = row.strip("| ").split(" | ")[2:]
    assert float(one) > 0 < float(two) and eight == "-"
