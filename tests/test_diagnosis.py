import pytest
import torch

from scoring.diagnosis import Nearness, Sorted, class_floors, class_table, confusion_matrix
from scoring.metrics import fid


def gen(seed):
    return torch.Generator().manual_seed(seed)


def one_hot(labels, sure=0.91):
    rest = (1 - sure) / 9
    return torch.full((len(labels), 10), rest).scatter(1, labels[:, None], sure)


def test_the_class_table_counts_and_scores_each_class():
    reference, floor = torch.arange(400) % 10, torch.arange(300) % 10
    samples = torch.arange(300) % 5  # half the classes are missing
    labels = {"samples": samples, "floor": floor, "reference": reference}
    features = {k: torch.randn(len(v), 3, generator=gen(1)) for k, v in labels.items()}
    features["samples"][samples == 2] += 10  # and one is badly drawn
    asked = torch.where(samples == 1, 3, samples)
    sets = {name: Sorted(features[name], one_hot(labels[name])) for name in labels}
    floors = class_floors([(sets["floor"], sets["reference"])])
    rows = class_table(sets["samples"], sets["reference"], floors, asked)
    assert [row["n"] for row in rows] == [60] * 5 + [0] * 5
    assert rows[0]["share"] == pytest.approx(0.2) and rows[9]["share_reference"] == 0.1
    assert rows[0]["confidence"] == pytest.approx(0.91) and rows[7]["confidence"] is None
    assert rows[2]["fid"] > 200 and rows[0]["fid"] < 5 and rows[7]["fid"] is None
    assert all(0 < row["fid_floor"] < 5 for row in rows)
    assert rows[2]["fid_distance"] > 100 and rows[2]["fid_differs"] and not rows[0]["fid_differs"]
    assert rows[7]["fid_distance"] is None and rows[7]["fid_differs"] is None
    assert "fid_matched" not in rows[0]
    parts = [(sets["samples"][k::2], sets["floor"][k::2]) for k in range(2)]
    row = class_table(sets["samples"], sets["reference"], floors, None, parts)[1]
    own, real = parts[1]  # the other half of the real ones, the even numbers, holds no 1
    expected = fid(own.features[own.digits == 1], real.features[real.digits == 1])
    assert row["fid_matched"] == pytest.approx(expected)
    distance = (row["fid_matched"] - row["fid_floor"]) / row["fid_floor_spread"]
    assert row["fid_distance"] == pytest.approx(distance) and row["fid"] == rows[1]["fid"]
    assert rows[0]["agreement"] == 1 and rows[3]["agreement"] == 0.5
    assert rows[1]["agreement"] is None


def test_the_confusion_matrix_has_asked_rows():
    matrix = confusion_matrix(torch.tensor([4, 4, 9]), torch.tensor([4, 9, 9]), 10)
    assert matrix.shape == (10, 10) and matrix.sum() == 3
    assert matrix[4, 4] == matrix[4, 9] == matrix[9, 9] == 1


def test_copies_are_nearer_than_test_images_and_fresh_images_are_not():
    training, test, fresh = (torch.randn(n, 5, generator=gen(n)) for n in (900, 500, 300))
    same = Nearness(fresh, test, training)
    assert same.closer == pytest.approx(0.5, abs=0.06) and same.closest_percent < 0.04
    copies = Nearness(training[100:400] + 1e-4, test, training)
    assert copies.closer > 0.99 and copies.closest_percent > 0.95
    assert copies.neighbours.tolist() == list(range(100, 400)) and copies.samples.max() < 1e-3
