import math

import pytest
import torch

from scoring import metrics
from scoring.features import MNISTFeatures
from scoring.metrics import (
    METRICS,
    Reference,
    all_scores,
    fid,
    fid_spread,
    frechet_distance,
    kid,
    mean_and_covariance,
    nearest,
    precision_recall_density_coverage,
    share_below,
)
from utils.synthetic import synthetic_digits


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(dim, seed):
    a = normal(dim, dim, seed=seed)
    return a @ a.T


def test_equal_covariances_leave_the_distance_of_the_means():
    mu1, mu2, cov = normal(5, seed=1), normal(5, seed=2), covariance(5, 3)
    expected = (mu1 - mu2).square().sum().item()
    assert frechet_distance(mu1, cov, mu2, cov) == pytest.approx(expected, abs=1e-9)


def test_diagonal_covariances_add_the_distance_of_the_deviations():
    mu1, mu2 = normal(5, seed=1), normal(5, seed=2)
    a, b = normal(5, seed=3) ** 2, normal(5, seed=4) ** 2
    expected = (mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(mu1, a.diag(), mu2, b.diag()) == pytest.approx(expected.item())


def test_it_is_symmetric_and_invariant_to_rotation():
    mu1, mu2 = normal(6, seed=1), normal(6, seed=2)
    c1, c2 = covariance(6, 3), covariance(6, 4)
    q = torch.linalg.qr(normal(6, 6, seed=5))[0]
    there = frechet_distance(mu1, c1, mu2, c2)
    assert frechet_distance(mu2, c2, mu1, c1) == pytest.approx(there)
    assert frechet_distance(q @ mu1, q @ c1 @ q.T, q @ mu2, q @ c2 @ q.T) == pytest.approx(there)


def test_singular_covariances_are_exact():
    """Fewer images than features: the root of a product of rank-one matrices, by hand."""
    u, v = normal(4, seed=1), normal(4, seed=2)
    zero = torch.zeros(4, dtype=torch.float64)
    expected = u @ u + v @ v - 2 * (u @ v).abs()
    got = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert got == pytest.approx(expected.item())


def test_fid_of_a_set_with_itself_is_zero_and_with_a_shifted_one_the_shift():
    x = normal(200, 8).float()
    assert abs(fid(x, x)) < 1e-6
    assert fid(x, x + 2) == pytest.approx(4 * 8, rel=1e-5)


def test_fid_against_the_scipy_formula():
    from scipy.linalg import sqrtm

    x, y = normal(300, 7, seed=1), normal(250, 7, seed=2) @ covariance(7, 3) + 1
    (m1, c1), (m2, c2) = mean_and_covariance(x), mean_and_covariance(y)
    root = torch.from_numpy(sqrtm((c1 @ c2).numpy()).real)
    expected = (m1 - m2).square().sum() + (c1 + c2 - 2 * root).trace()
    assert fid(x, y) == pytest.approx(expected.item(), rel=1e-8)


def test_kid_against_a_hand_sum():
    x, y = normal(4, 3, seed=1), normal(5, 3, seed=2)

    def k(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 3 + 1) ** 3

    within_x = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 12
    within_y = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    between = sum(k(a, b) for a in x for b in y) / 20
    assert kid(x, y)[0] == pytest.approx(within_x + within_y - 2 * between)


def test_kid_is_unbiased_at_any_size():
    for count in (30, 300):
        values = [kid(normal(count, 4, seed=s), normal(count, 4, seed=s + 999)) for s in range(60)]
        means = torch.tensor([value for value, _ in values])
        assert means.mean().abs() < 3 * means.std() / 60**0.5
    value, error = kid(normal(400, 4, seed=1) + 0.5, normal(500, 4, seed=2))
    assert value > 5 * error > 0


def test_precision_and_recall_of_the_same_distribution_are_near_one():
    scores = precision_recall_density_coverage(normal(2000, 4, seed=1), normal(2000, 4, seed=2))
    for name in ("precision", "recall", "density", "coverage"):
        assert scores[name][0] == pytest.approx(1, abs=0.06), name
        assert 0 < scores[name][1] < 0.02


def two_modes(count, seed):
    x = normal(count, 4, seed=seed)
    x[: count // 2] += 50
    return x


def test_mode_collapse_halves_recall_and_coverage_but_not_precision():
    samples, reference = normal(1000, 4, seed=1), two_modes(1000, seed=2)
    scores = precision_recall_density_coverage(samples, reference)
    assert scores["precision"][0] > 0.9 and scores["density"][0] > 0.8
    assert 0.4 < scores["recall"][0] < 0.5 and 0.4 < scores["coverage"][0] < 0.51


def test_mode_invention_halves_precision_and_density_but_not_recall():
    samples, reference = two_modes(1000, seed=1), normal(1000, 4, seed=2)
    scores = precision_recall_density_coverage(samples, reference)
    assert 0.4 < scores["precision"][0] < 0.5 and scores["density"][0] < 0.55
    assert scores["recall"][0] > 0.9
    # 500 among 1,000: the chance that one is among the 5 nearest (Naeem et al. 2020, section 3.2)
    assert scores["coverage"][0] == pytest.approx(1 - (2 / 3) ** 5, abs=0.03)


def test_precision_and_the_rest_by_hand():
    """On a line, k = 1. Real balls: 0 and 1 reach 1, 5 reaches 4. Fake balls: both reach 0.5."""
    real, fake = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.25], [0.75], [20.0]])
    scores = precision_recall_density_coverage(fake, real, k=1)
    assert scores["precision"][0] == pytest.approx(2 / 3)  # 20 is in no real ball
    assert scores["recall"][0] == 1  # 5 lies in the ball of 20, which reaches 19.25
    assert scores["density"][0] == pytest.approx((2 + 2 + 0) / 3)
    assert scores["coverage"][0] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="k = 3"):
        precision_recall_density_coverage(fake, real, k=3)


