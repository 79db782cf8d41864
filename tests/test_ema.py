import pytest
import torch
from torch import nn

from training.ema import EMA, power_exponent


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_profile_has_the_width_asked_for(length):
    gamma = power_exponent(length)
    t = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    weight = t**gamma / (t**gamma).sum()
    mean = (weight * t).sum()
    assert (weight * (t - mean) ** 2).sum().sqrt().item() == pytest.approx(length, rel=1e-3)


def scalar(value):
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, value)
    return net


def test_the_first_step_leaves_nothing_of_the_start():
    ema = EMA(scalar(1e6), 0.1)
    ema.update(scalar(2.0), step=1)
    assert ema.model.weight.item() == 2.0


def test_the_average_is_the_power_weighted_mean_of_the_past():
    net, ema = scalar(0.0), EMA(scalar(0.0), 0.1)
    values = torch.randn(400, dtype=torch.float64)
    for step, value in enumerate(values, start=1):
        nn.init.constant_(net.weight, value)
        ema.update(net, step)
    t = torch.arange(1, 401, dtype=torch.float64)
    power = power_exponent(0.1) + 1
    weight = (t / 400) ** power - ((t - 1) / 400) ** power  # the integral of t^gamma over a step
    assert ema.model.weight.item() == pytest.approx((weight * values).sum().item(), abs=1e-5)
    assert not ema.model.weight.requires_grad and not ema.model.training


def test_a_constant_target_leaves_the_product_of_decays():
    ema = EMA(scalar(1.0), 0.1)
    for step in range(101, 151):
        ema.update(scalar(0.0), step)
    kept = (100 / 150) ** (power_exponent(0.1) + 1)
    assert ema.model.weight.item() == pytest.approx(kept, rel=1e-4)


def test_the_update_on_the_device_is_the_update():
    """With the step's number and what was found as scalars of a tensor."""
    ours, theirs, net = EMA(scalar(5.0), 0.1), EMA(scalar(5.0), 0.1), scalar(0.0)
    good, bad = torch.zeros(()), torch.ones(())
    ours.update_unless(bad, scalar(7.0), torch.tensor(0.0, dtype=torch.float64))
    assert ours.model.weight.item() == 5.0
    for step in range(1, 101):
        nn.init.constant_(net.weight, float(step) ** 0.5)
        number = torch.tensor(step, dtype=torch.float64)
        ours.update_unless(good, net, number)
        ours.update_unless(bad, scalar(1e6), number)
        theirs.update(net, step)
        assert ours.model.weight.item() == pytest.approx(theirs.model.weight.item(), rel=1e-5)
