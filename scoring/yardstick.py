"""Real data as a yardstick: what samples are held against, and what real images score."""

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
INCEPTION_IMAGES = 10_000  # in all draws together: more of them take a CPU over ten minutes
FEWEST = 2000  # images, below which a Frechet distance is mostly bias


def content_hash(data: bytes) -> str:
    """The first 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def image_hash(images: Tensor) -> str:
    """`content_hash` of images (N, C, H, W) uint8: of their shape and their pixels."""
    return content_hash(repr(tuple(images.shape)).encode() + images.numpy().tobytes())


def stand_ins(train: Tensor, count: int) -> Tensor:
    """`count` of the training images (N, ...), in place of samples. Labels go with theirs.

    Those of a smaller count are the first of those of a larger one.
    """
    generator = torch.Generator().manual_seed(FLOOR_SEED)
    return train[torch.randperm(len(train), generator=generator)[:count]]


def random_pairs(total: int, size: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """`count` pairs of disjoint sets of `size` indices below `total`, at least twice the size.

    As many pairs as fit have no index in common; then they are cut anew.
    """
    generator, pairs = torch.Generator().manual_seed(FLOOR_SEED), []
    while len(pairs) < count:
        order = torch.randperm(total, generator=generator)
        whole = order[: total // (2 * size) * (2 * size)]
        pairs += [both.split(size) for both in whole.split(2 * size)]
    return pairs[:count]


class Yardstick:
    """What samples are held against, and the floor: as many real images in their place.

    Where there are training images, the floor's draws are disjoint random sets of them, of the
    samples' number, held against what the samples are held against: the whole reference.

    Where there is a reference alone, nothing that is as large as the samples and independent of it
    exists. Its images are cut at random into pairs of disjoint sets of one size, at most that of
    the samples and at most half the reference, and one set of each pair is held against the other.
    The samples' scores are still those against the whole reference. But most scores depend on the
    size of both sets (FID by about 1/n of each), so those are not compared with the floor: as many
    of the samples are held against the same other set of each pair, and this `_matched` score is.

    Args:
        network: whose features are compared.
        name: of the reference.
        images: of the reference, uint8 (M, C, H, W).
        count: of the samples.
        train: training images, uint8 (N, C, H, W), or None.
        draws: how many, at most; by default MOST_DRAWS, of Inception as INCEPTION_IMAGES make.

    Raises UserError when there are too few images.

    Attributes:
        features: of the reference, (M, D).
        size: images in each draw of the floor.
        stand_in, stand_in_features: the images that the floor's draws are taken from.
        pairs: of each draw, indices of the stand-ins in it, and of the reference images that it is
            held against, or None for all.
        floor: what the draws score, by metric.
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
        found = self.by_draw(parts, "the floor, by draws of real images")
        self.floor = {name: Estimate.of(scores) for name, scores in found.items()}

    def by_draw(self, parts: list[Tensor], what: str) -> dict[str, list[Score]]:
        """Every metric of sets of features, each against the opposite side of its draw."""
        pairs = list(zip(parts, self.opposites, strict=True))
        found = [all_scores(*pair) for pair in tqdm(pairs, desc=what, unit="draw")]
        return {name: [scores[name] for scores in found] for name in METRICS}

    def subsets(self, count: int) -> list[Tensor]:
        """Which of `count` samples go against the opposite side of each draw, in a cut reference.

        Each a random draw of `size`; none where the floor is held against the whole reference.
        """
        generator = torch.Generator().manual_seed(FLOOR_SEED)
        draws = len(self.pairs) if self.cut else 0
        return [torch.randperm(count, generator=generator)[: self.size] for _ in range(draws)]

    def score(self, features: Tensor) -> dict[str, float | int | str | bool | None]:
        """Facts, and of each of METRICS the fields that `beside` names."""
        scores, matched = {}, {}
        if self.cut:
            parts = [features[part] for part in self.subsets(len(features))]
            found = self.by_draw(parts, "samples against the same images")
            # one draw, whatever the pairs: the same samples may be in all of them
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
        """What is wrong with a Frechet distance of `count` images: at most one line."""
        dim, floor = self.network.dim, self.floor["fid"].value
        if count >= max(dim, FEWEST):
            return []
        if count < dim:
            reason = f"{count} images cannot fill a covariance of {dim} features (it is singular)"
        else:
            reason = f"{count} images are below {FEWEST}"
        return [f"{reason}: the FID is biased upwards, real data itself scores {floor:.3f}"]


def default_draws(network: FeatureNetwork, size: int) -> int:
    """How many draws of `size` images make the floor."""
    if network.name == MNISTFeatures.name:
        return MOST_DRAWS
    return max(1, min(MOST_DRAWS, INCEPTION_IMAGES // size))


def score_text(value: float, error: float) -> str:
    """'1.661 ± 0.036': to two digits of the error, as far as it is one."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"
