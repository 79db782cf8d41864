import dataclasses
import math

import diffusers
import pytest
import torch

from config import FEW_STEP_SAMPLER, GUIDANCE, SamplingConfig, TrainConfig, UserError
from models import build_diffusion, build_model
from models.diffusion import Denoiser
from models.trained import TrainedModel
from sampling.draw import draws_noise, guidance_at, resolve, sample_images
from sampling.samplers import (
    INPAINTERS,
    SAMPLERS,
    encode,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_heun,
    sample_repaint,
)
from tests.conftest import DIGITS
from utils.graphs import Graphed
from utils.noise_scheduler import SPACINGS, NoiseSchedule

MU, S = 0.3, 0.5


def gaussian(x, sigma):
    """The ideal denoiser of data ~ N(MU, S^2)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def flow_error(sampler, steps):
    """Distance to the exact end of the probability flow from sigma 10 to 0.1, denoised there."""
    sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
    x = torch.linspace(-20, 20, 9, dtype=torch.float64)
    scale = math.sqrt((S**2 + 0.1**2) / (S**2 + 10**2))
    exact = gaussian(MU + scale * (x - MU), sigmas[-1])
    got = sampler(gaussian, x, torch.cat([sigmas, torch.zeros(1)]), None)
    return (got - exact).abs().max().item()


@pytest.mark.parametrize(
    "name, ratio", [("ddim", 1.9), ("heun", 3.8), ("dpmpp_2m", 3.8), ("unipc", 7.6)]
)
def test_order_of_accuracy(name, ratio):
    errors = [flow_error(SAMPLERS[name].function, steps) for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > ratio and errors[1] / errors[2] > ratio
    assert errors[2] < 0.02


def spread_error(sampler, steps, eta):
    """What is wrong in the standard deviation of what is drawn from x ~ N(MU, S^2 + 10^2).

    Exact, without drawing: of a linear denoiser the result is linear in the start and in each
    noise, and row k of the batch finds the factor of the k-th of them.
    """
    levels = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
    sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    rows = torch.eye(steps + 2, dtype=torch.float64)
    noises = iter(rows[1:])
    x = rows[0] * math.sqrt(S**2 + 10**2)
    factors = sampler(lambda x, s: gaussian(x, s) - gaussian(0, s), x, sigmas, noises.__next__, eta)
    assert len(list(noises)) == 1  # the last step, to 0, draws none
    exact = S**2 / math.sqrt(S**2 + 0.1**2)
    return abs(factors.norm().item() - exact)


@pytest.mark.parametrize(
    "sampler, eta, ratio",
    [
        (sample_ddim, 0.5, 1.9),
        (sample_ddim, 1.0, 1.9),
        (sample_dpmpp_2m, 0.5, 3.8),
        (sample_dpmpp_2m, 0.75, 3.8),
        (sample_dpmpp_2m, 1.0, 3.8),
    ],
)
def test_weak_order_of_accuracy(sampler, eta, ratio):
    errors = [spread_error(sampler, steps, eta) for steps in (80, 160, 320)]
    assert errors[0] / errors[1] > ratio and errors[1] / errors[2] > ratio
    assert errors[2] < 0.02


def test_ddim_is_the_textbook_formula():
    """Song et al. 2021, eq. 12, in variance-preserving coordinates, for any eta."""
    schedule = NoiseSchedule("linear", 100)
    a_t, a_next = schedule.alpha_bar[60], schedule.alpha_bar[40]
    sigmas = torch.stack([schedule.sigmas[60], schedule.sigmas[40]])
    x_t, z = torch.randn(2, 5, 1, 4, 4, dtype=torch.float64)
    for eta in (0.0, 0.5, 1.0):
        x0 = gaussian(x_t / a_t.sqrt(), sigmas[0])
        eps = (x_t - a_t.sqrt() * x0) / (1 - a_t).sqrt()
        up = eta * ((1 - a_next) / (1 - a_t) * (1 - a_t / a_next)).sqrt()
        expected = a_next.sqrt() * x0 + (1 - a_next - up**2).sqrt() * eps + up * z
        got = sample_ddim(gaussian, x_t / a_t.sqrt(), sigmas, lambda: z, eta)
        torch.testing.assert_close(got * a_next.sqrt(), expected)


def test_ddpm_draws_from_the_posterior_of_ho_et_al():
    """Mean and variance of q(x_{t-1} | x_t, x0), Ho et al. 2020, eq. 6-7."""
    schedule = NoiseSchedule("cosine", 100)
    a_t, a_prev = schedule.alpha_bar[50], schedule.alpha_bar[49]
    beta = 1 - a_t / a_prev
    x_t = torch.randn(6, dtype=torch.float64)
    x0 = gaussian(x_t / a_t.sqrt(), schedule.sigmas[50])
    mean = a_prev.sqrt() * beta / (1 - a_t) * x0
    mean = mean + (1 - beta).sqrt() * (1 - a_prev) / (1 - a_t) * x_t
    deviation = ((1 - a_prev) / (1 - a_t) * beta).sqrt()
    sigmas = schedule.sigmas[[50, 49]]
    for z in (0.0, 1.0, -2.0):
        noise = torch.full_like(x_t, z)
        got = sample_ddpm(gaussian, x_t / a_t.sqrt(), sigmas, lambda noise=noise: noise)
        torch.testing.assert_close(got * a_prev.sqrt(), mean + deviation * z)


def test_ddpm_of_the_ideal_denoiser_gives_the_data_distribution():
    generator = torch.Generator().manual_seed(0)
    sigmas = NoiseSchedule("cosine", 100).sampling_sigmas(100)

    def noise():
        return torch.randn(50_000, generator=generator, dtype=torch.float64)

    x = sample_ddpm(gaussian, noise() * (1 + sigmas[0] ** 2).sqrt(), sigmas, noise)
    assert abs(x.mean() - MU) < 0.01 and abs(x.std() - S) < 0.02


def test_heun_with_churn_gives_the_data_distribution():
    """Its noise lifts sigma and the step goes further down: what comes out stays N(MU, S^2)."""
    generator = torch.Generator().manual_seed(0)
    sigmas = NoiseSchedule("cosine", 100).sampling_sigmas(40, "karras")

    def noise():
        return torch.randn(50_000, generator=generator, dtype=torch.float64)

    start = noise() * (1 + sigmas[0] ** 2).sqrt()
    x = sample_heun(gaussian, start, sigmas, noise, churn=10.0)
    assert abs(x.mean() - MU) < 0.01 and abs(x.std() - S) < 0.02
    still = sample_heun(gaussian, start, sigmas, noise)
    assert (x - still).std() > 0.1  # the noise was put in, and came through


class Recorded:
    """A denoiser that halves, and notes what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, x, sigma):
        self.given.append((x, float(sigma)))
        return x / 2


