"""What lies behind a score: which classes are drawn, how well, and whether they are copies."""

import torch
from torch import Tensor

from scoring.metrics import fid, nearest, share_below

MIN_CLASS_SIZE = 10  # images; with fewer, the Frechet distance of a class says nothing


def class_table(
    probabilities: dict[str, Tensor], features: dict[str, Tensor], labels: Tensor | None
) -> list[dict]:
    """A row for each class: how many samples, how sure the classifier is of them, their FID.

    probabilities: (N, classes) by the classifier; features: (N, D); both of "samples", "floor"
    (real images in their place) and "reference". Every set is sorted by the classifier's opinion,
    so that all are treated alike. labels: what the samples were asked to be, or None.
    """
    chosen = {name: p.argmax(dim=1) for name, p in probabilities.items()}
    rows = []
    for digit in range(probabilities["samples"].shape[1]):
        of_class = {name: features[name][chosen[name] == digit] for name in features}
        row = {"class": digit, "n": len(of_class["samples"])}
        for name, key in (("samples", "share"), ("reference", "share_reference")):
            row[key] = len(of_class[name]) / len(features[name])
        for name, key in (("samples", "confidence"), ("reference", "confidence_reference")):
            sure = probabilities[name].amax(dim=1)[chosen[name] == digit]
            row[key] = sure.mean().item() if len(sure) else None
        for name, key in (("samples", "fid"), ("floor", "fid_floor")):
            enough = min(len(of_class[name]), len(of_class["reference"])) >= MIN_CLASS_SIZE
            row[key] = fid(of_class[name], of_class["reference"]) if enough else None
        if labels is not None:
            asked = labels == digit
            agreed = (chosen["samples"][asked] == digit).double()
            row["agreement"] = agreed.mean().item() if len(agreed) else None
        rows.append(row)
    return rows


def confusion_matrix(asked: Tensor, found: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes) of labels asked for (rows) against those found (columns)."""
    return torch.bincount(asked * classes + found, minlength=classes**2).view(classes, classes)


class Nearness:
    """How near samples, and test images, lie to the training images.

    Args: vectors (N, D), (M, D) and (K, D), pixels or features, of samples, test and training.

    Attributes:
        samples, test: distance of each to its nearest training image, (N,) and (M,).
        neighbours: the index of that training image, (N,), for each sample.
        closer: the chance that a sample lies nearer to the training set than a test image does;
            0.5 for fresh images of the same kind, near 1 for copies (Meehan et al. 2020).
        closest_percent: share of samples nearer than the nearest 1 % of the test images; 0.01
            for fresh images.
    """

    def __init__(self, samples: Tensor, test: Tensor, training: Tensor):
        self.samples, self.neighbours = nearest(samples, training)
        self.test, _ = nearest(test, training)
        self.closer = share_below(self.samples, self.test)
        threshold = self.test.quantile(0.01)
        self.closest_percent = (self.samples < threshold).double().mean().item()