def every_score(features, reference):
    scores = {"fid": (fid(features, reference), fid_spread(features, reference))}
    scores["kid"] = kid(features, reference)
    return scores | precision_recall_density_coverage(features, reference)


def stated_over_true(rounds, reference, monkeypatch):
    """Of each metric, the mean spread stated over the true one.

    rounds: lists of sets that have no vector in common. The truth is the standard deviation over a
    round's sets. As many say their spread as the first round has sets, at most 20.
    """
    reference = Reference(reference)
    stated = [every_score(x, reference) for x in rounds[0][:20]]
    for effort in ("HALVINGS", "PAIRS"):  # the values do not depend on it
        monkeypatch.setattr(metrics, effort, 1)
    values = [[every_score(x, reference) for x in sets] for sets in rounds]
    ratios = {}
    for name in stated[0]:
        of_sets = torch.tensor([[scores[name][0] for scores in sets] for sets in values])
        spread = torch.tensor([scores[name][1] for scores in stated]).mean()
        ratios[name] = (spread / of_sets.var(dim=1).mean().sqrt()).item()
    return ratios


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.8, 0.3)])
def test_spreads_are_those_of_fresh_gaussian_samples(scale, shift, monkeypatch):
    """As good as the reference, where the first order of fid and kid vanishes, and far from it."""
    axes = torch.linspace(1.5, 0.5, 12, dtype=torch.float64)
    sets = [normal(150, 12, seed=s) * axes * scale + shift for s in range(1, 201)]
    ratios = stated_over_true([sets], normal(500, 12) * axes, monkeypatch)
    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), ratios


def test_the_first_order_of_fid_and_kid_vanishes_in_samples_as_good_as_real_ones():
    """There the jackknife says 1.41 times the truth (root mean square), the bootstrap 1.73."""
    axes = torch.linspace(1.5, 0.5, 12, dtype=torch.float64)
    reference = Reference(normal(4000, 12) * axes)
    sets = [normal(150, 12, seed=s) * axes for s in range(1, 201)]
    values = torch.tensor([[fid(x, reference), kid(x, reference)[0]] for x in sets])
    spreads = torch.tensor([[fid_spread(x, reference), kid(x, reference)[1]] for x in sets[:60]])
    for ratio in (spreads.square().mean(dim=0).sqrt() / values.std(dim=0)).tolist():
        assert 0.8 < ratio < 1.25


