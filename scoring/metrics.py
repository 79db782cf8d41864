"""Feature vectors -> numbers, each with its spread. Pure functions in float64.

A spread is the standard deviation of the number over fresh draws of the same number of samples,
with a fixed reference. Write the variance as V1 + V2 + ..., where Vr comes from interactions of r
samples (Hoeffding 1948; Efron & Stein 1981). For samples as good as real ones, the first order of
`fid` and `kid` vanishes, which leaves the second. Methods that remove or repeat single samples then
give too much, on average V1 + 2 V2 (jackknife) or V1 + 3 V2 (bootstrap), so V2 is estimated
separately.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

NEAREST_K = 5  # Naeem et al. 2020
CHUNK_ELEMENTS = 3_000_000
PAIRS = 20_000  # of samples, to estimate the second order of `fid`
HALVINGS = 100  # random splits of the samples, to estimate the spread of recall
BALLS = 32  # checked for each reference vector when samples are left out

Score = tuple[float, float]  # a value and its standard deviation over fresh samples


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D), float64, of features (N, D), N >= 2."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1)


def symmetric_root(cov: Tensor) -> Tensor:
    """The square root of a covariance (D, D), which may be singular."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(
    mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor, root2: Tensor | None = None
) -> float:
    """Squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), float64. The trace of the root is computed from
    the symmetric C2^(1/2) C1 C2^(1/2), which has the same eigenvalues. They are real and at least
    0, so singular covariances (fewer images than features) need no special care. Passing `root2`,
    the root of C2, saves time.
    """
    root2 = symmetric_root(cov2) if root2 is None else root2
    eigenvalues = torch.linalg.eigvalsh(root2 @ cov1 @ root2)
    trace_root = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return distance.item()


class Reference:
    """Vectors (M, D) to compare several sets with; caches what all these comparisons need.

    Every metric here also takes a plain tensor, and then computes everything for that one set.
    """

    def __init__(self, features: Tensor):
        self.features = features.double()
        self._radii: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, vectors: "Tensor | Reference") -> "Reference":
        return vectors if isinstance(vectors, Reference) else cls(vectors)

    @cached_property
    def gaussian(self) -> tuple[Tensor, Tensor]:
        return mean_and_covariance(self.features)

    @cached_property
    def root(self) -> Tensor:
        return symmetric_root(self.gaussian[1])

    @cached_property
    def kernel_mean(self) -> Tensor:
        """E k(y, y') over pairs."""
        return _kernel_sums(self.features, self.features)[0].mean() / (len(self.features) - 1)

    def radii(self, k: int) -> Tensor:
        """Squared distance of each vector to its k-th nearest neighbour, (M,)."""
        if k not in self._radii:
            self._radii[k] = _neighbours(self.features, k)[1][:, -1]
        return self._radii[k]


def fid(features: Tensor, reference: Tensor | Reference) -> float:
    """Frechet distance of two sets of feature vectors, (N, D) and (M, D); N, M >= 2."""
    reference = Reference.of(reference)
    return frechet_distance(*mean_and_covariance(features), *reference.gaussian, reference.root)