def numbered(count, shape=(1, 1, 2, 2)):
    """A function that returns so many noises in turn, and these."""
    noises = torch.randn(count, *shape, dtype=torch.float64, generator=gen())
    return iter(noises).__next__, noises


def gen():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("churn, gamma", [(0.6, 0.2), (2.0, 2**0.5 - 1)])
def test_churn_lifts_the_noise_before_each_step(churn, gamma):
    """By churn / steps of itself, at most by sqrt(2) - 1 (Karras et al. 2022, algorithm 2)."""
    sigmas = torch.tensor([4.0, 3.0, 2.0, 0.0], dtype=torch.float64)
    denoise, (noise, noises) = Recorded(), numbered(3)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    sample_heun(denoise, x, sigmas, noise, churn)
    levels = [(1 + gamma) * 4, 3, (1 + gamma) * 3, 2, (1 + gamma) * 2]
    assert [sigma for _, sigma in denoise.given] == pytest.approx(levels)
    lifted = x + 4 * math.sqrt((1 + gamma) ** 2 - 1) * noises[0]  # variances add
    torch.testing.assert_close(denoise.given[0][0], lifted)


def test_consistency_sampling_noises_each_image_to_the_next_level():
    sigmas = torch.tensor([80.0, 1.5, 1.25, 0.0], dtype=torch.float64)
    denoise, (noise, noises) = Recorded(), numbered(2)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    x0 = SAMPLERS[FEW_STEP_SAMPLER].function(denoise, x, sigmas, noise)
    second = x / 2 + 1.5 * noises[0]
    third = second / 2 + 1.25 * noises[1]
    assert [sigma for _, sigma in denoise.given] == [80.0, 1.5, 1.25]
    torch.testing.assert_close(
        torch.stack([x for x, _ in denoise.given[1:]]), torch.stack([second, third])
    )
    torch.testing.assert_close(x0, third / 2)


