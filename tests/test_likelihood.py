"""The bound, on data whose entropy is known, by the denoiser that is best there."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from config import TrainConfig
from models import build_model
from scoring import bits, decoder
from scoring import likelihood as L
from tests.conftest import DIGITS, TINY, save_model
from utils.data_loader import to_model_range
from utils.noise_scheduler import NoiseSchedule

SIGMAS = torch.logspace(-2, 2, 100, dtype=torch.float64)
GREYS = torch.arange(256) / 127.5 - 1


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class Patterns:
    """A few images of random pixels, each with its probability."""

    def __init__(self, shares, shape=(1, 6, 6), seed=0):
        self.shares = torch.tensor(shares) / sum(shares)
        count = len(shares)
        self.images = torch.randint(256, (count, *shape), generator=gen(seed)).to(torch.uint8)
        self.entropy = -(self.shares * self.shares.log()).sum().item()

    def draw(self, count, seed):
        labels = torch.multinomial(self.shares, count, replacement=True, generator=gen(seed))
        return self.images[labels], labels

    def denoise(self, z, sigma, y):
        """The posterior mean."""
        x = to_model_range(self.images).double().flatten(1)
        z = z.double().flatten(1)
        logits = self.shares.log() - torch.cdist(z, x).square() / 2 / sigma[:, None] ** 2
        mean = logits.softmax(1) @ x
        return mean.float().view(-1, *self.images.shape[1:])


class Greys:
    """Independent pixels, each of which has a value k with probability shares[k]."""

    def __init__(self, shares, shape=(1, 6, 6)):
        self.shares, self.shape = shares / shares.sum(), shape
        p = self.shares[self.shares > 0]
        self.entropy = -(p * p.log()).sum().item() * math.prod(shape)

    def draw(self, count, seed):
        size = count * math.prod(self.shape)
        k = torch.multinomial(self.shares, size, replacement=True, generator=gen(seed))
        return k.view(count, *self.shape).to(torch.uint8)

    def denoise(self, z, sigma, y):
        distance = (z[..., None] - GREYS) / sigma.float().view(-1, 1, 1, 1, 1)
        return (self.shares.log() - distance.square() / 2).softmax(-1) @ GREYS


def total(found, diffusion="diffusion"):
    return found.prior + getattr(found, diffusion) + found.reconstruction


def mean_and_error(values):
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def test_of_a_mixture_of_patterns_the_bound_is_the_entropy():
    data = Patterns([8.0, 4, 2, 1, 1])
    fitted = L.Likelihood(data.denoise, SIGMAS, data.draw(2000, 1)[0], None)
    found = fitted.bound(data.draw(1000, 2)[0], None)
    bound, error = mean_and_error(total(found))
    assert abs(bound - data.entropy) < 4 * error < 0.3
    discrete, error = mean_and_error(total(found, "diffusion_discrete"))
    assert discrete > data.entropy - 4 * error
    assert found.reconstruction.mean() < 0.03 and found.prior.max() < 0.01


def gaussian_greys():
    return Greys(torch.exp(-(((GREYS + 0.2) / 0.1) ** 2) / 2))


def test_of_a_quantised_gaussian_the_bound_is_the_entropy():
    data = gaussian_greys()
    fitted = L.Likelihood(data.denoise, SIGMAS, data.draw(2000, 1), None)
    found = fitted.bound(data.draw(500, 2), None)
    bound, error = mean_and_error(total(found))
    size = math.prod(data.shape)
    assert error / size < 0.02
    assert -4 * error < bound - data.entropy < 4 * error + 0.02 * size  # a table has counted


def test_a_worse_denoiser_pays_more_and_never_less_than_the_entropy():
    data, bounds = gaussian_greys(), []
    for scale in (1.0, 0.9, 0.7):
        worse = lambda z, sigma, y, scale=scale: scale * data.denoise(z, sigma, y)  # noqa: E731
        found = L.Likelihood(worse, SIGMAS, data.draw(300, 1), None).bound(data.draw(100, 2), None)
        for sums in ("diffusion", "diffusion_discrete"):
            assert total(found, sums).mean() > data.entropy - 4 * mean_and_error(total(found))[1]
        bounds.append(total(found).mean().item())
    assert bounds == sorted(bounds) and bounds[-1] > bounds[0] + 5


def test_of_a_gaussian_each_image_costs_what_its_density_says():
    """prior + diffusion = KL(q(z_0 | x) || p(z_0)), where p(z_0) is the noised Gaussian itself."""
    mean, s = 0.1, 0.2
    sigmas = torch.logspace(-1, 4, 300, dtype=torch.float64)
    images = torch.randint(90, 180, (400, 1, 8, 8), generator=gen(3)).to(torch.uint8)

    def denoise(z, sigma, y):
        sigma = sigma.float().view(-1, 1, 1, 1)
        return (s**2 * z + sigma**2 * mean) / (s**2 + sigma**2)

    found = L.Likelihood(denoise, sigmas, images, None).bound(images, None)
    x, variance = to_model_range(images).double(), s**2 + 0.1**2
    expected = ((0.01 + (x - mean) ** 2) / variance - 1 - math.log(0.01 / variance)) / 2
    expected = expected.flatten(1).sum(1)
    difference, error = mean_and_error(found.prior + found.diffusion - expected)
    assert abs(difference) < 4 * error < 0.02 * expected.mean()
    difference, error = mean_and_error(found.prior + found.diffusion_discrete - expected)
    assert -4 * error < difference < 0.03 * expected.mean()  # finite T pays a little more


def test_the_decoder_takes_over_where_the_denoiser_is_of_no_use():
    data = Patterns([3.0, 2, 1])

    def denoise(z, sigma, y):
        """Below 0.03 it leaves all noise where it is."""
        useless = (sigma < 0.03).view(-1, 1, 1, 1)
        return torch.where(useless, z, data.denoise(z, sigma, y))

    fitted = L.Likelihood(denoise, SIGMAS, data.draw(1000, 1)[0], None)
    assert 0.03 < fitted.levels.sigmas[0] < 0.1
    assert torch.equal(fitted.levels.sigmas, SIGMAS[-len(fitted.levels.sigmas) :])
    bound, error = mean_and_error(total(fitted.bound(data.draw(500, 2)[0], None)))
    assert abs(bound - data.entropy) < 4 * error + 0.05


def test_the_prior_part_is_the_divergence_of_two_gaussians():
    images = torch.tensor([0, 100, 255, 128]).to(torch.uint8).view(2, 1, 1, 2)
    for sigma in (torch.tensor(0.5), torch.tensor(30.0)):
        alpha_bar = 1 / (1 + sigma**2)
        q = torch.distributions.Normal(
            alpha_bar.sqrt() * to_model_range(images), (1 - alpha_bar).sqrt()
        )
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        found = L.prior_nats(images, sigma.double())
        torch.testing.assert_close(found, expected.flatten(1).sum(1).double(), atol=1e-5, rtol=1e-4)


def test_levels_are_drawn_most_where_most_is_paid():
    levels = L.Levels(torch.logspace(-2, 2, 11, dtype=torch.float64))
    u = (torch.arange(1000).double() + 0.5) / 1000
    cell = levels.cells(u)
    shares = levels.worth(u, torch.where(cell == 3, 30.0, torch.where(cell == 7, 10.0, 0.0))).shares
    assert shares.sum().item() == pytest.approx(1)
    even = shares.min().item()
    assert (shares[3] - even).item() == pytest.approx(3 * (shares[7] - even).item())
    assert shares[3] > 0.6 and even == pytest.approx(0.2 / 1.2 / 10)


def test_the_sum_over_levels_is_that_of_the_posteriors():
    """Eq. 13 against the KL of the two Gaussians q(z_s | z_t, x) and p(z_s | z_t), eq. 12."""
    schedule = NoiseSchedule("cosine", 20)
    x, x_hat = 0.3, 0.1
    levels = L.Levels(schedule.sigmas)
    for t in range(1, 20):
        a_s, a_t = schedule.alpha_bar[[t - 1, t]]
        beta = 1 - a_t / a_s
        variance = (1 - a_s) / (1 - a_t) * beta  # Ho et al. 2020, eq. 7
        kl = (a_s.sqrt() * beta / (1 - a_t) * (x - x_hat)) ** 2 / 2 / variance
        u = torch.tensor([(t - 0.5) / 19], dtype=torch.float64)
        sigma, factor = levels.draw(u, continuous=False)
        assert sigma == schedule.sigmas[t]
        term = factor * levels.shares[t - 1] * (x - x_hat) ** 2
        assert term.item() == pytest.approx(kl.item(), rel=1e-6)


@pytest.mark.parametrize("continuous", [True, False])
def test_levels_are_drawn_without_bias_wherever_they_are_drawn(continuous):
    """|x - x_hat|^2 = sigma^2 / (1 + sigma^2) gives 1/2 log(SNR + 1) between the ends."""
    sigmas = torch.logspace(-2, 2, 400, dtype=torch.float64)
    shares = torch.rand(399, generator=gen(), dtype=torch.float64) + 0.1
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    sigma, factor = L.Levels(sigmas, shares).draw(u, continuous)
    found = (factor * sigma**2 / (1 + sigma**2)).mean().item()
    expected = math.log((1 + 1e4) / (1 + 1e-4)) / 2
    assert found == pytest.approx(expected, rel=1e-3 if continuous else 0.03)


def test_every_row_of_the_decoder_sums_to_one():
    data = Patterns([1.0, 1, 1], shape=(3, 6, 6))
    images = data.draw(50, 1)[0]
    x_hat = to_model_range(images) + 0.05 * torch.randn(images.shape, generator=gen())
    found = decoder.Decoder(x_hat, images)
    for table in (found.by_bin, found.table):
        assert table.min() > 0
        torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:-1]))


def test_a_pixel_is_decoded_by_pixels_before_it_alone():
    """So the product over pixels is a probability of the image, by the chain rule."""
    k = torch.randint(100, 104, (1, 1, 6, 6), generator=gen()).to(torch.uint8)
    bin = torch.full(k.shape, 101 + decoder.BEYOND)
    before = decoder.neighbours(k, bin).flatten()
    for place in range(36):
        changed = k.clone()
        changed.view(-1)[place] = 200
        after = decoder.neighbours(changed, bin).flatten()
        assert torch.equal(after[: place + 1], before[: place + 1])
        assert place == 35 or not torch.equal(after, before)


def test_neighbours_are_told_as_far_as_they_are_near():
    k = torch.tensor([[7, 11, 0], [90, 10, 0], [0, 13, 14]]).to(torch.uint8).view(1, 1, 3, 3)
    seen = decoder.neighbours(k, torch.full(k.shape, 10 + decoder.BEYOND))[0, 0]
    left_above = torch.stack([seen // 8 - 3, seen % 8 - 3], dim=-1).tolist()
    far = 4
    assert left_above[0] == [[far, far], [-3, far], [1, far]]
    assert left_above[1] == [[far, -3], [far, 1], [0, far]]
    assert left_above[2] == [[far, far], [far, 0], [3, far]]


def test_the_flow_has_the_density_of_a_gaussian():
    s, sigmas = 0.5, torch.logspace(-2, 3, 2, dtype=torch.float64)
    variance = s**2 + 1e-4
    z = variance**0.5 * torch.randn(5, 1, 4, 4, generator=gen())

    def denoise(z, sigma, y):
        return s**2 * z / (s**2 + sigma.float().view(-1, 1, 1, 1) ** 2)

    z = z.clamp(-0.9, 0.9)  # x_hat is then never clamped
    found = L.flow_log_density(denoise, z, None, sigmas, gen())
    expected = -(z.double().square() / variance + math.log(2 * math.pi * variance)) / 2
    torch.testing.assert_close(found, expected.flatten(1).sum(1), atol=0.02, rtol=0)


def test_the_flow_agrees_with_the_bound_and_neither_is_below_the_entropy():
    data = gaussian_greys()
    sigmas = torch.logspace(-1.7, 2, 100, dtype=torch.float64)
    fitted = L.Likelihood(data.denoise, sigmas, data.draw(1000, 1), None)
    images = data.draw(50, 2)
    own, cpu = gen(5), torch.device("cpu")
    found = bits.flow_nats(data.denoise, fitted.decoder, sigmas, images, None, own, cpu)
    flow, flow_error = mean_and_error(found["flow"])
    bound, bound_error = mean_and_error(total(fitted.bound(images, None)))
    assert abs(flow - bound) < 4 * math.hypot(flow_error, bound_error)
    assert flow > data.entropy - 4 * flow_error
    uniform, error = mean_and_error(found["flow_uniform"])
    assert -4 * error < uniform - data.entropy < 0.1 * data.entropy


@pytest.fixture
def few_digits(monkeypatch):
    monkeypatch.setattr("scoring.likelihood.TOLERANCE", 1e-2)
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 300, "test": 60})


def test_a_network_made_for_it_from_the_command_line(cli, few_digits):
    made = ["--schedule", "loglinear", "--fourier", 2, "--loss_weight", "bound", "--epochs", 1]
    assert cli("main", *TINY, *made, "--experiment_name", "made")[0] == 0
    flags = ["--likelihood", "--num_samples", 20, "--flow", 2, "--json", "bits.json"]
    status, stdout, _ = cli("validation", "--experiment_name", "made", *flags)
    found = json.loads(Path("bits.json").read_text())
    assert status == 0 and Path("bits.png").exists()
    assert found["n"] == 20 and found["n_flow"] == 2 and found["levels"] <= 20
    parts = ("prior", "diffusion", "reconstruction", "label")
    assert found["bits_per_dim"] == pytest.approx(sum(found[part] for part in parts))
    assert found["label"] == pytest.approx(math.log2(10) / 784, rel=0.02)
    given = found["bits_per_dim_given_label"]
    assert found["bits_per_dim"] - given == pytest.approx(found["label"])
    paid = sum(row["bits_per_dim"] for row in found["by_level"])
    assert paid == pytest.approx(found["diffusion"])
    for key in ("bits_per_dim", "bits_per_dim_discrete", "flow"):
        assert f"{found[key]:.4f} ± {found[key + '_error']:.4f}" in stdout


def test_one_image_has_no_standard_error(refuses):
    flags = ["--path_to_model", "a.pth", "--likelihood", "--flow", 1]
    refuses("validation", *flags, words=("--flow 1", "0 or an integer >= 2"))


def test_an_unconditional_network_pays_for_no_label(cli, few_digits, tiny_checkpoint):
    path = tiny_checkpoint(class_conditional=False)
    status, stdout, _ = cli("validation", "--path_to_model", path, "--likelihood")
    (written,) = Path("outputs").glob("*/likelihood_tiny_60_*.json")
    found = json.loads(written.read_text())
    assert status == 0 and "label" not in stdout and found["n"] == 60
    assert found["label"] == 0 and found["bits_per_dim"] == found["bits_per_dim_given_label"]


def test_what_has_no_likelihood_is_refused(refuses, few_digits, tiny_checkpoint):
    path = tiny_checkpoint()
    for flag in (["--guidance", 2], ["--tstr"], ["--steps", 5], ["--images", "a.npz"]):
        refuses("validation", "--path_to_model", path, "--likelihood", *flag, words=flag[:1])
    refuses("validation", "--path_to_model", path, "--flow", 5, words=("--flow 5", "--likelihood"))
    cfg = TrainConfig(width=8, timesteps=20, dataset="synthetic", teacher="a.pth")
    save_model("few.pth", cfg, build_model(cfg, DIGITS).state_dict())
    flags = ["--path_to_model", "few.pth", "--likelihood"]
    refuses("validation", *flags, words=("--likelihood", "distilled"))


def test_every_level_of_an_image_is_denoised_with_its_label():
    data = Patterns([3.0, 2, 1])
    images, labels = data.draw(60, 1)

    def told(z, sigma, y):
        return to_model_range(data.images)[y]

    fitted = L.Likelihood(told, SIGMAS, images, labels, batch_size=100)
    assert fitted.bound(images, labels).diffusion.max() == 0


def test_what_samplers_clamp_costs_nothing():
    white, beyond = torch.ones(1, 1, 1, 2, 2), torch.full((1, 1, 1, 2, 2), 1.5)
    assert L.squared_error(white, beyond) == 0 and L.squared_error(-white, beyond) == 16


def test_bits_per_dim_have_the_standard_error_of_a_mean():
    nats = torch.tensor([1.0, 2.0, 4.0]) * math.log(2) * 10
    expected = (7 / 3, statistics.stdev([1, 2, 4]) / 3**0.5)
    assert bits.per_dim(nats, 10) == pytest.approx(expected)


def test_the_flow_is_compared_with_the_bound_on_the_same_images(cli, few_digits, tiny_checkpoint):
    flags = ["--path_to_model", tiny_checkpoint(), "--likelihood", "--num_samples", 6]
    assert cli("validation", *flags, "--flow", 6, "--json", "bits.json")[0] == 0
    found = json.loads(Path("bits.json").read_text())
    apart = found["flow"] - found["bits_per_dim"]
    assert found["flow_minus_bound"] == pytest.approx(apart)
