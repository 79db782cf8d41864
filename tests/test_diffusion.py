import pytest
import torch

from models import diffusion as D
from models.diffusion import Diffusion
from utils.noise_scheduler import NoiseSchedule

SCHEDULE = NoiseSchedule("cosine", 50)


def make(prediction="v"):
    return Diffusion(SCHEDULE, prediction)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Labelled(torch.nn.Module):
    """Predicts its label everywhere, and counts its calls; the null label is 10."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y=None):
        y = torch.full((len(x),), 10) if y is None else y
        self.calls.append(len(x))
        return y.float().view(-1, 1, 1, 1).expand_as(x) / 20


def test_every_target_has_its_way_back():
    assert set(D.TARGETS) == set(D.TO_X0)


@pytest.mark.parametrize("prediction", D.TARGETS)
def test_target_and_back_is_the_image(prediction):
    x0, eps = torch.randn(2, 50, 1, 8, 8, generator=gen(), dtype=torch.float64)
    a = SCHEDULE.alpha_bar.sqrt().view(-1, 1, 1, 1)
    s = (1 - SCHEDULE.alpha_bar).sqrt().view(-1, 1, 1, 1)
    x_t = a * x0 + s * eps
    target = D.TARGETS[prediction](x0, eps, a, s)
    torch.testing.assert_close(D.TO_X0[prediction](target, x_t, a, s), x0)


@pytest.mark.parametrize("prediction", D.TARGETS)
def test_the_loss_of_a_network_that_knows_the_answer_is_zero(prediction):
    x0 = torch.randn(64, 1, 8, 8, generator=gen())
    diffusion = make(prediction)

    def oracle(x_t, t, y):
        a = diffusion.sqrt_alpha_bar[t.long()].view(-1, 1, 1, 1)
        s = diffusion.sqrt_one_minus_alpha_bar[t.long()].view(-1, 1, 1, 1)
        return diffusion.target(x0, (x_t - a * x0) / s, a, s)

    assert diffusion.loss(oracle, x0, None, gen()) < 1e-6
    blind = diffusion.loss(lambda x_t, t, y: torch.zeros_like(x_t), x0, None, gen())
    assert blind > 0.1


def test_timesteps_are_stratified_and_logit_normal():
    diffusion = Diffusion(NoiseSchedule("cosine", 1000), "v", t_mean=0.5, t_std=0.8)
    t = torch.cat([diffusion.draw_t(1000, gen(seed)) for seed in range(20)]).double()
    z = torch.logit((t + 0.5) / 1000)
    assert abs(z.mean() - 0.5) < 0.01 and abs(z.std() - 0.8) < 0.01
    for probability in (0.1, 0.5, 0.9):  # and normal
        expected = 0.5 + 0.8 * torch.special.ndtri(torch.tensor(probability)).item()
        assert abs(z.quantile(probability).item() - expected) < 0.01
    share = torch.erf((torch.logit(torch.tensor(0.5)) - 0.5) / 0.8 / 2**0.5) / 2 + 0.5
    for seed in range(20):  # every batch has its share of low noise, to within one image
        low = (diffusion.draw_t(100, gen(seed)) < 500).sum().item()
        assert abs(low - 100 * share) <= 1


def test_a_share_of_the_timesteps_is_even_over_all_levels():
    schedule = NoiseSchedule("cosine", 50)
    diffusion = Diffusion(schedule, "v", t_mean=0.0, t_std=0.1, t_even=0.4)
    t = torch.cat([diffusion.draw_t(100, gen(seed)) for seed in range(200)])
    counts = torch.bincount(t, minlength=50)
    outer = torch.cat([counts[:15], counts[-15:]])  # where the narrow logit-normal never is
    expected = 0.4 * len(t) / 50
    assert (outer - expected).abs().max() < 5 * expected**0.5
    assert abs(counts[20:30].sum() - (0.6 + 0.4 / 5) * len(t)) < 0.01 * len(t)
    wholly_even = Diffusion(schedule, "v", t_even=1.0).draw_t(50, gen())
    assert wholly_even.tolist() == list(range(50))


def test_the_denoiser_of_an_oracle_is_exact():
    x0 = torch.rand(3, 1, 8, 8, generator=gen()) * 2 - 1
    eps = torch.randn(3, 1, 8, 8, generator=gen(1))
    diffusion = make("v")
    for t in (0, 20, 49):
        a, s = diffusion.sqrt_alpha_bar[t], diffusion.sqrt_one_minus_alpha_bar[t]

        def oracle(x_t, t_in, y, t=t, a=a, s=s):
            torch.testing.assert_close(t_in, torch.full((3,), float(t)))
            torch.testing.assert_close(x_t, a * x0 + s * eps, atol=1e-4, rtol=1e-4)
            return a * eps - s * x0

        sigma = SCHEDULE.sigmas[t]
        x0_hat = diffusion.denoiser(oracle)(x0 + float(sigma) * eps, sigma)
        torch.testing.assert_close(x0_hat, x0, atol=2e-3, rtol=0)


def test_guidance_1_is_conditional_and_0_unconditional_with_one_call():
    labels, x, sigma = torch.tensor([3, 7]), torch.zeros(2, 1, 4, 4), SCHEDULE.sigmas[5]
    diffusion = make("x0")
    for guidance, expected in ((1, [0.15, 0.35]), (0, [0.5, 0.5])):
        net = Labelled()
        x0_hat = diffusion.denoiser(net, labels, guidance)(x, sigma)
        torch.testing.assert_close(x0_hat[:, 0, 0, 0], torch.tensor(expected))
        assert net.calls == [2]


def test_other_guidance_extrapolates_in_one_batch_of_both():
    net, labels = Labelled(), torch.tensor([3, 7])
    denoise = make("x0").denoiser(net, labels, guidance=2.0)
    x0_hat = denoise(torch.zeros(2, 1, 4, 4), SCHEDULE.sigmas[5])
    torch.testing.assert_close(x0_hat[:, 0, 0, 0], torch.tensor([-0.2, 0.2]))
    assert net.calls == [4]


def test_guidance_above_1_is_kept_to_its_noise_levels_and_below_1_is_not():
    labels, x, t = torch.tensor([3, 7]), torch.zeros(2, 1, 4, 4), 25
    below, inside, above = SCHEDULE.sigmas[t - 1 : t + 2]
    guided = (float(inside), float(inside))  # both ends belong to it
    for guidance, inner, outer in ((2.0, [-0.2, 0.2], [0.15, 0.35]), (0.0, [0.5] * 2, [0.5] * 2)):
        net = Labelled()
        denoise = make("x0").denoiser(net, labels, guidance, guided)
        for sigma, expected in ((below, outer), (inside, inner), (above, outer)):
            torch.testing.assert_close(denoise(x, sigma)[:, 0, 0, 0], torch.tensor(expected))
        assert net.calls == ([2, 4, 2] if guidance else [2, 2, 2])