def test_repaint_takes_each_step_again_from_where_it_began():
    """Lugmayr et al. 2022, algorithm 1: a step down, the known pixels noised alike, and back up."""
    sigmas = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)
    denoise, (noise, noises) = Recorded(), numbered(5, shape=(2,))
    known = torch.tensor([0.5, 0.0], dtype=torch.float64)
    missing = torch.tensor([False, True])
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    end = sample_repaint(denoise, x, sigmas, noise, known, missing, repeats=2)
    up, down = 2 * math.sqrt(1 - 0.25), 2 * 0.5  # of DDPM's noise at 2, from 4: fresh and old
    starts = [x]
    for first in (0, 3):
        start = starts[-1]
        drawn = start / 2 + down / 4 * start / 2 + up * noises[first]
        starts.append(torch.where(missing, drawn, known + 2 * noises[first + 1]))
        if first == 0:
            starts[-1] = starts[-1] + math.sqrt(4**2 - 2**2) * noises[2]
    assert [sigma for _, sigma in denoise.given] == [4.0, 4.0, 2.0]
    torch.testing.assert_close(torch.stack([x for x, _ in denoise.given]), torch.stack(starts))
    torch.testing.assert_close(end, torch.where(missing, starts[-1] / 2, known))


def test_repaint_draws_the_missing_pixel_given_the_known_one():
    """Two pixels with covariance 1, 0.8: the one given the other is N(0.8 known, 0.36).

    Without repeats what is drawn hardly heeds what is known.
    """
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)

    def denoise(x, sigma):  # the ideal one of N(0, covariance)
        noisy = covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return x @ torch.linalg.solve(noisy, covariance)

    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(2000, 2, generator=generator, dtype=torch.float64)

    known = torch.tensor([0.9, 0.0], dtype=torch.float64).expand(2000, 2)
    missing = torch.tensor([False, True]).expand(2000, 2)
    sigmas = NoiseSchedule("cosine", 100).sampling_sigmas(100)

    def draw(repeats):
        x = noise() * sigmas[0]
        x = sample_repaint(denoise, x, sigmas, noise, known, missing, repeats)
        assert torch.equal(x[:, 0], known[:, 0])
        return x[:, 1].mean(), x[:, 1].std()

    mean, deviation = draw(repeats=10)
    assert abs(mean - 0.72) < 0.06 and abs(deviation - 0.6) < 0.06
    assert draw(repeats=1)[0] < 0.6