def fid_spread(features: Tensor, reference: Tensor | Reference, seed: int = 0) -> float:
    """Standard deviation of `fid` over fresh draws of the features (N, D), to second order.

    With C2^(1/2) C C2^(1/2) = A S^2 A', w = S^-1 A' C2^(1/2) (x - mu) is x - mu whitened, and
    fid changes with the mean of l(x) over the samples and the mean of h(x, y) over their pairs:

        l(x) = 2 (x - mu).(mu - mu2) + |x - mu|^2 - w'Sw
        h(x, y) = u.s + u'Ku, centred, where u = w(x) w(y) elementwise, s is the diagonal of S
        and K_ab = s_a s_b / (2 (s_a + s_b)), the divided differences of the square root

    (Daleckii & Krein 1965; if C = C2, u'Ku is the Bures metric.) Var l / N is the jackknife's
    V1 + 2 V2 (Efron & Stein 1981), and V2 = 2 E h^2 / N^2, from random pairs.
    """
    count, reference = len(features), Reference.of(reference)
    (mu, cov), (mu2, _), root2 = mean_and_covariance(features), reference.gaussian, reference.root
    squares, axes = torch.linalg.eigh(root2 @ cov @ root2)
    s = squares.clamp(min=0).sqrt()
    seen = s > 1e-6 * s.max()  # the rest is rounding error, from fewer samples than features
    s, axes = s[seen], axes[:, seen]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    centred = features.double()[order] - mu
    white = centred @ (root2 @ axes) / s
    linear = 2 * centred @ (mu - mu2) + centred.square().sum(dim=1) - white.square() @ s
    curvature = s[:, None] * s / (2 * (s[:, None] + s))
    own = white.square() @ s / 4
    shifts = range(1, 1 + max(1, min(PAIRS // count, (count - 1) // 2)))
    total = 0.0
    for shift in shifts:
        u = white * white.roll(shift, 0)
        h = u @ s + (u @ curvature * u).sum(dim=1) - own - own.roll(shift) + s.sum() / 4
        total += h.square().mean().item()
    return _second_order(linear.var().item() / count, 2 * total / len(shifts) / count**2)


def _second_order(jackknife: float, second: float) -> float:
    """Standard deviation from V1 + 2 V2 and V2; a negative estimate of V1 becomes 0.

    If V1 is 0, this clipping overestimates the spread on average: 1.1 times if ten directions of
    the features matter, 1.25 times if one or two do, which may happen with the kernel of `kid`.
    """
    return (second + max(jackknife - 2 * second, 0)) ** 0.5


def kid(features: Tensor, reference: Tensor | Reference) -> Score:
    """Kernel Inception distance: unbiased squared maximum mean discrepancy over all pairs.

    Of features (N, D) and a reference (M, D), with the kernel k(x, y) = (x.y / D + 1)^3 (Gretton et
    al. 2012, eq. 3; Binkowski et al. 2018, section 4); N, M >= 2. It can be negative.
    The spread follows from the orders of a U-statistic: V1 = 4 Var(E k(x, x') - E k(x, y)) / N, and
    V2 = 2 E k~(x, x')^2 / (N (N - 1)) with k~ centred in x and x' (Serfling 1980, section 5.2).
    """
    x, reference = features.double(), Reference.of(reference)
    count = len(x)
    within, squares = _kernel_sums(x, x)
    within = within / (count - 1)
    between = _kernel_sums(x, reference.features, same=False)[0] / len(reference)
    value = within.mean() + reference.kernel_mean - 2 * between.mean()
    jackknife = 4 * (within - between).var() / count
    centred = squares / (count - 1) - 2 * within.square().mean() + within.mean() ** 2
    second = 2 * centred.clamp(min=0) / (count * (count - 1))
    return value.item(), _second_order(jackknife.item(), second.item())


def _kernel_sums(x: Tensor, y: Tensor, same: bool = True) -> tuple[Tensor, Tensor]:
    """Sums over y of k(x, y) for each x, (N,), and the mean over x of the sums of k(x, y)^2.

    If x and y are the `same` vectors, pairs of a vector with itself are left out.
    """
    sums, squares = [], 0.0
    for rows in _chunks(x, len(y)):
        base = (x[rows] @ y.T).div_(x.shape[1]).add_(1)
        kernel = base.square().mul_(base)
        if same:
            kernel[torch.arange(len(rows)), rows] = 0
        sums.append(kernel.sum(dim=1))
        squares += kernel.square_().sum()
    return torch.cat(sums), squares / len(x)


def precision_recall_density_coverage(
    features: Tensor, reference: Tensor | Reference, k: int = NEAREST_K
) -> dict[str, Score]:
    """How much two sets overlap, by four scores, each with its spread.

    A ball around each vector extends to its k-th nearest neighbour in its own set.
    precision: share of `features` inside some ball of the reference (Kynkaanniemi et al. 2019).
    recall:    share of the reference inside some ball of `features`.
    density:   number of reference balls that contain one of `features`, over k; outliers of the
               reference count less. Can exceed 1 (Naeem et al. 2020, eq. 2).
    coverage:  share of the reference with one of `features` in its ball (Naeem et al. 2020, eq. 3).

    Raises ValueError if a set has fewer than k + 1 vectors. The spread of recall needs 2 (k + 1).
    """
    if min(len(features), len(reference)) <= k:
        raise ValueError(f"needs more than k = {k} vectors")
    fake, reference = features.double(), Reference.of(reference)
    real, real_radii = reference.features, reference.radii(k)
    neighbours, reach = _neighbours(fake, 5 * k)
    fake_radii = reach[:, k - 1]
    balls = torch.zeros(len(fake), dtype=torch.float64)
    inside, around = [], []
    for rows in _chunks(real, len(fake)):
        distances, radii = squared_distances(real[rows], fake), real_radii[rows, None]
        balls += (distances < radii).sum(dim=0)
        gaps, indices = distances.topk(min(3, len(fake)), dim=1, largest=False)
        inside.append(((gaps < radii).sum(dim=1), indices[:, :2]))
        relative = distances / fake_radii.clamp(min=1e-300)
        indices = relative.topk(min(BALLS, len(fake)), dim=1, largest=False).indices
        around.append((distances.gather(1, indices), indices))
    samples_inside, samples = (torch.cat(parts) for parts in zip(*inside, strict=True))
    distances, owners = (torch.cat(parts) for parts in zip(*around, strict=True))
    recalled = (distances < fake_radii[owners]).any(dim=1)
    covered = (samples_inside > 0).double().mean().item()
    return {
        "precision": mean_and_error((balls > 0).double()),
        "recall": (
            recalled.double().mean().item(),
            _recall_spread(distances, owners, neighbours, reach, k),
        ),
        "density": mean_and_error(balls / k),
        "coverage": (covered, _coverage_spread(samples_inside, samples, len(fake))),
    }


def _coverage_spread(inside: Tensor, samples: Tensor, count: int) -> float:
    """Spread of coverage, from the balls that are covered by one sample alone, or by just two.

    inside (M,): how many of the `count` samples are in each ball, where 3 means 3 or more; samples
    (M, 2): the nearest two samples, which count if they are inside. Square and sum what m samples
    cover together but no fewer do: the mean is Nm = sum of (r choose m) Vr over r, so V1 + V2 + ...
    is N1 - N2 + N3 - ..., the jackknife and its corrections (Efron & Stein 1981). This function
    uses the Pade approximant N1 / (1 + N2 / N1). For a ball that contains L samples on average, it
    gives L / (1 + L / 2) instead of the exact 1 - exp(-L).
    """
    alone = torch.bincount(samples[inside == 1, 0], minlength=count).double()
    first = (alone - alone.mean()).square().sum().item()
    pairs = samples[inside == 2].sort(dim=1).values
    second = pairs.unique(dim=0, return_counts=True)[1].double().square().sum().item()
    return first / (first + second) ** 0.5 / len(inside) if first else 0.0


def _recall_spread(
    distances: Tensor, owners: Tensor, neighbours: Tensor, reach: Tensor, k: int, seed: int = 0
) -> float:
    """Spread of recall, from the differences in recall between random halves of the samples.

    Half the mean square difference of two halves is the variance at half the samples (half-samples:
    McCarthy 1969; leaving out many also works if a score is not smooth: Shao & Wu 1989). One part
    of it is common to reference vectors that lie in the same balls: it halves when the number of
    samples doubles. The other part, which each vector adds by being in or out, stays the same.
    A half's ball extends to the k-th neighbour within the half.

    distances, owners (M, B): from each reference vector to the samples whose balls may contain it.
    neighbours, reach (N, K): the nearest neighbours of each sample and their distances.
    """
    generator = torch.Generator().manual_seed(seed)
    count, total = len(neighbours), torch.zeros((), dtype=torch.float64)
    for _ in range(HALVINGS):
        half = torch.randperm(count, generator=generator) < count // 2
        before = (half[neighbours] == half[:, None]).cumsum(dim=1) < k
        last = before.sum(dim=1, keepdim=True).clamp(max=neighbours.shape[1] - 1)
        inside = distances < reach.gather(1, last)[:, 0][owners]
        first, second = (inside & half[owners]).any(dim=1), (inside & ~half[owners]).any(dim=1)
        differences = first.double() - second.double()
        total += differences.mean().square() + differences.square().mean() / len(differences)
    return (total / HALVINGS).sqrt().item() / 2


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) and index (N,) of the nearest of `references` (M, D) to each query (N, D)."""
    queries, references = queries.double(), references.double()
    found = [
        squared_distances(queries[rows], references).min(dim=1)
        for rows in _chunks(queries, len(references))
    ]
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances.sqrt(), indices


def share_below(x: Tensor, y: Tensor) -> float:
    """The probability that one of x (N,) is less than one of y (M,); ties count half.

    Mann & Whitney 1947. For distances to the training set, with x from samples and y from test
    images, this is the data-copying test of Meehan et al. 2020: 0.5 means fresh data, 1 copies.
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
    """Row numbers of x in chunks whose (rows, columns) float64 matrix stays below 24 MB."""
    return torch.arange(len(x)).split(max(1, CHUNK_ELEMENTS // columns))


def _neighbours(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest neighbours of each of x (N, D): indices and squared distances (N, K).

    K is the lesser of `count` and N - 1.
    """
    parts = []
    for rows in _chunks(x, len(x)):
        distances = squared_distances(x[rows], x)
        distances[torch.arange(len(rows)), rows] = -1  # itself first, even among copies
        found = distances.topk(min(count + 1, len(x)), dim=1, largest=False)
        parts.append((found.indices[:, 1:], found.values[:, 1:]))
    indices, distances = (torch.cat(part) for part in zip(*parts, strict=True))
    return indices, distances


# Each function takes features (N, D) and (M, D) and returns a Score for each of its names.
METRIC_FUNCTIONS: dict[tuple[str, ...], Callable[[Tensor, Tensor], dict[str, Score]]] = {
    ("fid",): lambda x, y: {"fid": (fid(x, y), fid_spread(x, y))},
    ("kid",): lambda x, y: {"kid": kid(x, y)},
    ("precision", "recall", "density", "coverage"): precision_recall_density_coverage,
}
METRICS = tuple(name for names in METRIC_FUNCTIONS for name in names)


def all_scores(features: Tensor, reference: Tensor | Reference) -> dict[str, Score]:
    """All METRICS with their spreads, for features (N, D) against (M, D)."""
    found: dict[str, Score] = {}
    for function in METRIC_FUNCTIONS.values():
        found |= function(features, reference)
    return found
