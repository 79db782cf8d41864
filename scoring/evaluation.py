"""Everything that can be asked of a set of images: scores, classes, copies, usefulness."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoring import classifier
from scoring.classifier import DigitClassifier, accuracy, reads, train_classifier
from scoring.diagnosis import Nearness, class_table, confusion_matrix
from scoring.features import CACHE, FeatureNetwork, MNISTFeatures, extract
from scoring.yardstick import Yardstick, content_hash, image_hash, stand_ins
from utils.data_loader import Dataset, DatasetInfo
from utils.files import write_atomically
from utils.image_checks import suspicions
from utils.visualization import plot_nearness, save_figure

TSTR_STEPS = 4700  # of training a classifier: 12 epochs of 50,000 images
TSTR_SEEDS = 3  # classifiers for each of the two sets


def learnt_accuracy(
    images: Tensor, labels: Tensor, test: Dataset, seed: int, device: torch.device
) -> float:
    """Accuracy on `test` of a classifier that learnt from images and labels.

    It is kept on disk, by the content of all that decides it, and found there the next time.
    """
    classes = test.info.num_classes
    key = [content_hash(Path(classifier.__file__).read_bytes()), TSTR_STEPS, seed, classes]
    key += [image_hash(x) for x in (images, labels, test.images, test.labels)]
    path = CACHE / f"tstr_{content_hash(repr(key).encode())}.json"
    if path.exists():
        return json.loads(path.read_text())
    options = {"epochs": -(-TSTR_STEPS // max(1, len(images) // 128)), "num_classes": classes}
    net = train_classifier(images, labels, device, **options, seed=seed)
    found = accuracy(net, test.images, test.labels, device)
    write_atomically(path, json.dumps(found).encode())
    return found


@dataclass
class Candidate:
    """What is scored.

    images: uint8 (N, C, H, W). labels: (N,) int64 that were asked for, or None. name: the folder
    under outputs/. facts: where they are from.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    facts: dict


class Scorer:
    """Feature networks and real data, loaded once, and everything that can be asked of a candidate.

    Args:
        network, yardstick: whose features are compared, and with what.
        data: what the candidates should look like.
        real: real("train") and real("test") load that data.

    evaluate() returns the content of the JSON file: at least fid, fid_floor, n and features.
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
        # the classifier sorts samples and finds copies, whatever network scores them
        self.classifier = None
        if data.shape == DigitClassifier.shape:
            shared = network.name == MNISTFeatures.name
            self.classifier = network if shared else MNISTFeatures(device)

    def evaluate(self, candidate: Candidate, memorization: bool, usefulness: bool) -> dict:
        images = candidate.images
        features = seen = extract(self.network, images, "samples")
        if self.classifier not in (None, self.network):
            seen = extract(self.classifier, images, "samples")
        scores = self.yardstick.score(features)
        scores |= {"experiment": candidate.name, **candidate.facts}
        scores["warnings"] = self.yardstick.warnings(len(images))
        if reads(self.data):
            scores["warnings"] += suspicions(images)
            scores |= self.classes(candidate, features, seen)
        elif self.network is self.classifier:
            scores["warnings"].append(f"features mnist were learnt on digits, not {self.data.name}")
        if memorization:
            scores |= self.memorization(candidate, seen)
        if usefulness:
            scores |= self.usefulness(candidate)
        return scores

    def classes(self, candidate: Candidate, features: Tensor, seen: Tensor) -> dict:
        """What the classifier makes of the samples, class by class."""
        yardstick = self.yardstick
        probabilities = {
            "samples": self.classifier.probabilities(seen),
            "floor": self.real_probabilities(yardstick.stand_in),
            "reference": self.real_probabilities(yardstick.images),
        }
        by_set = {"samples": features, "floor": yardstick.stand_in_features}
        by_set["reference"] = yardstick.features
        found = {"classes": class_table(probabilities, by_set, candidate.labels)}
        if candidate.labels is not None:
            digits = probabilities["samples"].argmax(dim=1)
            matrix = confusion_matrix(candidate.labels, digits, self.data.num_classes)
            found["agreement"] = (digits == candidate.labels).double().mean().item()
            found["confusion"] = matrix.tolist()
        return found

    def real_probabilities(self, images: Tensor) -> Tensor:
        return self.classifier.probabilities(
            extract(self.classifier, images, "real images", cache=True)
        )

    def memorization(self, candidate: Candidate, seen: Tensor) -> dict:
        """Are samples copies of training images, in pixels or in features of the classifier?"""
        train, test = self.real("train"), self.real("test")
        sets = (candidate.images, test.images, train.images)
        spaces = {"pixels": Nearness(*(x.flatten(1).float() / 255 for x in sets))}
        if self.classifier:
            known = [extract(self.classifier, x, "real images", cache=True) for x in sets[1:]]
            spaces["features"] = Nearness(seen, *known)
        figure = plot_nearness(spaces, candidate.images, train.images, train.labels)
        save_figure(Path("outputs") / candidate.name / "memorization.png", figure)
        found = {}
        for space, nearness in spaces.items():
            found[f"{space}_closer"] = nearness.closer
            found[f"{space}_closest_percent"] = nearness.closest_percent
            found[f"{space}_median"] = nearness.samples.median().item()
            found[f"{space}_median_test"] = nearness.test.median().item()
        return {f"memorization_{key}": value for key, value in found.items()}

    def usefulness(self, candidate: Candidate) -> dict:
        """Train on synthetic, test on real (Esteban et al. 2017), beside train on real.

        Some classifiers learn from the samples and the labels they were asked to be, others from
        as many training images; all for the same number of steps, however few images there are.
        `_spread` is the standard deviation over the seeds of classifiers.
        """
        train, test = self.real("train"), self.real("test")
        count = min(len(candidate.images), len(train.images))
        sets = {
            "tstr_accuracy": (candidate.images, candidate.labels),
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
