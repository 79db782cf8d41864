"""What lies behind a score: which classes are drawn, how well, and whether they are copies."""

from functools import cached_property

import torch
from torch import Tensor

from scoring.estimate import Estimate, beside, typical
from scoring.metrics import Reference, Score, fid, fid_spread, nearest, share_below

MIN_CLASS_SIZE = 10  # images; with fewer, the Frechet distance of a class means nothing


class Sorted:
    """Images sorted by the class that the classifier predicts; samples or real images.

    Args: features (N, D); class probabilities (N, classes) from the classifier.

    Attributes:
        digits: the most likely class of each, (N,).
        by_class: the features of each class.
    """

    def __init__(self, features: Tensor, probabilities: Tensor):
        self.features, self.probabilities = features, probabilities
        self.digits = probabilities.argmax(dim=1)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, indices: Tensor) -> "Sorted":
        return Sorted(self.features[indices], self.probabilities[indices])

    @cached_property
    def by_class(self) -> list[Reference]:
        classes = range(self.probabilities.shape[1])
        return [Reference(self.features[self.digits == digit]) for digit in classes]

    def confidence(self, digit: int) -> float | None:
        """Mean probability that the classifier gives to `digit`, over images predicted as it."""
        sure = self.probabilities.amax(dim=1)[self.digits == digit]
        return sure.mean().item() if len(sure) else None


Pairs = list[tuple[Sorted, Sorted]]  # sets of images, each with the set to compare it with


def class_fids(pairs: Pairs, digit: int) -> list[Score]:
    """FID within a class of each pair, first against second, if both have enough images."""
    sets = [(own.by_class[digit], other.by_class[digit]) for own, other in pairs]
    enough = [both for both in sets if min(map(len, both)) >= MIN_CLASS_SIZE]
    return [(fid(x.features, y), fid_spread(x.features, y)) for x, y in enough]


def class_floors(pairs: Pairs) -> list[Estimate | None]:
    """For each class, the FID of draws of real images; None if the class is too rare."""
    found = [class_fids(pairs, digit) for digit in range(pairs[0][0].probabilities.shape[1])]
    return [Estimate.of(scores) if scores else None for scores in found]


def class_table(
    samples: Sorted,
    reference: Sorted,
    floors: list[Estimate | None],
    labels: Tensor | None,
    matched: Pairs = (),
) -> list[dict]:
    """A row for each class: the number of samples, the classifier's confidence, and the FID.

    floors: of each class. labels: the classes asked for, or None. matched: the samples under the
    conditions of the floors, if these differ from `samples` against `reference`.
    """
    rows = []
    for digit, floor in enumerate(floors):
        row = {"class": digit, "n": len(samples.by_class[digit])}
        for images, part in ((samples, ""), (reference, "_reference")):
            row[f"share{part}"] = len(images.by_class[digit]) / len(images)
            row[f"confidence{part}"] = images.confidence(digit)
        whole, alike = class_fids([(samples, reference)], digit), class_fids(matched, digit)
        own = Estimate(*whole[0]) if whole else None
        row |= beside("fid", own, floor, Estimate(*typical(alike)) if alike else None)
        if labels is not None:
            agreed = (samples.digits[labels == digit] == digit).double()
            row["agreement"] = agreed.mean().item() if len(agreed) else None
        rows.append(row)
    return rows


def confusion_matrix(asked: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) of classes asked for (rows) and classes found (columns)."""
    return torch.bincount(asked * classes + found, minlength=classes**2).view(classes, classes)


def flat_pixels(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (N, C * H * W) in [0, 1], as vectors for `Nearness`."""
    return images.flatten(1).float() / 255


class Nearness:
    """How close samples and test images are to the training images.

    Args: vectors (pixels or features) of samples (N, D), test images (M, D) and training images
        (K, D).

    Attributes:
        samples, test: distance of each to its nearest training image, (N,) and (M,).
        neighbours: the index of that training image, (N,), for each sample.
        closer: the probability that a sample is closer to the training set than a test image;
            0.5 for fresh images of the same kind, near 1 for copies (Meehan et al. 2020).
        closest_percent: share of samples closer than the closest 1 % of the test images; 0.01
            for fresh images.
    """

    def __init__(self, samples: Tensor, test: Tensor, training: Tensor):
        self.samples, self.neighbours = nearest(samples, training)
        self.test, _ = nearest(test, training)
        self.closer = share_below(self.samples, self.test)
        threshold = self.test.quantile(0.01)
        self.closest_percent = (self.samples < threshold).double().mean().item()
