"""On a Gaussian, the ideal consistency function and the ideal scores are known in closed form."""

import pytest
import torch
from torch import nn

from config import TrainConfig
from models import MODELS, build_model
from models.diffusion import Diffusion
from tests.conftest import DIGITS
from training import distillation as K
from utils.noise_scheduler import NoiseSchedule

MEAN, SPREAD = 0.3, 0.2
DIFFUSION = Diffusion(NoiseSchedule("cosine", 300), "v")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=gen(seed), dtype=torch.float64)


def posterior_mean(x, sigma, mean=MEAN, spread=SPREAD):
    return (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)


def ideal(x, sigma):
    """Where the probability flow leads from x at sigma."""
    return MEAN + (x - MEAN) * SPREAD / (SPREAD**2 + sigma**2) ** 0.5


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_without_noise_an_image_is_its_own(prediction):
    diffusion = Diffusion(NoiseSchedule("cosine", 300), prediction)

    class Any(nn.Module):
        def forward(self, x, t, y=None):
            return torch.full_like(x, 7.0)

    x = randn(4, 1, 2, 2).float()
    assert torch.equal(diffusion.x0_hat(Any(), x, torch.zeros(4).double(), None), x)


def test_each_image_is_denoised_at_its_own_level():
    class Layered(nn.Module):
        def forward(self, x, t, y=None):
            return x * K.column(t) / 300

    net, x = Layered(), randn(3, 1, 2, 2).float()
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    together = DIFFUSION.x0_hat(net, x, sigma, None)
    for k in range(3):
        alone = DIFFUSION.denoiser(net)(x[k : k + 1], sigma[k])
        torch.testing.assert_close(together[k : k + 1].clamp(-1, 1), alone)


def test_the_lower_level_is_lower_and_reaches_zero_first_at_low_levels():
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0, 6000.0], dtype=torch.float64)
    for q in (2.0, 8.0, 64.0):
        lower = K.lower_level(sigma, q)
        assert (lower >= 0).all() and (lower < sigma).all()
    assert K.lower_level(sigma, 4.0)[0] == 0 < K.lower_level(sigma, 4.0)[4]
    assert K.lower_level(sigma, 8.0)[-1] == 0.875 * K.SIGMA_CAP


def test_on_one_path_the_ideal_function_has_no_loss():
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    lower = K.lower_level(sigma, 64.0)
    x = MEAN + randn(3, 1, 4, 4)
    ratio = ((SPREAD**2 + lower**2) / (SPREAD**2 + sigma**2)).sqrt()
    below = MEAN + (x - MEAN) * K.column(ratio)  # the probability flow, solved exactly
    loss = K.consistency_loss(
        ideal(x, K.column(sigma)), ideal(below, K.column(lower)), sigma, lower
    )
    assert loss.abs().max() < 1e-12


def test_the_same_noise_at_two_levels_trains_towards_the_ideal_function():
    """Its slope vanishes with the gap at the ideal function, and elsewhere leads there.

    Of functions that leave an image without noise as it is, as networks do.
    """
    count, sigma = 400_000, torch.tensor(0.5, dtype=torch.float64)
    x0, eps = MEAN + SPREAD * randn(count), randn(count, seed=1)

    def image(theta, level):
        shrink = SPREAD / (SPREAD**2 + level**2) ** 0.5
        return MEAN + (x0 + level * eps - MEAN) * shrink**theta  # theta 1 is the ideal function

    def slope(theta, gap):
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        lower = sigma * (1 - gap)
        images = (image(theta, sigma), image(theta.detach(), lower))
        images = (values.view(count, 1, 1, 1) for values in images)
        levels = (level.expand(count) for level in (sigma, lower))
        K.consistency_loss(*images, *levels).mean().backward()
        return theta.grad.item()

    fine, coarse = abs(slope(1.0, 0.02)), abs(slope(1.0, 0.3))
    assert fine < 0.15 * coarse
    assert slope(0.8, 0.02) < -10 * fine and slope(1.25, 0.02) > 10 * fine


def test_what_a_clamp_undoes_is_no_error():
    one = torch.ones(1, dtype=torch.float64)
    black, grey = -torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -0.9)
    white = -black
    assert K.consistency_loss(black - 0.5, black, one, 0.5 * one) == 0
    assert K.consistency_loss(black + 0.5, black, one, 0.5 * one) > 0
    assert K.consistency_loss(black - 0.5, grey, one, 0.5 * one) > 0
    assert K.consistency_loss(white + 0.5, white, one, 0.5 * one) > 0


