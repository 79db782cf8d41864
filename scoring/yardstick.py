"""Real data as a yardstick: what samples are compared with, and what real images score."""

import hashlib
import math

import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from scoring.estimate import Estimate, beside, typical
from scoring.features import FeatureNetwork, MNISTFeatures, extract
from scoring.metrics import METRICS, NEAREST_K, Reference, Score, all_scores

FLOOR_SEED = 0  # which real images stand in for a perfect model
MOST_DRAWS = 10  # of real images, for the floor
INCEPTION_IMAGES = 10_000  # in all draws together; more take over ten minutes on a CPU
FEWEST = 2000  # images; with fewer, a Frechet distance is mostly bias


def content_hash(data: bytes) -> str:
    """The first 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def image_hash(images: Tensor) -> str:
    """`content_hash` of the shape and pixels of images (N, C, H, W) uint8."""
    return content_hash(repr(tuple(images.shape)).encode() + images.numpy().tobytes())


def stand_ins(train: Tensor, count: int) -> Tensor:
    """`count` random training images (N, ...) to stand in for samples; or, from labels, theirs.

    A smaller count gives the first images of a larger count.
    """
    generator = torch.Generator().manual_seed(FLOOR_SEED)
    return train[torch.randperm(len(train), generator=generator)[:count]]


def random_pairs(total: int, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` pairs of disjoint sets of `size` indices below `total`; total >= 2 * size.

    Pairs have no index in common while they fit into `total`; then it is shuffled again.
    """
    generator, pairs = torch.Generator().manual_seed(FLOOR_SEED), []
    while len(pairs) < count:
        order = torch.randperm(total, generator=generator)
        whole = order[: total // (2 * size) * (2 * size)]
        pairs += [both.split(size) for both in whole.split(2 * size)]
    return pairs[:count]


class Yardstick:
    """What samples are compared with, and the floor: the score of real images in their place.

    With training images, the floor's draws are disjoint random sets of them, as large as the set of
    samples. Like the samples, they are compared with the whole reference. If there are fewer
    training images than samples, the floor is a single draw of all of them.

    With only a reference, there are no real images that are independent of it. Its images are split
    at random into pairs of disjoint sets of one size, at most that of the samples and at most half
    the reference, and one set of each pair is compared with the other.

    The samples are always scored against the whole reference. But most scores depend on the size of
    both sets (FID by about 1/n of each). So where a draw is smaller than the set of samples, or is
    compared with a part of the reference, equally many samples are scored against the same images,
    and the floor is compared with this `_matched` score.

    Args:
        network: computes the features.
        name: of the reference.
        images: of the reference, uint8 (M, C, H, W).
        count: number of samples.
        train: training images, uint8 (N, C, H, W), or None.
        draws: at most; default MOST_DRAWS (Inception: INCEPTION_IMAGES images in all).

    Raises UserError if there are too few images.

    Attributes:
        features: of the reference, (M, D).
        size: images in each draw of the floor.
        stand_in, stand_in_features: the images that the floor's draws are taken from.
        pairs: for each draw, the indices of its stand-ins, and of the reference images to compare
            them with, or None for all.
        floor: the scores of the draws, by metric.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        name: str,
        images: Tensor,
        count: int,
        train: Tensor | None = None,
        draws: int | None = None,
    ):
        self.network, self.name, self.images, self.cut = network, name, images, train is None
        fewest = 2 * (NEAREST_K + 1) if self.cut else NEAREST_K + 1
        for what, found in ((name, images), ("the training set", images if self.cut else train)):
            if len(found) < fewest:
                raise UserError(f"{what}: holds {len(found)} images, must be at least {fewest}")
        self.features = extract(network, images, "the reference", cache=True)
        self.size = min(count, len(images) // 2 if self.cut else len(train))
        draws = draws or default_draws(network, self.size)
        if self.cut:
            self.stand_in, self.stand_in_features = images, self.features
            self.pairs = random_pairs(len(images), self.size, draws)
        else:
            whole = min(draws, len(train) // self.size) * self.size
            self.stand_in = stand_ins(train, whole)
            self.stand_in_features = extract(network, self.stand_in, "real images", cache=True)
            self.pairs = [(part, None) for part in torch.arange(whole).split(self.size)]
        self.reference = Reference(self.features)
        self.opposites = [
            self.reference if against is None else Reference(self.features[against])
            for _, against in self.pairs
        ]
        parts = [self.stand_in_features[part] for part, _ in self.pairs]
        found = self.by_draw(parts, "the floor, from draws of real images")
        self.floor = {name: Estimate.of(scores) for name, scores in found.items()}

    def by_draw(self, parts: list[Tensor], what: str) -> dict[str, list[Score]]:
        """All metrics of sets of features, each against the opposite side of its draw."""
        pairs = list(zip(parts, self.opposites, strict=True))
        found = [all_scores(*pair) for pair in tqdm(pairs, desc=what, unit="draw")]
        return {name: [scores[name] for scores in found] for name in METRICS}

    def subsets(self, count: int) -> list[Tensor]:
        """Which of `count` samples to score against the opposite side of each draw.

        Each is a random draw of `size`; there are none if all samples already meet the conditions
        of the floor.
        """
        generator = torch.Generator().manual_seed(FLOOR_SEED)
        draws = len(self.pairs) if self.cut or count > self.size else 0
        return [torch.randperm(count, generator=generator)[: self.size] for _ in range(draws)]

    def score(self, features: Tensor) -> dict[str, float | int | str | bool | None]:
        """Facts, and for each of METRICS the fields of `beside`."""
        scores, matched = {}, {}
        parts = [features[part] for part in self.subsets(len(features))]
        if parts:
            found = self.by_draw(parts, "samples against the same images")
            # counts as one draw: all pairs may contain the same samples
            matched = {name: Estimate(*typical(scores)) for name, scores in found.items()}
        for name, score in all_scores(features, self.reference).items():
            scores |= beside(name, Estimate(*score), self.floor[name], matched.get(name))
        return scores | {
            "n": len(features),
            "n_floor": self.size,
            "n_floor_draws": len(self.pairs),
            "floor_spread": "over draws" if self.floor["fid"].measured else "stated",
            "n_reference": len(self.images),
            "reference": self.name,
            "reference_hash": image_hash(self.images),
            "features": self.network.name,
            "feature_hash": self.network.version,
        }

    def warnings(self, count: int) -> list[str]:
        """What is wrong with the Frechet distance of `count` images: at most one line."""
        dim, floor = self.network.dim, self.floor["fid"].value
        if count >= max(dim, FEWEST):
            return []
        if count < dim:
            reason = f"{count} images cannot fill a covariance of {dim} features (it is singular)"
        else:
            reason = f"{count} images are below {FEWEST}"
        return [f"{reason}: the FID is biased upwards; real data itself scores {floor:.3f}"]


def default_draws(network: FeatureNetwork, size: int) -> int:
    """The number of draws of `size` images for the floor."""
    if network.name == MNISTFeatures.name:
        return MOST_DRAWS
    return max(1, min(MOST_DRAWS, INCEPTION_IMAGES // size))


def score_text(value: float, error: float) -> str:
    """'1.661 ± 0.036': to two digits of the error, or to four decimals if it is not positive."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"
