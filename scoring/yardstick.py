"""Real data as a yardstick: what samples are held against, and what real images score."""

import hashlib
import math

import torch
from torch import Tensor

from config import UserError
from scoring.features import FeatureNetwork, extract
from scoring.metrics import METRICS, NEAREST_K, all_scores

FLOOR_SEED = 0  # which real images stand in for a perfect model
FEWEST = 2000  # images, below which a Frechet distance is mostly bias


def content_hash(data: bytes) -> str:
    """The first 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def image_hash(images: Tensor) -> str:
    """`content_hash` of images (N, C, H, W) uint8: of their shape and their pixels."""
    return content_hash(repr(tuple(images.shape)).encode() + images.numpy().tobytes())


def stand_ins(train: Tensor, count: int) -> Tensor:
    """`count` of the training images (N, ...), in place of samples. Labels go with theirs."""
    generator = torch.Generator().manual_seed(FLOOR_SEED)
    return train[torch.randperm(len(train), generator=generator)[:count]]


class Yardstick:
    """What samples are held against, and the floor: as many real images in their place.

    Args:
        network: whose features are compared.
        name: of the reference.
        images: of the reference, uint8 (M, C, H, W).
        stand_in: real images in place of samples, for the floor; without them, one random half of
            `images` is held against the other.

    Raises UserError when the reference has too few images.

    Attributes:
        features: of the reference, (M, D).
        stand_in, stand_in_features: the real images in place of samples, and their features.
        floor: what those score, by metric.
    """

    def __init__(
        self, network: FeatureNetwork, name: str, images: Tensor, stand_in: Tensor | None = None
    ):
        self.network, self.name, self.images = network, name, images
        fewest = NEAREST_K + 1 if stand_in is not None else 2 * (NEAREST_K + 1)
        if len(images) < fewest:
            raise UserError(f"{name}: holds {len(images)} images, must be at least {fewest}")
        self.features = extract(network, images, "the reference", cache=True)
        if stand_in is not None:
            self.stand_in = stand_in
            self.stand_in_features = extract(network, stand_in, "real images", cache=True)
            self.floor = all_scores(self.stand_in_features, self.features)
        else:
            generator = torch.Generator().manual_seed(FLOOR_SEED)
            half, opposite = torch.randperm(len(images), generator=generator).chunk(2)
            self.stand_in, self.stand_in_features = images[half], self.features[half]
            self.floor = all_scores(self.stand_in_features, self.features[opposite])

    def score(self, features: Tensor) -> dict[str, float | int | str]:
        """Facts, and each of METRICS: value, `_spread`, `_floor` and `_floor_spread`."""
        scores = {}
        for name, (value, spread) in all_scores(features, self.features).items():
            floor, floor_spread = self.floor[name]
            scores |= {name: value, f"{name}_spread": spread}
            scores |= {f"{name}_floor": floor, f"{name}_floor_spread": floor_spread}
        return scores | {
            "n": len(features),
            "n_floor": len(self.stand_in),
            "n_reference": len(self.images),
            "reference": self.name,
            "reference_hash": image_hash(self.images),
            "features": self.network.name,
            "feature_hash": self.network.version,
        }

    def warnings(self, count: int) -> list[str]:
        """What is wrong with a Frechet distance of `count` images: at most one line."""
        dim, floor = self.network.dim, self.floor["fid"][0]
        if count >= max(dim, FEWEST):
            return []
        if count < dim:
            reason = f"{count} images cannot fill a covariance of {dim} features (it is singular)"
        else:
            reason = f"{count} images are below {FEWEST}"
        return [f"{reason}: the FID is biased upwards, real data itself scores {floor:.3f}"]


def score_text(value: float, error: float) -> str:
    """'1.661 ± 0.036': to two digits of the error, as far as it is one."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 4
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def print_scores(scores: dict) -> None:
    """For people: the facts, and each metric beside its floor."""
    details = {
        f"{name}{part}" for name in METRICS for part in ("", "_spread", "_floor", "_floor_spread")
    }
    for key, value in scores.items():
        if key not in details and isinstance(value, (str, int, float)):
            print(f"{key:16} {value:.4g}" if isinstance(value, float) else f"{key:16} {value}")
    print(f"\n{'':12} {'samples':>20} {'real data':>20}")
    for name in METRICS:
        own = score_text(scores[name], scores[f"{name}_spread"])
        floor = score_text(scores[f"{name}_floor"], scores[f"{name}_floor_spread"])
        print(f"{name:12} {own:>20} {floor:>20}")


def print_classes(scores: dict) -> None:
    """A row for each class: share of samples, the classifier's confidence, FID, agreement."""

    def cell(row: dict, key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else "-"

    asked = "agreement" in scores
    print("\nclass      n   share (real)   confidence (real)      fid (real)" + "   agrees" * asked)
    for row in scores["classes"]:
        line = f"{row['class']:5} {row['n']:6}  {cell(row, 'share', '6.3f')}"
        line += f" ({cell(row, 'share_reference', '.3f')})       {cell(row, 'confidence', '6.4f')}"
        line += f" ({cell(row, 'confidence_reference', '.4f')}) {cell(row, 'fid', '8.2f')}"
        line += f" ({cell(row, 'fid_floor', '.2f')})"
        print(line + (f"   {cell(row, 'agreement', '.4f')}" if asked else ""))
