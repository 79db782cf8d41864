"""Real data as a yardstick: what samples are held against, and what real images score."""

import hashlib
import math
from pathlib import Path

import torch
from torch import Tensor

from config import EvalConfig, UserError
from utils.data_loader import load_dataset
from utils.features import FeatureNetwork, extract
from utils.files import load_images
from utils.metrics import NEAREST_K, Score, fid, fid_spread, kid, precision_recall_density_coverage

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage")
FLOOR_SEED = 0  # which real images stand in for a perfect model
FEWEST = 2000  # images, below which a Frechet distance is mostly bias


def all_scores(features: Tensor, reference: Tensor) -> dict[str, Score]:
    """Every one of METRICS with its standard error, of features (N, D) against (M, D)."""
    return {
        "fid": (fid(features, reference), fid_spread(features, reference)),
        "kid": kid(features, reference),
        **precision_recall_density_coverage(features, reference),
    }


def content_hash(data: bytes) -> str:
    """The first 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def stand_ins(train: Tensor, count: int) -> Tensor:
    """`count` of the training images (N, ...), in place of samples. Labels go with theirs."""
    generator = torch.Generator().manual_seed(FLOOR_SEED)
    return train[torch.randperm(len(train), generator=generator)[:count]]


class Yardstick:
    """What `candidates` are held against, and the floor: as many real images in their place.

    The reference is the test set, and for the floor training images are held against it.
    --reference_images has no training set: one random half is held against the other.
    Raises UserError when the reference has too few images, or others than `candidates` in size.

    Attributes:
        images, features: of the reference, uint8 (M, 1, H, W) and (M, D).
        stand_in, stand_in_features: the same of the real images in place of samples.
        floor: what those score, by metric.
    """

    def __init__(self, cfg: EvalConfig, dataset: str, candidates: Tensor, network: FeatureNetwork):
        self.network = network
        if cfg.reference_images:
            self.name = cfg.reference_images
            self.images = load_images(Path(self.name), "--reference_images")
            self._check_size(cfg, candidates)
            if len(self.images) < 2 * (NEAREST_K + 1):
                raise UserError(
                    f"--reference_images {self.name}: holds {len(self.images)} images,"
                    f" must be at least {2 * (NEAREST_K + 1)}"
                )
            self.features = extract(network, self.images, "the reference", cache=True)
            generator = torch.Generator().manual_seed(FLOOR_SEED)
            half, opposite = torch.randperm(len(self.images), generator=generator).chunk(2)
            self.stand_in, self.stand_in_features = self.images[half], self.features[half]
            self.floor = all_scores(self.stand_in_features, self.features[opposite])
        else:
            self.name = f"{dataset} test set"
            self.images, _ = load_dataset(dataset, cfg.data_dir, "test")
            self._check_size(cfg, candidates)
            train, _ = load_dataset(dataset, cfg.data_dir, "train")
            self.features = extract(network, self.images, "the reference", cache=True)
            self.stand_in = stand_ins(train, len(candidates))
            self.stand_in_features = extract(network, self.stand_in, "real images", cache=True)
            self.floor = all_scores(self.stand_in_features, self.features)

    def _check_size(self, cfg: EvalConfig, candidates: Tensor) -> None:
        size, wanted = tuple(candidates.shape[1:]), tuple(self.images.shape[1:])
        if size != wanted:
            name = f"--images {cfg.images}" if cfg.images else "the samples"
            raise UserError(f"{name}: are of size {size}, must be {wanted} as in {self.name}")

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
            "reference_hash": content_hash(self.images.numpy().tobytes()),
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