def test_encoding_is_the_flow_backwards():
    levels = torch.logspace(1, -2, 81, dtype=torch.float64)
    sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    x0 = torch.linspace(-1, 1, 9, dtype=torch.float64)
    x = encode(gaussian, x0, sigmas)
    scale = math.sqrt((S**2 + 10**2) / (S**2 + 0.01**2))
    torch.testing.assert_close(x, MU + scale * (x0 - MU), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(sample_heun(gaussian, x, sigmas, None), x0, atol=1e-3, rtol=0)
    denoise = Recorded()
    encode(denoise, x0, sigmas)  # the lowest level's value is x0, and no level is left out
    assert torch.equal(denoise.given[0][0], x0)
    assert list(dict.fromkeys(s for _, s in denoise.given)) == levels.flip(0).tolist()


@pytest.mark.parametrize(
    "name, eta", [("ddim", 0), ("dpmpp_2m", 0), ("dpmpp_2m_sde", 1), ("unipc", None)]
)
def test_the_samplers_are_those_of_diffusers(name, eta):
    """The Hugging Face library's schedulers on the same network and timesteps, within 1e-4."""
    timesteps = 100
    schedule = NoiseSchedule("linear", timesteps)
    alpha_bar = schedule.alpha_bar
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    weight = torch.randn(16, 16, dtype=torch.float64, generator=torch.manual_seed(0)) / 4

    def x0_hat(x_t, t):  # any function of both will do
        return torch.tanh(x_t.flatten(1) @ weight + t / timesteps).view_as(x_t)

    def denoise(x, sigma):
        return x0_hat(x * (1 + sigma**2) ** -0.5, schedule.t_at(sigma))

    common = {"num_train_timesteps": timesteps, "trained_betas": betas.numpy()}
    common |= {"prediction_type": "sample", "timestep_spacing": "leading"}
    if name == "ddim":
        theirs = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    elif name == "unipc":
        common |= {"solver_order": 2, "solver_type": "bh2", "final_sigmas_type": "zero"}
        theirs = diffusers.UniPCMultistepScheduler(**common)
    else:
        kind = "sde-dpmsolver++" if eta else "dpmsolver++"
        common |= {"algorithm_type": kind, "final_sigmas_type": "zero"}
        theirs = diffusers.DPMSolverMultistepScheduler(**common)
    theirs.set_timesteps(10)
    sigmas = torch.cat([schedule.sigmas[theirs.timesteps], torch.zeros(1, dtype=torch.float64)])
    x_t = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    start = x_t * (1 + sigmas[0] ** 2).sqrt()
    noises = torch.randn(10, 3, 1, 4, 4, dtype=torch.float64)
    options = {} if eta is None else {"eta": eta}
    ours = SAMPLERS[name].function(denoise, start, sigmas, iter(noises).__next__, **options)
    for t, z in zip(theirs.timesteps, noises, strict=True):
        own = {"variance_noise": z} if eta else {}
        x_t = theirs.step(x0_hat(x_t, t.double()), t, x_t, **own).prev_sample
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_and_the_last_value_is_returned(name):
    calls = []

    def denoise(x, sigma):
        calls.append(float(sigma))
        return torch.full_like(x, 0.25)

    sigmas = NoiseSchedule("cosine", 30).sampling_sigmas(7)
    x = SAMPLERS[name].function(
        denoise, torch.randn(2, 1, 4, 4), sigmas, lambda: torch.zeros(2, 1, 4, 4)
    )
    assert sigmas[0] > 100 * sigmas[1]
    twice = sigmas[2:-1].repeat_interleave(2).tolist()
    assert calls == ([*sigmas[:2].tolist(), *twice] if name == "heun" else sigmas[:-1].tolist())
    torch.testing.assert_close(x, torch.full_like(x, 0.25))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_at_any_batch_size(name):
    model = tiny_model()
    for p in model.net.parameters():  # a network that does something, also with its label
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    told = {"labels": torch.arange(9), "start": torch.randn(9, 1, 28, 28)}

    def draw(batch_size, count=9, **given):
        sampling = SamplingConfig(
            sampler=name, steps=6, seed=3, batch_size=batch_size, guidance=1.0
        )
        given = {key: values[:count] for key, values in given.items()}
        return torch.cat(list(sample_images(model, count, sampling, **given)))

    for given in ({}, told):
        whole = draw(9, **given)
        assert whole.shape == (9, 1, 28, 28) and whole.dtype == torch.uint8
        assert whole.float().std() > 10
        for other in (draw(1, **given), draw(7, **given), draw(7, count=8, **given)):
            # convolution kernels may round differently by batch size: at most one grey level
            assert (whole[: len(other)].int() - other.int()).abs().max() <= 1


def tiny_model(sampling=None, timesteps=12, **settings):
    cfg = TrainConfig(width=8, timesteps=timesteps, **settings)
    torch.manual_seed(1)
    net = build_model(cfg, DIGITS)
    return TrainedModel(cfg, DIGITS, build_diffusion(cfg), net, sampling or {})


@pytest.mark.parametrize("count, recorded", [(10, set()), (25, {10, 20})])
def test_calls_are_recorded_for_batches_that_come_again(monkeypatch, count, recorded):
    """Batches of 10, of which a guided call makes 20: neither a short one nor one alone."""
    cfg, seen = TrainConfig(width=8, timesteps=20), []
    net = build_model(cfg, DIGITS)

    class Recorded(Graphed):
        def __call__(self, x_t, t, y):
            seen.append(len(x_t))
            return super().__call__(x_t, t, y)

    monkeypatch.setattr("sampling.draw.Graphed", Recorded)
    model = TrainedModel(cfg, DIGITS, build_diffusion(cfg, "cpu"), net)
    sampling = SamplingConfig(steps=4, batch_size=10)
    labels = torch.arange(count) % 10
    images = torch.cat(list(sample_images(model, count, sampling, labels=labels)))
    assert set(seen) == recorded and len(images) == count
    monkeypatch.setattr("sampling.draw.Graphed", lambda net: net)
    assert torch.equal(
        images, torch.cat(list(sample_images(model, count, sampling, labels=labels)))
    )


def test_what_is_left_open_comes_from_the_sampler():
    model = tiny_model(timesteps=300)
    assert resolve(SamplingConfig(sampler="ddpm"), model).steps == 300
    ddim = resolve(SamplingConfig(sampler="ddim"), model)
    assert (ddim.steps, ddim.spacing, ddim.eta, ddim.churn) == (50, "linear", 0.0, None)
    default = resolve(SamplingConfig(), model)
    assert (default.sampler, default.steps, default.eta) == ("dpmpp_2m_sde", 13, 0.75)
    assert resolve(default, model) == default
    assert resolve(SamplingConfig(sampler="ddim"), tiny_model(timesteps=7)).steps == 7
    assert resolve(SamplingConfig(steps=300), model).steps == 300
    with pytest.raises(UserError, match="--steps 301"):
        resolve(SamplingConfig(steps=301), model)
    with pytest.raises(UserError, match="--guided_from 3"):
        resolve(SamplingConfig(guided_from=3.0), model)


def test_a_checkpoint_says_how_its_network_is_best_sampled():
    model = tiny_model({"sampler": "ddim", "steps": 4, "eta": 0.3, "guidance": 1.0})
    own = resolve(SamplingConfig(), model)
    assert (own.sampler, own.steps, own.eta, own.guidance) == ("ddim", 4, 0.3, 1.0)
    assert own.spacing == "linear"
    asked = resolve(SamplingConfig(steps=5, guidance=2.0), model)
    assert (asked.steps, asked.eta, asked.guidance) == (5, 0.3, 2.0)
    other = resolve(SamplingConfig(sampler="heun"), model)  # whose steps are its own
    assert (other.steps, other.eta, other.churn, other.guidance) == (10, None, 0.0, 1.0)


def test_a_network_that_never_hid_a_label_is_not_guided_by_default():
    for settings in ({"label_dropout": 0.0}, {"class_conditional": False}):
        assert resolve(SamplingConfig(), tiny_model(**settings)).guidance == 1
    assert resolve(SamplingConfig(), tiny_model()).guidance == GUIDANCE > 1
    with pytest.raises(UserError, match="--guidance 0: .*--label_dropout 0; must be 1"):
        resolve(SamplingConfig(guidance=0.0), tiny_model(label_dropout=0.0))


def test_samplers_that_draw_noise_are_known():
    model = tiny_model()
    every = SAMPLERS | INPAINTERS
    noisy = {name for name in every if draws_noise(resolve(SamplingConfig(name), model))}
    assert noisy == {"dpmpp_2m_sde", "ddpm", "repaint"}
    assert draws_noise(resolve(SamplingConfig("ddim", eta=0.1), model))
    assert draws_noise(resolve(SamplingConfig("heun", churn=1.0), model))
    assert not draws_noise(resolve(SamplingConfig(eta=0.0), model))


def test_spacings_of_the_samplers_exist():
    assert {sampler.spacing for sampler in SAMPLERS.values()} <= set(SPACINGS)


GUIDED = SamplingConfig(guidance=1.5, guided_from=0.6, guided_to=2.0)


@pytest.mark.parametrize("steps", range(4, 21))
def test_how_much_is_guided_does_not_depend_on_where_the_levels_fall(steps):
    """The scale beyond 1, summed over the way in log sigma, is that of the whole interval."""
    sigmas = NoiseSchedule("cosine", 300).sampling_sigmas(steps, "logsnr")
    way = (sigmas[:-2] / sigmas[1:-1]).log()
    scales = torch.tensor([guidance_at(sigma, GUIDED, sigmas) for sigma in sigmas[:-1]])
    assert ((scales - 1)[:-1] * way).sum().item() == pytest.approx(0.5 * math.log(2.0 / 0.6))
    assert scales.max() <= 1.5 and scales.min() >= 1 and scales[-1] == 1


def test_guidance_everywhere_nowhere_and_of_less_than_1():
    sigmas = NoiseSchedule("cosine", 300).sampling_sigmas(9, "logsnr")
    everywhere = SamplingConfig(guidance=3.0, guided_from=0.0, guided_to=math.inf)
    assert {guidance_at(sigma, everywhere, sigmas) for sigma in sigmas[:-1]} == {3.0}
    nowhere = SamplingConfig(guidance=3.0, guided_from=1e4, guided_to=1e5)
    assert {guidance_at(sigma, nowhere, sigmas) for sigma in sigmas[:-1]} == {1.0}
    for scale in (0.0, 0.5, 1.0):
        less = dataclasses.replace(GUIDED, guidance=scale)
        assert {guidance_at(sigma, less, sigmas) for sigma in sigmas[:-1]} == {scale}


def test_with_churn_a_step_is_guided_as_far_as_it_goes():
    """Heun's churn starts a step above its level; it still goes down to the next level."""
    sigmas = torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    expected = 1 + 0.5 * math.log(2) / math.log(2.2)
    found = guidance_at(2.2 * sigmas[2], GUIDED, sigmas[[0, 2, 3]])  # 2.2 -> 0
    assert found == 1  # the last step, from above the interval
    assert guidance_at(1.1 * sigmas[1], GUIDED, sigmas) == pytest.approx(expected)


@pytest.mark.parametrize("name, ratio", [("dpmpp_2m", 3.8), ("unipc", 7.6)])
def test_the_order_of_accuracy_of_a_guided_denoiser(name, ratio):
    """Guided alike at all levels, multistep samplers extrapolate the guided prediction."""

    class Guided:
        """Of two Gaussians with one variance, told and not told which: a linear denoiser."""

        def __init__(self):
            self.calls, self.scale = [], 2.0

        def __call__(self, x, sigma):
            told, untold = gaussian(x, sigma), gaussian(x, sigma) - 0.1 * sigma**2 / (1 + sigma**2)
            self.calls = [*self.calls[-1:], (told, told - untold)]
            return Denoiser._guided(self, *self.calls[-1])

        _guided, change = Denoiser._guided, Denoiser.change

    def end(steps):
        sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
        x = torch.linspace(-20, 20, 9, dtype=torch.float64)
        sigmas = torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])
        return SAMPLERS[name].function(Guided(), x, sigmas, None)

    exact = end(5120)
    errors = [(end(steps) - exact).abs().max().item() for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > ratio and errors[1] / errors[2] > ratio
