"""The floor, and how far from it a score is said to be."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_ind_from_stats

from config import UserError
from scoring.diagnosis import Sorted, class_floors
from scoring.estimate import Estimate, beside
from scoring.evaluation import Candidate, Scorer, mean_of
from scoring.features import MNISTFeatures
from scoring.metrics import METRICS, all_scores, fid, fid_spread
from scoring.yardstick import Yardstick, default_draws, random_pairs
from utils.data_loader import DatasetInfo, load_dataset


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """The spread of recall costs most of the time, and is not what these tests are about."""
    monkeypatch.setattr("scoring.metrics.HALVINGS", 10)


class Pixels:
    """Four pixels of an image are its features."""

    name, dim, version, batch_size, slow = "pixels", 4, "1", 500, False

    def __call__(self, images):
        return images.flatten(1).float() / 30


def pictures(count, seed, scale=30, shift=128):
    """(count, 1, 2, 2) uint8, Gaussian."""
    noise = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return (shift + scale * noise).round().clamp(0, 255).to(torch.uint8)


def features(images):
    return Pixels()(images)


def test_a_mean_has_the_spread_of_its_draws_if_they_are_enough():
    scores = [(1.0, 3.0), (2.0, 4.0), (6.0, 5.0), (3.0, 1.0), (3.0, 1.0)]
    five = Estimate.of(scores)
    assert five.value == 3 and five.measured and five.draws == 5
    assert five.spread == pytest.approx(statistics.stdev([1, 2, 6, 3, 3]))
    assert five.error == pytest.approx(five.spread / 5**0.5)
    four = Estimate.of(scores[:4])  # too few: the root mean square of what they state
    assert not four.measured and four.spread == pytest.approx((51 / 4) ** 0.5)
    assert Estimate.of(scores[:2], enough=2).spread == pytest.approx(0.5**0.5)


def test_means_differ_by_welchs_test():
    for distance in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0):
        a, b = Estimate(distance, 2.0, 5, True), Estimate(0.0, 1.0, 10, True)
        p = ttest_ind_from_stats(distance, 2.0, 5, 0.0, 1.0, 10, equal_var=False).pvalue
        assert a.differs(b) == b.differs(a) == (p < 0.05), distance
    known = Estimate(1.0, 0.5), Estimate(0.0, 0.1, 4)  # stated spreads: the normal quantile
    error = (0.25 + 0.01 / 4) ** 0.5
    assert known[0].differs(known[1]) == (1 / error > 1.96)
    assert not Estimate(1.9 * error, 0.5).differs(known[1])
    assert not Estimate(1.0, 0.0).differs(Estimate(1.0, 0.0))


def test_a_distance_is_in_standard_deviations_of_the_floor():
    fields = beside("fid", Estimate(5.0, 1.0), Estimate(2.0, 0.5, 10, True))
    assert fields["fid_distance"] == 6 and fields["fid_differs"] is True
    assert "fid_error" not in fields and fields["fid_floor"] == 2
    assert beside("fid", Estimate(5.0, 1.0), Estimate(5.0, 0.0))["fid_distance"] is None
    matched = beside("fid", Estimate(5.0, 1.0), Estimate(2.0, 0.5), Estimate(1.5, 1.0))
    assert matched["fid"] == 5 and matched["fid_matched"] == 1.5 and matched["fid_distance"] == -1
    rare = beside("fid", None, Estimate(2.0, 0.5))
    assert rare["fid"] is rare["fid_distance"] is rare["fid_differs"] is None


@pytest.mark.parametrize("count, draws", [(50, 10), (90, 6), (200, 3), (600, 1), (900, 1)])
def test_the_floor_is_what_disjoint_draws_of_training_images_score(count, draws):
    train, test = pictures(600, 1), pictures(400, 2)
    yardstick = Yardstick(Pixels(), "test", test, count, train)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    size = min(count, 600)
    sets = [features(train[order[k * size : (k + 1) * size]]) for k in range(draws)]
    assert len(yardstick.pairs) == draws and yardstick.size == size
    for name in METRICS:
        values, stated = zip(*(all_scores(x, features(test))[name] for x in sets), strict=True)
        assert yardstick.floor[name].value == pytest.approx(statistics.fmean(values))
        rms = statistics.fmean(spread**2 for spread in stated) ** 0.5
        spread = statistics.stdev(values) if draws >= 5 else rms
        assert yardstick.floor[name].spread == pytest.approx(spread)
    scores = yardstick.score(features(pictures(count, 3)))
    assert scores["n_floor"] == size and scores["n_floor_draws"] == draws
    assert scores["floor_spread"] == ("over draws" if draws >= 5 else "stated")
    compared = scores["fid_matched" if count > size else "fid"]
    assert scores["fid_distance"] == pytest.approx(
        (compared - scores["fid_floor"]) / scores["fid_floor_spread"]
    )
    assert len(Yardstick(Pixels(), "test", test, count, train, draws=1).pairs) == 1


def test_more_samples_than_training_images_are_compared_at_the_size_of_the_floor():
    train, test, samples = pictures(100, 1), pictures(400, 2), features(pictures(300, 3))
    yardstick = Yardstick(Pixels(), "test", test, len(samples), train)
    (part,) = yardstick.subsets(len(samples))
    assert len(part.unique()) == 100 and part.max() > 100
    scores = yardstick.score(samples)
    assert scores["fid"] == pytest.approx(fid(samples, features(test)))
    assert scores["fid_matched"] == pytest.approx(fid(samples[part], features(test)))
    assert scores["fid_matched"] > 1.5 * scores["fid"]  # the bias of a third of the images
    assert abs(scores["fid_distance"]) < 3  # all are of the same kind


def test_pairs_are_disjoint_and_of_equal_size():
    pairs = random_pairs(100, 12, 10)
    assert len(pairs) == 10 and all(len(a) == len(b) == 12 for a, b in pairs)
    assert all(not set(a.tolist()) & set(b.tolist()) for a, b in pairs)
    fit = torch.cat([torch.cat(both) for both in pairs[:4]])  # 96 of 100 images
    assert len(fit.unique()) == 96
    assert len(pairs[0][0]) == len(random_pairs(101, 50, 1)[0][1]) - 38


def test_a_reference_alone_is_cut_and_the_samples_are_compared_on_equal_terms():
    reference, samples = pictures(401, 1), features(pictures(300, 2))
    yardstick = Yardstick(Pixels(), "theirs", reference, len(samples))
    assert yardstick.size == 200 and len(yardstick.pairs) == 10
    whole = features(reference)
    floors = [fid(whole[a], whole[b]) for a, b in yardstick.pairs]
    parts = yardstick.subsets(300)
    own = [fid(samples[k], whole[b]) for k, (_, b) in zip(parts, yardstick.pairs, strict=True)]
    assert {len(part.unique()) for part in parts} == {200}
    scores = yardstick.score(samples)
    assert scores["fid"] == pytest.approx(fid(samples, whole))
    assert scores["fid_floor"] == pytest.approx(statistics.fmean(floors))
    assert scores["fid_matched"] == pytest.approx(statistics.fmean(own))
    pairs = zip(parts, yardstick.pairs, strict=True)
    stated = [fid_spread(samples[k], whole[b]) for k, (_, b) in pairs]  # of the same samples: no
    rms = statistics.fmean(spread**2 for spread in stated) ** 0.5  # mean makes it any smaller
    assert scores["fid_matched_spread"] == pytest.approx(rms) and "fid_error" not in scores
    distance = (statistics.fmean(own) - statistics.fmean(floors)) / statistics.stdev(floors)
    assert scores["fid_distance"] == pytest.approx(distance)
    assert scores["n_reference"] == 401 and scores["n_floor"] == 200


@pytest.mark.parametrize("alone", [False, True])
def test_a_perfect_model_is_near_and_a_poor_one_is_told(alone):
    train, test = pictures(2000, 1), pictures(400, 2)
    yardstick = Yardstick(Pixels(), "test", test, 200, None if alone else train)
    distances, told = [], []
    for seed in range(10):
        scores = yardstick.score(features(pictures(200, 10 + seed)))
        distances.append([scores[f"{name}_distance"] for name in METRICS])
        told.append([scores[f"{name}_differs"] for name in METRICS])
    distances, told = torch.tensor(distances), torch.tensor(told).double()
    assert (distances.abs() < 3).double().mean() > 0.97 and distances.mean(0).abs().max() < 1.5
    assert told.mean() < 0.15  # 0.05 and its own uncertainty
    scores = yardstick.score(features(pictures(200, 5, scale=40)))
    assert scores["fid_differs"] and scores["fid_distance"] > 5
    assert scores["precision_differs"] and scores["precision_distance"] < -3


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="test: holds 5 images"):
        Yardstick(Pixels(), "test", pictures(5, 1), 20, pictures(50, 2))
    with pytest.raises(UserError, match="the training set: holds 5 images"):
        Yardstick(Pixels(), "test", pictures(50, 1), 20, pictures(5, 2))
    with pytest.raises(UserError, match="theirs: holds 11 images"):
        Yardstick(Pixels(), "theirs", pictures(11, 1), 20)


def test_a_class_has_a_floor_of_its_own():
    def images(count, seed):
        x = features(pictures(count, seed))
        return Sorted(x, torch.eye(3)[torch.arange(count) % 2])  # nothing is of the third class

    reference = images(200, 1)
    draws = [images(100, 2 + k) for k in range(6)]
    floors = class_floors([(draw, reference) for draw in draws])
    of_first = [fid(draw.features[::2], reference.features[::2]) for draw in draws]
    assert floors[0].value == pytest.approx(statistics.fmean(of_first)) and floors[2] is None
    assert floors[0].spread == pytest.approx(statistics.stdev(of_first))


def test_numbers_of_several_results_are_averaged():
    one = {"a": 1.0, "n": 4, "name": "x", "rows": [{"k": 0, "b": None}, {"k": 1, "b": 2.0}]}
    other = {"a": 2.0, "n": 4, "name": "x", "rows": [{"k": 0, "b": 3.0}, {"k": 1, "b": 3.0}]}
    merged = mean_of([one, other])
    assert merged["rows"] == [{"k": 0, "b": 3.0}, {"k": 1, "b": 2.5}]
    assert (merged["a"], merged["n"], merged["name"]) == (1.5, 4, "x")


def test_several_seeds_give_a_mean_with_its_error():
    yardstick = Yardstick(Pixels(), "test", pictures(300, 1), 60, pictures(600, 2))
    scorer = Scorer(Pixels(), yardstick, DatasetInfo("x", 1, 2, 2, (), ()), None, "cpu")
    results = [yardstick.score(features(pictures(60, 3 + k))) | {"seed": 7 + k} for k in range(4)]
    results = [found | {"warnings": ["few"]} for found in results]
    merged = scorer.over_seeds(results)
    for name in METRICS:
        values = [found[name] for found in results]
        assert merged[name] == pytest.approx(statistics.fmean(values))
        assert merged[f"{name}_spread"] == pytest.approx(statistics.stdev(values))
        assert merged[f"{name}_error"] == pytest.approx(statistics.stdev(values) / 2)
        distance = (merged[name] - merged[f"{name}_floor"]) / merged[f"{name}_floor_spread"]
        assert merged[f"{name}_distance"] == pytest.approx(distance)
    assert merged["seed"] == 7 and merged["seeds"] == 4 and merged["warnings"] == ["few"]
    assert merged["results"] == results and merged["n"] == 60


@pytest.mark.parametrize("slow, again", [(True, 0), (False, 60)])
def test_a_slow_network_looks_at_samples_once(own_folder, slow, again):
    """So an interrupted run with several seeds continues where it was."""
    seen = []

    class Counting(Pixels):
        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    network = Counting()
    network.slow = slow
    yardstick = Yardstick(network, "test", pictures(300, 1), 60, pictures(600, 2))
    scorer = Scorer(network, yardstick, DatasetInfo("x", 1, 2, 2, (), ()), None, "cpu")
    candidate = Candidate(pictures(60, 3), None, "x", {})
    seen.clear()
    first = scorer.evaluate(candidate, False, False)
    assert sum(seen) == 60
    assert scorer.evaluate(candidate, False, False) == first
    assert sum(seen) == 60 + again


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr("utils.data_loader.SYNTHETIC_SIZE", {"train": 600, "test": 200})


def test_seeds_are_those_of_single_runs(cli, refuses, tiny_checkpoint, small):
    score = ["--path_to_model", tiny_checkpoint(), "--num_samples", 50, "--steps", 2]
    status, stdout, _ = cli("validation", *score, "--seed", 3, "--seeds", 2, "--json", "both.json")
    assert status == 0 and "2 seeds, ± error" in stdout and "+" in stdout and "yes" in stdout
    both = json.loads(Path("both.json").read_text())
    for k in range(2):
        assert cli("validation", *score, "--seed", 3 + k, "--json", "one.json")[0] == 0
        one = json.loads(Path("one.json").read_text())
        single = both["results"][k]
        assert {key: one[key] for key in single} == single and "fid_error" not in one
    first, second = (found["fid"] for found in both["results"])
    assert both["fid"] == pytest.approx((first + second) / 2) and first != second
    assert both["fid_error"] == pytest.approx(abs(first - second) / 2)
    assert both["classes"][0]["fid_floor"] == one["classes"][0]["fid_floor"]
    refuses("validation", "--images", "a.npz", "--seeds", 2, words=("--seeds 2", "--images"))
    last = ["--seed", 2**63 - 1, "--seeds", 2]
    refuses("validation", *score, *last, words=("--seeds 2", "2^63"))
    refuses("validation", *score, "--seeds", 0, words=("--seeds 0", ">= 1"))
    refuses("validation", *score, "--floor_draws", 0, words=("--floor_draws 0", ">= 1"))


def test_held_out_images_are_no_training_images(small):
    whole = load_dataset("synthetic", "", "train").images
    train, chosen = (load_dataset("synthetic", "", s, held_out=True) for s in ("train", "test"))
    assert len(train.images) == 500 and len(chosen.images) == 100
    assert torch.equal(torch.cat([train.images, chosen.images]), whole)
    limited = load_dataset("synthetic", "", "train", limit=7, held_out=True)
    assert torch.equal(limited.images, whole[:7])


def test_what_was_trained_on_is_no_reference(cli, refuses, tiny_checkpoint, small):
    draw = ["--num_samples", 50, "--steps", 2, "--floor_draws", 1, "--json", "out.json"]
    path = tiny_checkpoint()
    words = (f"--held_out: {path} was trained on",)
    refuses("validation", "--path_to_model", path, "--held_out", words=words)
    both = ["--held_out", "--reference_images", "a.npz"]
    refuses("validation", "--path_to_model", path, *both, words=("--held_out", "give one"))
    path = tiny_checkpoint("apart.pth", held_out=True)
    for flags, name, size in ((["--held_out"], "held-out images", 100), ([], "test set", 200)):
        assert cli("validation", "--path_to_model", path, *draw, *flags)[0] == 0
        scores = json.loads(Path("out.json").read_text())
        assert scores["reference"] == f"synthetic {name}" and scores["n_reference"] == size
    distil = ["--teacher", tiny_checkpoint(), "--held_out", "--dataset", "synthetic"]
    refuses("main", *distil, words=("--held_out True: the teacher has False",))


def test_a_run_with_images_held_out_learns_from_the_rest(cli, refuses, small):
    run = ["--dataset", "synthetic", "--width", 8, "--timesteps", 20, "--batch_size", 250]
    run += ["--epochs", 1, "--sample_every", 0, "--experiment_name", "h"]
    assert cli("main", *run, "--held_out")[0] == 0
    state = torch.load("checkpoints/h/model_epoch_0.pth", weights_only=True)
    assert state["config"]["held_out"] is True and state["step"] == 2  # of 500 images, not of 600
    refuses("main", *run, words=("--held_out False", "True"))


def test_slow_features_have_fewer_draws_and_few_images_a_warning():
    assert default_draws(MNISTFeatures, 50_000) == 10
    assert [default_draws(Pixels(), n) for n in (500, 2000, 50_000)] == [10, 5, 1]
    yardstick = Yardstick(Pixels(), "test", pictures(300, 1), 60, pictures(600, 2))
    assert "1999 images are below 2000" in yardstick.warnings(1999)[0]
    assert yardstick.warnings(2000) == []
