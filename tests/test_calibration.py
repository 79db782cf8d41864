"""The benchmark that holds stated spreads against true ones."""

import statistics

import pytest
import torch
from scipy.stats import chi2

from benchmarks.calibration import CalibrationConfig, ratio_interval, shuffled, spreads
from utils.data_loader import DATASETS


def test_the_true_spread_is_pooled_over_shuffles():
    rounds = [[(1.0, 0.5), (3.0, 0.7)], [(10.0, 0.5), (12.0, 0.7), (14.0, 0.6)]]
    mean, true, freedom, stated = spreads(rounds)
    squares = statistics.variance([1, 3]) + 2 * statistics.variance([10, 12, 14])
    assert true == pytest.approx((squares / 3) ** 0.5) and freedom == 3
    assert mean == 8 and stated == pytest.approx((1.84 / 5) ** 0.5)


def test_long_tails_leave_fewer_degrees_of_freedom():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for values, expected in ((x, 1), (x**2, 1 / 7)):  # a chi-square of 1 has the excess 12
        freedom = spreads([[(value, 1.0) for value in values.tolist()]])[2]
        assert freedom / 20_000 == pytest.approx(expected, rel=0.15)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    low, high = ratio_interval(1.2, 7)
    assert low == pytest.approx(1.2 * (chi2.ppf(0.05, 7) / 7) ** 0.5)
    assert high == pytest.approx(1.2 * (chi2.ppf(0.95, 7) / 7) ** 0.5)
    draws = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    intervals = [ratio_interval(1 / found.std().item(), 7) for found in draws]
    held = statistics.fmean(low < 1 < high for low, high in intervals)
    assert held == pytest.approx(0.9, abs=0.02)


def test_the_sets_of_a_shuffle_have_nothing_in_common():
    cfg = CalibrationConfig(sets=4, shuffles=3)
    shuffles = list(shuffled(50, 15, cfg))
    assert [len(sets) for sets in shuffles] == [3, 3, 3]  # as many as fit
    assert all(len(torch.cat(sets).unique()) == 45 for sets in shuffles)
    assert shuffles[0][0].tolist() != shuffles[1][0].tolist()
    assert len(next(shuffled(500, 15, cfg))) == 4


def test_the_table(cli, refuses, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 200, "test": 100})
    monkeypatch.setattr("scoring.metrics.HALVINGS", 10)
    monkeypatch.setitem(DATASETS, "mnist", DATASETS["synthetic"])
    flags = ["--sizes", "20,40", "--shuffles", 2, "--sets", 3, "--seeds", 2, "--steps", 1]
    flags += ["--path_to_model", tiny_checkpoint()]
    status, stdout, _ = cli("benchmarks", "calibration", *flags)
    rows = [line.split(" | ") for line in stdout.splitlines() if line.startswith("| mnist")]
    assert status == 0 and len(rows) == 2 * 2 * 6
    assert {(row[1], row[4]) for row in rows} == {("real images", "2 x 3"), ("network", "2")}
    words = ("--sizes 150", "at most 100")
    refuses("benchmarks", "calibration", "--sizes", 150, words=words)


def test_searches_leave_the_test_set_alone(cli, refuses, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 300, "test": 100})
    asked, load = [], DATASETS["synthetic"]

    def watched(data_dir, split, test_dir):
        asked.append(split)
        return load(data_dir, split, test_dir)

    monkeypatch.setitem(DATASETS, "mnist", watched)
    flags = ["--num_samples", 40, "--held_out", "--steps", 1]
    path = tiny_checkpoint("seen.pth")
    for name in ("guidance", "samplers"):
        refuses("benchmarks", name, *flags, "--checkpoint", path, words=("--held_out", "seen.pth"))
    path = tiny_checkpoint("apart.pth", held_out=True)
    guided = [*flags, "--checkpoint", path, "--scales", "1"]
    assert cli("benchmarks", "guidance", *guided)[0] == 0
    few = [*flags[:3], "--checkpoint", path, "--sampler", "ddim", "--calls", "2"]
    assert cli("benchmarks", "samplers", *few)[0] == 0
    train = ["--max_minutes", 0.01, "--every", 1, "--seeds", 1, "--num_samples", 40, "--held_out"]
    train += ["--settings", "--width 8 --timesteps 20", "--sampling", "--steps 1"]
    status, stdout, stderr = cli("benchmarks", "train", *train)
    assert status == 0, stderr
    assert set(asked) == {"train"}
