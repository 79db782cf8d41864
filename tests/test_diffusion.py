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
    wide = Diffusion(NoiseSchedule("cosine", 1000), "v", t_mean=0.5, t_std=0.8, t_even=0.3)
    t = torch.cat([wide.draw_t(1000, gen(seed)) for seed in range(20)])
    for share in (0.2, 0.5, 0.8, 0.95):  # of the two together, below a share of the levels
        z = (torch.logit(torch.tensor(share)) - 0.5) / 0.8
        expected = 0.3 * share + 0.7 * torch.special.ndtr(z).item()
        assert (t < 1000 * share).double().mean().item() == pytest.approx(expected, abs=2e-3)
    wholly_even = Diffusion(schedule, "v", t_even=1.0).draw_t(50, gen())
    assert wholly_even.tolist() == list(range(50))


def test_timesteps_never_leave_the_schedule():
    """However wide their distribution: its sigmoid is then rounded to 0 and to 1."""
    diffusion = Diffusion(SCHEDULE, "v", t_std=50.0)
    t = diffusion.draw_t(1000, gen())
    assert (t.min(), t.max()) == (0, 49) and t.dtype == torch.int64


def test_a_network_is_given_float32_and_its_own_precision_is_undone():
    """Levels are kept in float64, and under autocast predictions come in bfloat16."""
    x0, given = torch.rand(4, 1, 8, 8, generator=gen()) * 2 - 1, []

    def net(x_t, t, y):
        given.extend([x_t.dtype, t.dtype])
        return (x_t / 3).bfloat16()

    diffusion = make()
    loss = diffusion.loss(net, x0, None, gen())
    x0_hat = diffusion.denoiser(net)(x0, SCHEDULE.sigmas[20])
    assert set(given) == {torch.float32} and loss.dtype == x0_hat.dtype == torch.float32
    sigma = SCHEDULE.sigmas[20].item()
    a = (1 + sigma**2) ** -0.5
    rounded = (a * x0 / 3).bfloat16().float()
    torch.testing.assert_close(x0_hat, (a * a * x0 - sigma * a * rounded).clamp(-1, 1))


@pytest.mark.parametrize("even", [0.0, 0.3, 1.0])
def test_the_shares_of_timesteps_are_those_that_are_drawn(even):
    diffusion = Diffusion(SCHEDULE, "v", t_mean=-0.5, t_std=0.8, t_even=even)
    t = torch.cat([diffusion.draw_t(1000, gen(seed)) for seed in range(50)])
    drawn, shares = torch.bincount(t, minlength=50) / len(t), diffusion.t_shares()
    assert shares.sum().item() == pytest.approx(1)
    assert (drawn - shares).abs().max() < 5e-4


@pytest.mark.parametrize("prediction", D.TARGETS)
def test_weighted_for_the_bound_the_loss_is_its_diffusion_part(prediction):
    """In bits/dim: 1/2 (SNR(t-1) - SNR(t)) |x - x_hat|^2 over all t, here of an x_hat of 0.1."""
    schedule = NoiseSchedule("loglinear", 50)
    options = {"t_mean": -0.4, "t_even": 0.5, "loss_weight": "bound"}
    diffusion = Diffusion(schedule, prediction, **options)
    x0 = torch.full((50, 1, 2, 2), 0.4)
    eps = torch.randn(x0.shape, generator=gen())
    a = diffusion.sqrt_alpha_bar.view(-1, 1, 1, 1).double()
    s = diffusion.sqrt_one_minus_alpha_bar.view(-1, 1, 1, 1).double()
    x_t = a * x0 + s * eps
    predictions = D.TARGETS[prediction](torch.full_like(x_t, 0.1), (x_t - a * 0.1) / s, a, s)
    terms = torch.stack(
        [
            diffusion.loss_at(
                lambda x, t, y: predictions[t.long()], x0[t : t + 1], None, level, eps[t : t + 1]
            )
            for t, level in enumerate(torch.arange(50).view(50, 1))
        ]
    )
    found = (diffusion.t_shares() * terms)[1:].sum().item()
    snr = schedule.sigmas**-2
    expected = (snr[0] - snr[-1]).item() / 2 * 0.3**2 / 0.6931472
    assert found == pytest.approx(expected, rel=0.01)


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