def test_nothing_moves_where_fake_and_teacher_agree():
    x = randn(5, 1, 2, 2)
    teacher, fake = (posterior_mean(x + randn(5, 1, 2, 2, seed=1), 0.7) for _ in range(2))
    assert torch.equal(K.distribution_gradient(x, teacher, fake), torch.zeros_like(x))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_the_gradient_on_shifted_images_is_the_closed_form(sigma):
    """Images of mean MEAN + shift: it pulls them back along the shift."""
    shift, keep = 0.25, SPREAD**2 / (SPREAD**2 + sigma**2)
    x = MEAN + shift + SPREAD * randn(64, 1, 4, 4)
    noised = x + sigma * randn(64, 1, 4, 4, seed=1)
    teacher = posterior_mean(noised, sigma)
    fake = posterior_mean(noised, sigma, mean=MEAN + shift)
    weight = 1 / (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
    gradient = K.distribution_gradient(x, teacher, fake)
    torch.testing.assert_close(gradient, (1 - keep) * shift * weight.expand_as(x))


def test_the_critic_is_content_with_a_margin():
    real, made = [torch.tensor([1.5, 2.0])], [torch.tensor([-1.0, -3.0])]
    assert K.hinge(real, made) == 0
    assert K.hinge(made, real) == 3 + 2.75
    assert K.hinge([*real, *made], [*made, *real]) == (3 + 2.75) / 2  # each map counts alike


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("labels", [True, False])
def test_a_critic_sees_an_image_through_any_network(model_type, labels):
    cfg = TrainConfig(model_type=model_type, width=8, class_conditional=labels)
    net = build_model(cfg, DIGITS).requires_grad_(False)
    x, t = torch.randn(3, 1, 28, 28, generator=gen()).requires_grad_(), torch.arange(3.0)
    with net.watched() as maps:
        alone = net(x, t)
    assert len(maps) == 4 and torch.equal(net(x, t), alone) and len(maps) == 4
    critic = K.Critic([values.shape[1] for values in maps])
    opinions = critic(maps, torch.tensor([True, False, True]))
    assert [o.shape for o in opinions] == [(3, 1, *m.shape[2:]) for m in maps]
    sum(o.sum() for o in opinions).backward()
    assert (x.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    with torch.no_grad():
        for embedding in critic.call:
            embedding.weight[1] = 1.0
        told, untold = (critic(maps, torch.tensor(s)) for s in ([True, False, True], [False] * 3))
    for a, b in zip(told, untold, strict=True):  # it knows which call it judges
        assert ((a - b).abs().amax(dim=(1, 2, 3)) > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("labels", [True, False])
def test_a_fake_starts_as_the_teacher_and_tells_calls_apart(labels):
    cfg = TrainConfig(width=8, class_conditional=labels)
    net = build_model(cfg, DIGITS)
    for p in net.parameters():  # some start at zero: then nothing depends on the label
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(3, 1, 28, 28, generator=gen()), torch.arange(3.0)
    y = torch.tensor([0, 9, 10]) if labels else None
    before, own = net(x, t, y), torch.zeros(3).long() if y is None else y
    net.tell_apart(2)
    for call in (0, 1):
        torch.testing.assert_close(net(x, t, own + call * (net.num_classes + 1)), before)
    net(x, t, own + net.num_classes + 1).sum().backward()
    touched = net.condition.label.weight.grad.abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == ([11, 20, 21] if labels else [1])


def test_at_black_only_strong_pulls_pass_and_at_white_all():
    raw = torch.tensor([0.0, 1.5, 1.5, -1.5, -1.5, -1.5]).view(1, 1, 1, 6)
    gradient = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1, -9.0]).view(1, 1, 1, 6)
    passed = K.through_clamp(gradient, raw).flatten() != 0
    assert passed.tolist() == [True, True, True, False, False, True]


def test_unit_gradients_have_unit_size():
    assert abs(K.unit(5 * randn(3, 1, 4, 4)).square().mean() - 1) < 1e-12
    assert K.unit(torch.zeros(2)).abs().max() == 0


def test_a_pull_has_the_gradient_it_is_given():
    raw, gradient = randn(2, 1, 4, 4).requires_grad_(), randn(2, 1, 4, 4, seed=1)
    K.pull(raw, gradient).backward()
    torch.testing.assert_close(raw.grad, gradient / raw.numel())


def test_the_highest_levels_count_as_much_as_their_cap():
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    lower = torch.tensor([87.5])
    losses = [K.consistency_loss(one, zero, torch.tensor([s]), lower) for s in (100.0, 6000.0)]
    assert losses[0] == losses[1]
