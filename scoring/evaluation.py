"""The full evaluation of a set of images: scores, classes, copies, usefulness."""

import contextlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from config import UserError
from scoring.classifier import BATCH_SIZE, DigitClassifier, accuracy, reads, train_classifier
from scoring.diagnosis import (
    Nearness,
    Sorted,
    class_floors,
    class_table,
    confusion_matrix,
    flat_pixels,
)
from scoring.estimate import Estimate, beside
from scoring.features import CACHE, FeatureNetwork, MNISTFeatures, extract
from scoring.metrics import METRICS
from scoring.yardstick import Yardstick, content_hash, image_hash, stand_ins
from utils.data_loader import Dataset, DatasetInfo
from utils.device import arithmetic
from utils.files import write_atomically
from utils.image_checks import suspicions
from utils.provenance import source_hash
from utils.visualization import plot_nearness

TSTR_STEPS = 5000  # training steps of a classifier, at least: 13 epochs of 50,000 images
TSTR_SEEDS = 3  # classifiers for each of the two sets


def learnt_accuracy(
    images: Tensor, labels: Tensor, test: Dataset, seed: int, device: torch.device
) -> float:
    """Accuracy on `test` of a classifier trained on images and labels.

    Cached on disk, under a hash of everything that it depends on.
    """
    options = {
        "epochs": -(-TSTR_STEPS // max(1, len(images) // BATCH_SIZE)),
        "num_classes": test.info.num_classes,
        "seed": seed,
        "precision": arithmetic(device, "auto"),
    }
    rooms = ("scoring/classifier.py", "utils/data_loader.py", "utils/random.py")
    key = [source_hash(rooms), torch.__version__, device.type, options]
    key += [image_hash(x) for x in (images, labels, test.images, test.labels)]
    path = CACHE / f"tstr_{content_hash(repr(key).encode())}.json"
    if path.exists():
        return json.loads(path.read_text())
    net = train_classifier(images, labels, device, **options)
    found = accuracy(net, test.images, test.labels, device)
    with contextlib.suppress(UserError):  # a full disk must not cost the result
        write_atomically(path, json.dumps(found).encode())
    return found


@dataclass
class Candidate:
    """A set of images to score.

    images: uint8 (N, C, H, W). labels: (N,) int64, the classes asked for, or None. name: the
    folder under outputs/. facts: where the images come from.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    facts: dict


class Scorer:
    """Scores candidates, with feature networks and real data that are loaded once.

    Args:
        network, yardstick: the network that computes features, and what to compare them with.
        data: what the candidates should look like.
        real: real("train") and real("test") load that data.

    evaluate() returns the content of the JSON file: at least fid, fid_floor, n and features.

    Attributes:
        copies: the figure of the last `memorization`, or None.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        yardstick: Yardstick,
        data: DatasetInfo,
        real: Callable[[str], Dataset],
        device: torch.device,
    ):
        self.network, self.yardstick, self.data = network, yardstick, data
        self.real, self.device = real, device
        self.copies: Figure | None = None
        # the classifier sorts samples and finds copies, whichever network scores them
        self.classifier = None
        if data.shape == DigitClassifier.shape:
            shared = network.name == MNISTFeatures.name
            self.classifier = network if shared else MNISTFeatures(device)

    def evaluate(self, candidate: Candidate, memorization: bool, usefulness: bool) -> dict:
        images = candidate.images
        features = seen = extract(self.network, images, "samples", cache=self.network.slow)
        if self.classifier not in (None, self.network):
            seen = extract(self.classifier, images, "samples")
        scores = self.yardstick.score(features)
        scores |= {"experiment": candidate.name, **candidate.facts}
        scores["warnings"] = self.yardstick.warnings(len(images))
        if reads(self.data):
            scores["warnings"] += suspicions(images)
            scores |= self.classes(candidate, features, seen)
        elif self.network is self.classifier:
            scores["warnings"].append(
                f"the mnist features were trained on digits, not {self.data.name}"
            )
        if memorization:
            scores |= self.memorization(candidate, seen)
        if usefulness:
            scores |= self.usefulness(candidate)
        return scores

    def classes(self, candidate: Candidate, features: Tensor, seen: Tensor) -> dict:
        """A table of the classes; with labels, also agreement and the confusion matrix."""
        samples = Sorted(features, self.classifier.probabilities(seen))
        parts = self.yardstick.subsets(len(features))
        opposites = [opposite for _, opposite in self.real_pairs]
        matched = [(samples[part], opposites[k]) for k, part in enumerate(parts)]
        table = class_table(samples, self.reference, self.floors, candidate.labels, matched)
        found = {"classes": table}
        if candidate.labels is not None:
            matrix = confusion_matrix(candidate.labels, samples.digits, self.data.num_classes)
            found["agreement"] = (samples.digits == candidate.labels).double().mean().item()
            found["confusion"] = matrix.tolist()
        return found

    @cached_property
    def reference(self) -> Sorted:
        """The reference, sorted by class."""
        return self.sorted(self.yardstick.features, self.yardstick.images)

    @cached_property
    def real_pairs(self) -> list[tuple[Sorted, Sorted]]:
        """The draws of the floor, each with the images it is compared with, sorted by class."""
        yardstick = self.yardstick
        stand_in = self.sorted(yardstick.stand_in_features, yardstick.stand_in)
        return [
            (stand_in[part], self.reference if against is None else self.reference[against])
            for part, against in yardstick.pairs
        ]

    @cached_property
    def floors(self) -> list[Estimate | None]:
        """The FID of real images within each class."""
        return class_floors(self.real_pairs)

    def sorted(self, features: Tensor, images: Tensor) -> Sorted:
        seen = extract(self.classifier, images, "real images", cache=True)
        return Sorted(features, self.classifier.probabilities(seen))

    def over_seeds(self, results: list[dict]) -> dict:
        """Merge the results of at least two seeds: each score becomes a mean, beside the floor.

        The spread is the standard deviation between seeds; NAME_error is the standard error of the
        mean. The result of each seed is kept in `results`.
        """
        said = list(dict.fromkeys(line for found in results for line in found["warnings"]))
        merged = mean_of([found | {"warnings": said} for found in results])
        merged |= {"seed": results[0]["seed"], "seeds": len(results)}
        for name in METRICS:
            merged |= mean_score(results, name, self.yardstick.floor[name])
        for digit, row in enumerate(merged.get("classes", [])):
            rows = [found["classes"][digit] for found in results]
            row |= mean_score(rows, "fid", self.floors[digit])
        return merged | {"results": results}

    def memorization(self, candidate: Candidate, seen: Tensor) -> dict:
        """Are samples copies of training images, in pixels or in features of the classifier?"""
        train, test = self.real("train"), self.real("test")
        sets = (candidate.images, test.images, train.images)
        spaces = {"pixels": Nearness(*map(flat_pixels, sets))}
        if self.classifier:
            known = [extract(self.classifier, x, "real images", cache=True) for x in sets[1:]]
            spaces["features"] = Nearness(seen, *known)
        self.copies = plot_nearness(spaces, candidate.images, train.images, train.labels)
        found = {}
        for space, nearness in spaces.items():
            found[f"{space}_closer"] = nearness.closer
            found[f"{space}_closest_percent"] = nearness.closest_percent
            found[f"{space}_median"] = nearness.samples.median().item()
            found[f"{space}_median_test"] = nearness.test.median().item()
        return {f"memorization_{key}": value for key, value in found.items()}

    def usefulness(self, candidate: Candidate) -> dict:
        """Train on synthetic, test on real (Esteban et al. 2017), beside train on real.

        Some classifiers learn from the samples and the labels asked for, others from the same
        number of training images. Each takes about TSTR_STEPS steps, however few images there are.
        `_spread` is the standard deviation over the seeds of classifiers.
        """
        train, test = self.real("train"), self.real("test")
        count = min(len(candidate.images), len(train.images))
        sets = {
            "tstr_accuracy": (candidate.images[:count], candidate.labels[:count]),
            "tstr_accuracy_real": (stand_ins(train.images, count), stand_ins(train.labels, count)),
        }
        found = {}
        for key, pair in sets.items():
            accuracies = [
                learnt_accuracy(*pair, test, seed, self.device) for seed in range(TSTR_SEEDS)
            ]
            found[key] = statistics.mean(accuracies)
            found[f"{key}_spread"] = statistics.stdev(accuracies)
        return found


def mean_of(results: list) -> Any:
    """Merge results of the same form: the mean of each number, and the first of anything else."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean_of([found.get(key) for found in results]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(cells)) for cells in zip(*results, strict=True)]
    numbers = [value for value in results if isinstance(value, (int, float))]
    return statistics.mean(numbers) if numbers else first


def mean_score(results: list[dict], name: str, floor: Estimate | None) -> dict:
    """The fields of a score (`beside`), averaged over the results that have it."""

    def mean(key: str) -> Estimate | None:
        scores = [(found[key], found[f"{key}_spread"]) for found in results if key in found]
        known = [score for score in scores if score[0] is not None]
        return Estimate.of(known, enough=2) if known else None

    return beside(name, mean(name), floor, mean(f"{name}_matched"))