def test_guidance_may_change_with_sigma():
    net, x = Labelled(), torch.zeros(2, 1, 4, 4)
    scales = {float(SCHEDULE.sigmas[k]): scale for k, scale in ((5, 2.0), (6, 1.0), (7, 0.0))}
    denoise = make("x0").denoiser(net, torch.tensor([3, 7]), lambda sigma: scales[float(sigma)])
    for k, expected in ((5, [-0.2, 0.2]), (6, [0.15, 0.35]), (7, [0.5, 0.5])):
        torch.testing.assert_close(
            denoise(x, SCHEDULE.sigmas[k])[:, 0, 0, 0], torch.tensor(expected)
        )
    assert net.calls == [4, 2, 2]


def beyond(conditional, unconditional):
    """A network whose x0_hat is one of two values everywhere, by whether it is told a label."""

    def net(x, t, y):
        values = torch.where(y == 10, unconditional, conditional)
        return values.view(-1, 1, 1, 1).expand_as(x)

    net.num_classes = 10
    return net


def test_guidance_blends_what_is_black_to_black():
    """Beyond black and white the loss leaves the network free: differences there mean nothing."""
    x, labels, sigma = torch.zeros(1, 1, 2, 2), torch.tensor([3]), SCHEDULE.sigmas[5]
    for inside, outside in ((-1.2, -1.6), (1.3, 1.9)):
        denoise = make("x0").denoiser(beyond(inside, outside), labels, 4.0)
        assert (denoise(x, sigma) == (1 if inside > 0 else -1)).all()
    denoise = make("x0").denoiser(beyond(-0.5, -1.6), labels, 2.0)
    torch.testing.assert_close(denoise(x, sigma), torch.zeros_like(x))  # -1 + 2 (-0.5 + 1)
    for scale in (4.0, -4.0):  # and the blend ends where images do: 0.1 + 4 (0.9 - 0.1) is white
        x0_hat = make("x0").denoiser(beyond(0.9, 0.1), labels, scale)(x, sigma)
        assert (x0_hat == scale / 4).all()


def test_the_change_of_a_prediction_has_no_jump_where_guidance_sets_in_or_ends():
    labels, x = torch.tensor([3]), torch.zeros(1, 1, 2, 2)
    told = {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.25, 4: 0.25}  # x0_hat with the label, by the call
    scales = [1.0, 1.5, 1.5, 3.0, 1.0]
    calls = iter(range(5))

    def net(x_t, t, y):
        number = next(calls)
        return beyond(told[number], 0.0)(x_t, t, y)

    net.num_classes = 10
    steps = iter(scales)
    denoise = make("x0").denoiser(net, labels, lambda sigma: next(steps))
    sigma, changes = SCHEDULE.sigmas[5], []
    for number in range(5):
        x0_hat = denoise(x, sigma)[0, 0, 0, 0].item()
        assert x0_hat == pytest.approx(scales[number] * told[number])
        if number:
            changes.append(denoise.change()[0, 0, 0, 0].item())
    # unguided and guided; guided alike; guided more, as if it always had been; and unguided again
    assert changes == pytest.approx([0.0, 1.5 * 0.1, 3 * 0.05, 0.0], abs=1e-6)


def test_an_error_that_clamping_undoes_is_none():
    """A black pixel may be predicted blacker than black, a white one whiter; no other pixel may."""
    diffusion = make("x0")

    def loss(x0, prediction):
        images = torch.full((8, 1, 4, 4), x0)
        net = lambda x_t, t, y: torch.full_like(x_t, prediction)  # noqa: E731
        return diffusion.loss(net, images, None, gen()).item()

    assert loss(-1.0, -1.3) == loss(1.0, 1.3) == 0.0
    for x0, prediction in ((-0.99, -1.3), (0.99, 1.3), (-1.0, 1.3), (1.0, -1.3), (-1.0, -0.7)):
        assert loss(x0, prediction) == pytest.approx((x0 - prediction) ** 2, rel=1e-5)


@pytest.mark.parametrize("black", [0.9, 0.5, 0.2])
def test_the_minimum_of_the_loss_is_still_the_posterior_mean(black):
    """Of pixels that are -1 with probability `black` and else 1, told nothing: the mean of both."""
    diffusion = make("x0")
    count = 1000
    x0 = torch.where(torch.arange(count) < black * count, -1.0, 1.0).view(-1, 1, 1, 1)
    guesses = torch.linspace(-1.5, 1.5, 301)
    losses = [
        diffusion.loss(lambda x_t, t, y, g=guess: torch.full_like(x_t, g), x0, None, gen()).item()
        for guess in guesses
    ]
    best = guesses[losses.index(min(losses))].item()
    assert best == pytest.approx(1 - 2 * black, abs=0.011)