def orders(monkeypatch, score, x, y):
    """What `score` hands to `_second_order`: V1 + 2 V2 and V2."""
    handed = []
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_second_order", lambda *both: handed.append(both) or 0.0)
        score(x, y)
    return handed[0]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_orders_of_fid_are_derivatives_of_the_distance(shift, monkeypatch):
    """By the weights of the samples (von Mises 1947): the first, and half the second.

    Along a sample's weight, from which all others give way: so g_i, and H_ij + g_i + g_j.
    """
    x, y = normal(301, 3, seed=1) @ covariance(3, 3) + shift, normal(300, 3, seed=2)
    x, y = x / 10, y / 10
    mu2, cov2 = mean_and_covariance(y)
    root2 = metrics.symmetric_root(cov2)

    def distance(weights):
        weights = weights / weights.sum()
        mu = weights @ x
        cov = (x - mu).T * weights @ (x - mu)
        roots = torch.linalg.eigvalsh(root2 @ cov @ root2).sqrt().sum()
        return (mu - mu2).square().sum() + cov.trace() + cov2.trace() - 2 * roots

    monkeypatch.setattr(metrics, "PAIRS", 10**6)  # all of them
    equal = torch.full((301,), 1 / 301, dtype=torch.float64)
    g = torch.autograd.functional.jacobian(distance, equal)
    h = (torch.autograd.functional.hessian(distance, equal) + g[:, None] + g) / 2
    squares = (h.square().sum() - h.diag().square().sum()).item() / (301 * 300)
    jackknife, second = orders(monkeypatch, fid_spread, x, y)
    assert jackknife == pytest.approx(g.var().item() / 301, rel=0.01)
    assert second == pytest.approx(2 * squares / 301**2, rel=0.01)


def test_the_orders_of_kid_by_hand(monkeypatch):
    x, y = normal(101, 3, seed=1) / 5, normal(300, 3, seed=2) / 4
    within, between = ((a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (x, y)))
    others = 1 - torch.eye(101, dtype=torch.float64)
    rows = (within * others).sum(dim=1) / 100
    centred = (within - rows[:, None] - rows + rows.mean()) * others
    first = 4 * (rows - between.mean(dim=1)).var() / 101
    jackknife, second = orders(monkeypatch, kid, x, y)
    assert jackknife == pytest.approx(first.item())
    assert second == pytest.approx(2 * centred.square().sum().item() / (101 * 100) ** 2, rel=0.03)


def test_a_spread_is_the_sum_of_its_orders():
    assert metrics._second_order(5.0, 1.0) == 2.0  # V1 = 3, and V2
    assert metrics._second_order(1.0, 1.0) == 1.0  # V1 is not below 0


def test_the_spread_of_coverage_counts_what_one_and_two_samples_cover(monkeypatch):
    """By leaving them out: of the reference's balls, those that only they keep covered."""
    monkeypatch.setattr(metrics, "HALVINGS", 1)
    samples, reference = normal(15, 2, seed=1), normal(40, 2, seed=2)

    def lost(*out):
        kept = sorted(set(range(15)) - set(out))
        return 40 * (
            whole - precision_recall_density_coverage(samples[kept], reference)["coverage"][0]
        )

    whole, spread = precision_recall_density_coverage(samples, reference)["coverage"]
    alone = torch.tensor([lost(a) for a in range(15)])
    pairs = [lost(a, b) - alone[a] - alone[b] for a in range(15) for b in range(a)]
    first, second = (alone - alone.mean()).square().sum(), torch.stack(pairs).square().sum()
    assert spread == pytest.approx((first / (1 + second / first)).item() ** 0.5 / 40, rel=1e-4)
    assert second > 0


def test_the_spread_of_recall_is_that_of_halves():
    samples, reference = normal(81, 3, seed=1), normal(90, 3, seed=2) * 1.5
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(metrics.HALVINGS):
        half = torch.randperm(81, generator=generator) < 40
        inside = []
        for part in (samples[half], samples[~half]):
            reach = torch.cdist(part, part).sort(dim=1).values[:, 5]
            inside.append((torch.cdist(reference, part) < reach).any(dim=1).double())
        differences = inside[0] - inside[1]
        total += differences.mean() ** 2 + differences.square().mean() / 90
    expected = (total / metrics.HALVINGS / 4) ** 0.5
    found = precision_recall_density_coverage(samples, reference)["recall"][1]
    assert found == pytest.approx(expected.item(), rel=0.01)


