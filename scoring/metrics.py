"""Feature vectors -> numbers. Pure functions in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

NEAREST_K = 5  # Naeem et al. 2020
CHUNK_ELEMENTS = 10_000_000

Score = tuple[float, float]  # a value and its standard error


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of features (N, D), N >= 2: mean (D,) and unbiased covariance (D, D), float64."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64. The trace of the root is taken of the
    symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues: those are real and at least 0,
    so that singular covariances (fewer images than features) need no special care.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    eigenvalues = torch.linalg.eigvalsh(root1 @ cov2 @ root1)
    trace_root = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return distance.item()


def fid(features: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of feature vectors, (N, D) and (M, D); N, M >= 2."""
    return frechet_distance(*mean_and_covariance(features), *mean_and_covariance(reference))


def fid_spread(features: Tensor, reference: Tensor, resamples: int = 20, seed: int = 0) -> float:
    """Standard deviation of `fid` over bootstrap resamples (Efron 1979) of `features`.

    The reference stays as it is. Only the spread of the resampled values means something: their
    mean is too high, because a resample repeats some vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    x, count = features.double(), len(features)
    mu2, cov2 = mean_and_covariance(reference)
    values = []
    for _ in range(resamples):
        drawn = torch.randint(count, (count,), generator=generator)
        weights = torch.bincount(drawn, minlength=count)
        cov = torch.cov(x.T, fweights=weights).reshape(cov2.shape)
        values.append(frechet_distance(mu2, cov2, weights.double() @ x / count, cov))
    return torch.tensor(values).std().item()


def kid(features: Tensor, reference: Tensor, seed: int = 0) -> Score:
    """Kernel Inception distance, unbiased at any n (Binkowski et al. 2018): mean, standard error.

    The mean of `polynomial_mmd2` over disjoint random blocks of 1,000 vectors, the usual size, or
    of a tenth of the smaller set, so that there are ten blocks to take a standard error from.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(len(features), len(reference))
    size = max(2, min(1000, count // 10))
    blocks = [
        torch.randperm(len(x), generator=generator)[: count // size * size].split(size)
        for x in (features, reference)
    ]
    values = [polynomial_mmd2(features[i], reference[j]) for i, j in zip(*blocks, strict=True)]
    return mean_and_error(torch.tensor(values, dtype=torch.float64))


def polynomial_mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of x (N, D) and y (M, D), float64.

    With the kernel (x.y / D + 1)^3 (Gretton et al. 2012, eq. 3; Binkowski et al. 2018, section 4).
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    within = mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y))
    return (within - 2 * kernel(x, y).mean()).item()


def precision_recall_density_coverage(
    features: Tensor, reference: Tensor, k: int = NEAREST_K
) -> dict[str, Score]:
    """How much of one set lies among the other: each a mean and its standard error.

    A ball around each vector reaches to its k-th nearest neighbour in its own set.
    precision: share of `features` inside some ball of the reference (Kynkaanniemi et al. 2019).
    recall:    share of the reference inside some ball of `features`.
    density:   in how many balls of the reference one of `features` lies, over k; outliers of the
               reference count less. Not limited to 1 (Naeem et al. 2020, eq. 2).
    coverage:  share of the reference with one of `features` in its ball (Naeem et al. 2020, eq. 3).

    Raises ValueError when a set has no k-th neighbour, k + 1 vectors being needed.
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"needs more than k = {k} vectors")
    fake, real = features.double(), reference.double()
    fake_radii, real_radii = _squared_radii(fake, k), _squared_radii(real, k)
    balls = torch.zeros(len(fake), dtype=torch.float64)
    recalled, covered = [], []
    for rows in _chunks(real, len(fake)):
        distances = squared_distances(real[rows], fake)
        inside = distances < real_radii[rows, None]
        balls += inside.sum(dim=0)
        covered.append(inside.any(dim=1))
        recalled.append((distances < fake_radii).any(dim=1))
    return {
        "precision": mean_and_error((balls > 0).double()),
        "recall": mean_and_error(torch.cat(recalled).double()),
        "density": mean_and_error(balls / k),
        "coverage": mean_and_error(torch.cat(covered).double()),
    }


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Of each query (N, D), the nearest of `references` (M, D): distance (N,) and index (N,)."""
    queries, references = queries.double(), references.double()
    found = [
        squared_distances(queries[rows], references).min(dim=1)
        for rows in _chunks(queries, len(references))
    ]
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances.sqrt(), indices


def share_below(x: Tensor, y: Tensor) -> float:
    """The chance that one of x (N,) is less than one of y (M,), ties counting half.

    Mann & Whitney 1947. Of distances to the training set, with x from samples and y from test
    images, this is the data-copying test of Meehan et al. 2020: 0.5 is fresh data, 1 copies.
    """
    ordered = y.sort().values
    above = len(y) - torch.searchsorted(ordered, x, right=True)
    not_below = len(y) - torch.searchsorted(ordered, x)
    return (above + not_below).double().mean().item() / (2 * len(y))


def mean_and_error(values: Tensor) -> Score:
    """Mean and standard error of the mean of values (N,), N >= 2."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D) and (M, D) float64 -> (N, M); by a matrix product, exact to about 1e-15 |a|^2."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _chunks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Row numbers of x in chunks whose (rows, columns) float64 matrix stays below 80 MB."""
    return torch.arange(len(x)).split(max(1, CHUNK_ELEMENTS // columns))


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each of x (N, D) to its k-th nearest neighbour, itself not counted."""
    parts = [squared_distances(x[r], x).kthvalue(k + 1, dim=1).values for r in _chunks(x, len(x))]
    return torch.cat(parts)


# Each function takes features (N, D) and (M, D) and returns a Score for each of its names.
METRIC_FUNCTIONS: dict[tuple[str, ...], Callable[[Tensor, Tensor], dict[str, Score]]] = {
    ("fid",): lambda x, y: {"fid": (fid(x, y), fid_spread(x, y))},
    ("kid",): lambda x, y: {"kid": kid(x, y)},
    ("precision", "recall", "density", "coverage"): precision_recall_density_coverage,
}
METRICS = tuple(name for names in METRIC_FUNCTIONS for name in names)


def all_scores(features: Tensor, reference: Tensor) -> dict[str, Score]:
    """Every one of METRICS with its standard error, of features (N, D) against (M, D)."""
    found: dict[str, Score] = {}
    for function in METRIC_FUNCTIONS.values():
        found |= function(features, reference)
    return found
