import math

import pytest
import torch

from models.ideal import IdealDenoiser
from sampling.samplers import sample_heun
from utils.noise_scheduler import NoiseSchedule


def images(*values):
    """1 x 1 images in float64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def test_two_points_by_hand():
    """Of -1 and 1 the weights are a logistic function of x, and their mean is tanh(x / sigma^2)."""
    x, sigma = images(-2.0, 0.1, 0.7), torch.tensor(0.8)
    expected = torch.tanh(x / 0.8**2)
    torch.testing.assert_close(IdealDenoiser(images(-1.0, 1.0))(x, sigma), expected)
    # of 0 and 1: distances 0.3^2 and 0.7^2
    near, far = math.exp(-(0.3**2) / (2 * 0.5**2)), math.exp(-(0.7**2) / (2 * 0.5**2))
    got = IdealDenoiser(images(0.0, 1.0))(images(0.3), torch.tensor(0.5))
    assert got.item() == pytest.approx(far / (near + far), rel=1e-12)


def test_much_noise_gives_the_mean_and_none_the_nearest_image():
    train = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ideal = IdealDenoiser(train)
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    mean = train.mean(dim=0).expand_as(noise)
    torch.testing.assert_close(ideal(1e4 * noise, torch.tensor(1e4)), mean, atol=1e-3, rtol=0)
    near = train[[4, 0, 2]] + 0.01 * noise
    torch.testing.assert_close(ideal(near, torch.tensor(0.01)), train[[4, 0, 2]])


def test_samplers_draw_copies_from_it():
    train = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sigmas = NoiseSchedule("cosine", 300).sampling_sigmas(20, "karras")
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    drawn = sample_heun(IdealDenoiser(train), noise * float(sigmas[0]), sigmas, lambda: noise)
    distance = torch.cdist(drawn.flatten(1), train.flatten(1)).amin(dim=1)
    assert distance.max() < 1e-3
