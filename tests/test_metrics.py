import pytest
import torch

from utils.metrics import fid, frechet_distance, mean_and_covariance


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
