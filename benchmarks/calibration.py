"""Do the stated spreads of the scores match their true spreads?"""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.special import gammaincinv
from torch import Tensor

from benchmarks.common import (
    Figure,
    draw,
    feature_networks,
    load_digits,
    reference_features,
    whole_numbers,
    with_spread,
    write_table,
)
from config import DATA_DIR, DEVICES, INCEPTION_DIMS, SamplingConfig, UserError, setting
from scoring.estimate import typical
from scoring.features import extract
from scoring.metrics import METRICS, NEAREST_K, Reference, Score, all_scores
from scoring.yardstick import stand_ins
from utils.data_loader import load_dataset
from utils.device import pick_device

CERTAIN = 0.9  # confidence level of the interval around a ratio
Round = list[dict[str, Score]]  # scores of disjoint sets of images


@dataclass(frozen=True)
class CalibrationConfig(SamplingConfig):
    """Which sets to score, of real images and of one network."""

    sizes: str = setting("2000,5000,10000", "numbers of images per set")
    num_samples: int = setting(60_000, "real images to split into sets, at most", low=40)
    sets: int = setting(30, "disjoint sets of real images per shuffle, at most", low=2)
    shuffles: int = setting(5, "how often to shuffle the training images and split them", low=1)
    path_to_model: str | None = setting(None, "also score samples of this network")
    seeds: int = setting(10, "sets that it draws, one per seed from --seed on", low=2)
    features: str = setting("mnist", "feature networks", choices=("mnist", "inception", "both"))
    dims: int = setting(768, "Inception layer", choices=INCEPTION_DIMS)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def calibrate(cfg: CalibrationConfig) -> None:
    """Stated and true spread of each metric, for real images and for a network over seeds."""
    sizes = whole_numbers("sizes", cfg.sizes, at_least=2 * (NEAREST_K + 1))
    train = load_dataset("mnist", cfg.data_dir, "train").images
    pool = stand_ins(train, cfg.num_samples)
    if max(sizes) > len(pool) // 2:
        raise UserError(f"--sizes {cfg.sizes}: must be at most {len(pool) // 2}, half the images")
    drawn = drawn_sets(cfg, max(sizes)) if cfg.path_to_model else []
    rows = []
    for network in feature_networks(cfg.features, cfg.dims, cfg.device):
        reference = Reference(reference_features(network, cfg.data_dir))
        real = extract(network, pool, "the training images", cache=True)
        own = [extract(network, images, "samples") for images in drawn]
        for n in sizes:
            rounds = [
                [all_scores(real[indices], reference) for indices in sets]
                for sets in shuffled(len(real), n, cfg)
            ]
            rows += table_rows([network.name, "real images", n], rounds)
            if own:
                found = [all_scores(features[:n], reference) for features in own]
                rows += table_rows([network.name, "network", n], [found])
    header = ["features", "images", "n", "metric", "sets", "mean", "true spread", "stated"]
    header += ["ratio", "least", "most"]  # bounds of the ratio at confidence CERTAIN
    write_table("calibration", header, rows, pick_device(cfg.device), keys=4)


def drawn_sets(cfg: CalibrationConfig, count: int) -> list[Tensor]:
    """`count` samples of the network for each seed."""
    model = load_digits(cfg.path_to_model, pick_device(cfg.device), "--path_to_model")
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    return [draw(model, count, dataclasses.replace(cfg, seed=seed)) for seed in seeds]


def shuffled(total: int, size: int, cfg: CalibrationConfig) -> Iterator[tuple[Tensor, ...]]:
    """For each shuffle, the indices of its sets."""
    for shuffle in range(cfg.shuffles):
        generator = torch.Generator().manual_seed(shuffle)
        order = torch.randperm(total, generator=generator)
        yield order[: min(cfg.sets, total // size) * size].split(size)


def table_rows(facts: list[Figure], rounds: list[Round]) -> list[list[Figure]]:
    """A row for each metric, from one or several rounds of sets."""
    rows = []
    sets = f"{len(rounds)} x {len(rounds[0])}" if len(rounds) > 1 else f"{len(rounds[0])}"
    for name in METRICS:
        scores = [[found[name] for found in sets_] for sets_ in rounds]
        mean, true, freedom, stated = spreads(scores)
        ratios: list[Figure] = [None] * 3
        if true:
            ratios = [stated / true, *ratio_interval(stated / true, freedom)]
        error = true / math.sqrt(2 * freedom)
        rows.append([*facts, name, sets, mean, with_spread(true, error), stated, *ratios])
    return rows


def spreads(rounds: list[list[Score]]) -> tuple[float, float, float, float]:
    """Mean, true spread, its degrees of freedom, and stated spread of one metric.

    The true spread is the root of the mean over rounds of the variance within a round, the stated
    one the root of the mean of the stated variances. Long tails make a variance less certain than
    it is for normally distributed scores, so the degrees of freedom are divided by 1 + k / 2, where
    k is the excess kurtosis (Box 1953).
    """
    values = [[value for value, _ in scores] for scores in rounds]
    freedom = sum(len(found) - 1 for found in values)
    squares = sum((len(found) - 1) * statistics.variance(found) for found in values)
    true = math.sqrt(squares / freedom)
    mean, stated = typical([score for scores in rounds for score in scores])
    means = [statistics.fmean(found) for found in values]
    apart = [value - m for m, found in zip(means, values, strict=True) for value in found]
    squared = statistics.fmean(x**2 for x in apart)
    excess = statistics.fmean(x**4 for x in apart) / squared**2 - 3 if squared else 0.0
    return mean, true, freedom / (1 + max(excess, 0) / 2), stated


def ratio_interval(ratio: float, freedom: float) -> tuple[float, float]:
    """Confidence interval of stated / true, by a chi-square of `freedom` degrees of freedom."""
    tails = ((1 - CERTAIN) / 2, (1 + CERTAIN) / 2)
    low, high = (math.sqrt(2 * gammaincinv(freedom / 2, tail) / freedom) for tail in tails)
    return ratio * low, ratio * high