@pytest.fixture(scope="module")
def digit_features():
    """Features (8,400, 128) of synthetic digits by the shipped classifier, and their labels."""
    images, labels = synthetic_digits(8_400, seed=5)
    network = MNISTFeatures()
    return torch.cat([network(batch) for batch in images.split(network.batch_size)]), labels


@pytest.mark.parametrize("classes", [10, 7])
def test_spreads_are_those_of_fresh_digits(classes, digit_features, monkeypatch):
    """In features of digits: all ten classes, as in the reference, and only seven of them."""
    features, labels = digit_features
    reference, features, labels = features[:400], features[400:], labels[400:]
    pool = features[labels < classes]
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(pool), generator=generator) for _ in range(6)]
    rounds = [[pool[part] for part in order.split(250) if len(part) == 250] for order in orders]
    ratios = stated_over_true(rounds, reference, monkeypatch)
    assert all(0.8 < ratio < 1.25 for ratio in ratios.values()), ratios


def test_spreads_of_few_and_of_equal_samples():
    """Fewer samples than features, as few as there can be, and copies of one image."""
    reference = normal(60, 20)
    few = [normal(6, 20, seed=1), normal(15, 20, seed=2), torch.ones(30, 20)]
    for features in few:
        for name, (value, spread) in every_score(features, reference).items():
            assert math.isfinite(value) and math.isfinite(spread) and spread >= 0, name


def test_a_reference_prepared_once_changes_nothing():
    x, y = normal(50, 3, seed=1), normal(70, 3, seed=2)
    assert every_score(x, Reference(y)) == every_score(x, y) == all_scores(x, y)
    assert tuple(all_scores(x, y)) == METRICS


def test_chunks_change_nothing(monkeypatch):
    x, y = normal(50, 3, seed=1), normal(70, 3, seed=2)
    whole, near = precision_recall_density_coverage(x, y), nearest(x, y)
    whole_kid = kid(x, y)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 200)
    assert precision_recall_density_coverage(x, y) == whole
    assert torch.equal(nearest(x, y)[1], near[1])
    assert kid(x, y) == pytest.approx(whole_kid)


def test_nearest_finds_a_copy():
    references = normal(40, 6, seed=1)
    distances, indices = nearest(references[[7, 3]] + 1e-3, references)
    assert indices.tolist() == [7, 3] and distances.max() < 0.01
    far = references + 1000  # where rounding makes some squared distances less than 0
    assert nearest(far, far)[0].max() < 1e-3


def test_no_vector_is_its_own_neighbour_even_among_copies():
    x = torch.cat([normal(5, 3, seed=1)] * 4)
    indices, distances = metrics._neighbours(x, 6)
    assert indices.shape == distances.shape == (20, 6)
    assert (indices != torch.arange(20)[:, None]).all()
    for near in (distances[:, :3] < 1e-12, distances[:, 3:] > 1e-6):  # three copies, then others
        assert near.all()
    torch.testing.assert_close((x[:, None] - x[indices]).square().sum(dim=2), distances)


def test_share_below_counts_pairs():
    x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.5])
    pairs = [(a < b) + 0.5 * (a == b) for a in x for b in y]
    assert share_below(x, y) == pytest.approx(sum(map(float, pairs)) / 6)
    same = torch.arange(100.0)
    assert share_below(same, same) == 0.5 and share_below(same, same + 1000) == 1


def test_equal_to_torch_fidelity_and_prdc():
    """Independent implementations, on the same features."""
    prdc = pytest.importorskip("prdc")
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(300, 16, seed=1).abs(), normal(300, 16, seed=2).abs() * 1.1
    theirs = prdc.compute_prdc(y.numpy(), x.numpy(), nearest_k=5)
    ours = precision_recall_density_coverage(x, y)
    for name, value in theirs.items():
        assert ours[name][0] == pytest.approx(value, rel=1e-6), name
    theirs = fidelity.kid_features_to_metric(
        x, y, kid_subsets=1, kid_subset_size=300, verbose=False
    )
    expected = theirs["kernel_inception_distance_mean"]
    assert kid(x, y)[0] == pytest.approx(expected, rel=1e-6)
