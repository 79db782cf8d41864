import math

import pytest
import torch

from utils.noise_scheduler import ALPHA_BARS as SCHEDULES
from utils.noise_scheduler import FEW_STEP_LEVELS, SIGMA_START, SPACINGS, NoiseSchedule


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 3, 10, 300, 1000])
def test_alpha_bar_falls_from_clean_to_noise(name, timesteps):
    schedule = NoiseSchedule(name, timesteps)
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.alpha_bar.shape == (timesteps,)
    assert (schedule.alpha_bar.diff() < 0).all() and (schedule.sigmas.diff() > 0).all()
    assert 0 < schedule.alpha_bar[-1] and schedule.alpha_bar[0] < 1


def test_cosine_is_the_formula_of_the_paper():
    t = torch.arange(1, 300, dtype=torch.float64)  # the last beta is clipped
    f = torch.cos((t / 300 + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(NoiseSchedule("cosine", 300).alpha_bar[:-1], expected)


@pytest.mark.parametrize("timesteps", [1000, 300])
def test_linear_has_the_betas_of_ho_et_al(timesteps):
    """From 1e-4 to 0.02 at T = 1000; with fewer levels each of them adds more."""
    alpha_bar = NoiseSchedule("linear", timesteps).alpha_bar
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    expected = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps
    torch.testing.assert_close(betas, expected, atol=1e-12, rtol=0)


def test_loglinear_has_log_sigma_in_even_steps_from_far_below_a_grey_level():
    steps = NoiseSchedule("loglinear", 300).sigmas.log().diff()
    torch.testing.assert_close(steps, steps[0].expand(299), atol=1e-9, rtol=0)
    assert NoiseSchedule("loglinear", 300).sigmas[0].item() == pytest.approx(0.001)


def test_linear_ends_in_the_same_noise_for_any_length():
    last = [NoiseSchedule("linear", n).alpha_bar[-1].log().item() for n in (300, 1000)]
    assert abs(last[0] / last[1] - 1) < 0.02


@pytest.mark.parametrize("name", SCHEDULES)
def test_t_to_sigma_and_back(name):
    schedule = NoiseSchedule(name, 300)
    t = torch.linspace(0, 299, 1001, dtype=torch.float64)
    torch.testing.assert_close(schedule.t_at(schedule.sigma_at(t)), t, atol=1e-7, rtol=0)
    whole = torch.arange(300)
    torch.testing.assert_close(schedule.sigma_at(whole), schedule.sigmas)
    outside = torch.tensor([schedule.sigmas[0] / 2, schedule.sigmas[-1] * 2])
    assert schedule.t_at(outside).tolist() == [0, 299]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("timesteps", [2, 3, 7, 50])
def test_sampling_sigmas_fall_strictly_from_the_first_level_to_zero(timesteps, spacing):
    schedule = NoiseSchedule("cosine", timesteps)
    for steps in range(1, timesteps + 1):
        sigmas = schedule.sampling_sigmas(steps, spacing)
        assert sigmas.shape == (steps + 1,) and (sigmas.diff() < 0).all()
        assert math.isclose(sigmas[0], schedule.sigmas[-1]) and sigmas[-1] == 0
        if steps > 1 and spacing != "fewstep":
            assert math.isclose(sigmas[-2], schedule.sigmas[0])


def test_few_steps_begin_with_the_highest_level_and_the_one_that_mends():
    schedule = NoiseSchedule("cosine", 300)
    top, (high, low) = schedule.sigmas[-1].item(), FEW_STEP_LEVELS
    levels = [schedule.sampling_sigmas(steps, "fewstep").tolist() for steps in (1, 2, 3, 4)]
    middle = math.sqrt(high * low)
    wanted = [[top], [top, high], [top, high, low], [top, high, middle, low]]
    assert levels == [pytest.approx([*row, 0.0]) for row in wanted]


def test_linear_spacing_uses_levels_the_network_was_trained_at():
    schedule = NoiseSchedule("cosine", 300)
    assert torch.isin(schedule.sampling_sigmas(20, "linear")[:-1], schedule.sigmas).all()
    torch.testing.assert_close(schedule.sampling_sigmas(300)[:-1], schedule.sigmas.flip(0))


@pytest.mark.parametrize("spacing, power, apart", [("linear", 1, 0.5), ("quadratic", 2, 1e-6)])
def test_spacings_in_t_are_even(spacing, power, apart):
    """In t, at the nearest level of training, and in the square root of t."""
    schedule = NoiseSchedule("cosine", 300)
    t = schedule.t_at(schedule.sampling_sigmas(20, spacing)[:-1])
    even = 299 * torch.linspace(1, 0, 20, dtype=torch.float64) ** power
    assert (t - even).abs().max() <= apart


@pytest.mark.parametrize("spacing, to", [("karras", lambda s: s ** (1 / 7)), ("logsnr", torch.log)])
def test_spacings_in_sigma_are_even_below_the_first_call(spacing, to):
    sigmas = NoiseSchedule("cosine", 300).sampling_sigmas(20, spacing)[1:-1]
    torch.testing.assert_close(sigmas[0].item(), SIGMA_START)
    gaps = to(sigmas).diff()
    torch.testing.assert_close(gaps, gaps[0].expand(len(gaps)))
