"""Score a checkpoint, every checkpoint of a run, or any set of images against real ones.

Each score is printed next to its floor: what the same number of real images score, with the same
feature network and reference, over several draws. A model that reaches the floor is as good as
real data. The distance to the floor is in standard deviations of one draw.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from config import DATA_DIR, EvalConfig, UserError, parse
from models.trained import TrainedModel, load_trained
from sampling.draw import count_evaluated, draw_images, labels_for, resolve
from scoring.bits import measure, print_bits
from scoring.evaluation import Candidate, Scorer
from scoring.features import FeatureNetwork, check_features, load_features
from scoring.metrics import METRICS, NEAREST_K
from scoring.tables import distance_text, print_classes, print_scores
from scoring.yardstick import Yardstick, content_hash, image_hash
from utils import distributed
from utils.checkpoint import epoch_number, list_checkpoints, newest
from utils.data_loader import Dataset, describe, load_dataset
from utils.device import arithmetic, pick_device
from utils.files import check_output, is_stream, writable_folder, write_atomically
from utils.image_checks import check_shape
from utils.images import load_images, read_images, tell
from utils.provenance import provenance
from utils.random import random_order
from utils.script import run
from utils.tensorboard_logger import TensorBoardLogger
from utils.visualization import (
    comparable_fid,
    plot_bits,
    plot_curve,
    plot_scores,
    save_figure,
)


def find_models(cfg: EvalConfig) -> list[Path]:
    """The checkpoints to score: --path_to_model, or the last or all of --experiment_name."""
    if cfg.path_to_model:
        return [newest(cfg.path_to_model)]
    if not cfg.experiment_name:
        raise UserError("nothing to score: give --path_to_model, --experiment_name or --images")
    folder = Path("checkpoints") / cfg.experiment_name
    saved = list_checkpoints(folder)
    if not saved:
        raise UserError(f"--experiment_name {cfg.experiment_name}: no checkpoints in {folder}")
    return saved if cfg.validate_all else saved[-1:]


def load_model(cfg: EvalConfig, path: Path, device: torch.device) -> TrainedModel:
    """The model to score. Raises UserError if it does not match the flags."""
    model = load_trained(path, device, "--path_to_model", cfg.held_out)
    if cfg.model_type and cfg.model_type != model.config.model_type:
        raise UserError(f"--model_type {cfg.model_type}: {path} holds a {model.config.model_type}")
    if cfg.dataset and cfg.dataset != model.data.name:
        raise UserError(f"--dataset {cfg.dataset}: {path} was trained on {model.data.name}")
    if not cfg.likelihood:
        check_features(cfg.features, model.data.shape, f"--path_to_model {path}")
    return model


def draw_candidate(cfg: EvalConfig, path: Path, model: TrainedModel) -> Candidate:
    """Sample from a checkpoint and count the network calls per image."""
    sampling = resolve(cfg, model)
    labels = labels_for(model, cfg.num_samples, cfg.seed)
    if labels is None and (cfg.tstr or sampling.guidance != 1):
        flag = "--tstr" if cfg.tstr else f"--guidance {sampling.guidance:g}"
        raise UserError(f"{flag}: {path} is unconditional, so its images have no labels")
    evaluated = count_evaluated(model.net)  # in this process
    what = f"drawing with {path.name}"
    images = draw_images(model, cfg.num_samples, sampling, what, labels=labels)
    options = dataclasses.asdict(sampling)
    del options["precision"]  # a metric has that name; `arithmetic` has the precision used
    facts = {
        "model": str(path),
        "model_hash": content_hash(path.read_bytes()),
        "model_type": model.config.model_type,
        **options,
        "arithmetic": arithmetic(model.device, cfg.precision),
        "network_calls": distributed.total(sum(evaluated)) / cfg.num_samples,
    }
    return Candidate(images, labels, cfg.experiment_name or path.parent.name, facts)


def read_candidate(cfg: EvalConfig) -> Candidate:
    """Images from any source: a folder of pictures, a .npy, or a .npz, which may have labels."""
    path = Path(cfg.images)
    found = read_images(path, "--images", at_least=NEAREST_K + 1)
    tell(found.notes)
    images, labels = found.images, found.labels
    check_features(cfg.features, tuple(images.shape[1:]), f"--images {path}")
    if len(images) > cfg.num_samples:  # not the first ones: files are often sorted by class
        chosen = random_order(len(images), cfg.seed)[: cfg.num_samples]
        images, labels = images[chosen], None if labels is None else labels[chosen]
    if cfg.tstr and labels is None:
        raise UserError(f"--tstr: {path} has no labels; a .npz can have them as the array `labels`")
    facts = {"images": cfg.images, "images_hash": image_hash(images)}
    given = Path(os.path.abspath(path))  # has a name even if the path is `..`
    name = cfg.experiment_name or (given.name if path.is_dir() else given.stem)
    return Candidate(images, labels, name, facts)


@dataclass(frozen=True)
class Comparison:
    """What to compare with, and by which features.

    Attributes:
        network: computes the features.
        reference: what the reference is.
        images: the reference, uint8 (N, C, H, W).
        name: of the data set.
        test: its test set, or None if nothing needs it.
        load: load("train") and load("test") load it.
    """

    network: FeatureNetwork
    reference: str
    images: Tensor
    name: str
    test: Dataset | None
    load: Callable[[str], Dataset]


def load_comparison(
    cfg: EvalConfig, model: TrainedModel | None, device: torch.device
) -> Comparison:
    """The feature network, and the test set of the model's data, or the images that --held_out or
    --reference_images select. Raises UserError before any image is drawn, which takes minutes."""
    name = model.config.dataset if model else cfg.dataset or "mnist"
    options = {"test_dir": cfg.test_dir, "held_out": cfg.held_out}
    if model:
        load = partial(model.dataset, data_dir=cfg.data_dir, **options)
    else:
        load = partial(load_dataset, name, cfg.data_dir or DATA_DIR, **options)
    reference = cfg.reference_images
    needed = not reference or cfg.memorization or cfg.tstr
    test = load("test") if needed else None
    if reference:
        fewest = 2 * (NEAREST_K + 1)  # because one half is compared with the other
        images = load_images(Path(reference), "--reference_images", at_least=fewest)
    else:
        reference = f"{name} " + ("held-out images" if cfg.held_out else "test set")
        images = test.images
    network = load_features(cfg.features, cfg.dims, device)
    return Comparison(network, reference, images, name, test, load)


def make_scorer(
    cfg: EvalConfig,
    candidate: Candidate,
    model: TrainedModel | None,
    against: Comparison,
    device: torch.device,
) -> Scorer:
    """A scorer for candidates like this one."""
    name, test, reference = against.name, against.test, against.reference
    source = f"--images {cfg.images}" if cfg.images else "the samples"
    check_shape(candidate.images, tuple(against.images.shape[1:]), source, like=reference)
    if model:
        info = model.data
    else:
        info = test.info if test else describe(name, candidate.images)
    labels, classes = candidate.labels, info.num_classes
    if labels is not None and labels.max() >= classes and (classes or cfg.tstr):
        raise UserError(f"{source}: labels up to {labels.max()}, but {name} has {classes} classes")
    if test and cfg.reference_images:
        check_shape(candidate.images, test.info.shape, source, like=f"{name} test set")
    train = None if cfg.reference_images else against.load("train").images
    network, count = against.network, len(candidate.images)
    yardstick = Yardstick(network, reference, against.images, count, train, cfg.floor_draws)
    return Scorer(network, yardstick, info, against.load, device)


def result_path(cfg: EvalConfig, folder: str, name: str, deciding: object) -> Path:
    """--json, or a file in outputs/ whose name ends in a hash of `deciding` as JSON."""
    digest = content_hash(json.dumps(deciding, sort_keys=True).encode())[:6]
    return Path(cfg.json) if cfg.json else Path("outputs") / folder / f"{name}_{digest}.json"


def short_name(path: str | Path) -> str:
    """A file's name without its extension, cut so that the result's name is not too long."""
    return Path(path).stem[:50]


def write_scores(cfg: EvalConfig, candidate: Candidate, found: dict | list) -> Path:
    """Write the result before anything is printed, and return its path.

    The name says what was scored and ends in a hash of everything that affects a score, so the
    result of another model, seed or sampler never overwrites it.
    """
    scores = found if isinstance(found, dict) else found[-1]
    what = "all" if cfg.validate_all else short_name(scores.get("model", "images"))
    labels = candidate.labels
    deciding = {**candidate.facts, "labels": None if labels is None else image_hash(labels)}
    deciding |= {key: scores[key] for key in ("reference", "reference_hash", "feature_hash")}
    deciding |= {key: scores.get(key) for key in ("n_floor_draws", "seeds")}
    deciding |= {"memorization": cfg.memorization, "tstr": cfg.tstr}
    name = f"scores_{what}_{scores['features']}_{scores['n']}"
    path = result_path(cfg, candidate.name, name, deciding)
    made = {"provenance": provenance(pick_device(cfg.device))}
    found = found | made if found is scores else [each | made for each in found]
    write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
    return path


def save_beside(path: Path, figure: Figure | None, what: str = "") -> None:
    """Save a figure next to the result, if there is one; not next to a device or a pipe."""
    if figure and not is_stream(path):
        save_figure(path.with_name(f"{path.stem}{what}.png"), figure)


def validate_one(cfg: EvalConfig, device: torch.device) -> None:
    """Score images, or a model's samples from one or more seeds; make a table, JSON and figure."""
    model, scorer, found = None, None, []
    if not cfg.images:
        path = find_models(cfg)[0]
        model = load_model(cfg, path, device)
    with distributed.first_goes_ahead():
        against = load_comparison(cfg, model, device)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        own = dataclasses.replace(cfg, seed=seed)
        candidate = draw_candidate(own, path, model) if model else read_candidate(own)
        if distributed.is_first():
            scorer = scorer or make_scorer(cfg, candidate, model, against, device)
            found.append(scorer.evaluate(candidate, cfg.memorization, cfg.tstr))
    if not distributed.is_first():
        return
    scores = scorer.over_seeds(found) if cfg.seeds > 1 else found[0]
    path = write_scores(cfg, candidate, scores)
    save_beside(path, plot_scores(scores, candidate.images))
    save_beside(path, scorer.copies, "_memorization")
    print_scores(scores)
    if "classes" in scores:
        print_classes(scores)
    print(f"\nwritten to       {path}")
    for line in scores["warnings"]:
        print(f"validation.py: warning: {line}", file=sys.stderr)


def validate_all(cfg: EvalConfig, device: torch.device) -> None:
    """Score every checkpoint of a run; write a curve, TensorBoard scalars and one JSON file."""
    scorer, against, logger, found = None, None, None, []
    for path in find_models(cfg):
        model = load_model(cfg, path, device)
        with distributed.first_goes_ahead():
            against = against or load_comparison(cfg, model, device)
        candidate = draw_candidate(cfg, path, model)
        if not distributed.is_first():
            continue
        scorer = scorer or make_scorer(cfg, candidate, model, against, device)
        scores = scorer.evaluate(candidate, cfg.memorization, cfg.tstr)
        found.append({"epoch": epoch_number(path), **scores})
        print(
            f"{path}: fid {scores[comparable_fid([scores])]:.3f}, floor {scores['fid_floor']:.3f},"
            f" distance {distance_text(scores, 'fid')}"
        )
        folder = Path("runs") / cfg.experiment_name / "validation"
        logger = logger or TensorBoardLogger(folder, first_step=None)
        values = {f"{name}_{scores['features']}": scores[name] for name in METRICS}
        logger.scalars(epoch_number(path), group="validation", **values)
    if not distributed.is_first():
        return
    logger.close()
    path = write_scores(cfg, candidate, found)
    save_beside(path, plot_curve(found))
    save_beside(path, scorer.copies, "_memorization")
    print(f"\nwritten to       {path}")


def validate_likelihood(cfg: EvalConfig, device: torch.device) -> None:
    """Measure a model's bits per dimension on its test set; make a table, JSON and figure."""
    path = find_models(cfg)[0]
    model = load_model(cfg, path, device)
    if not distributed.is_first():
        return
    train, test = (
        model.dataset(split, cfg.data_dir, cfg.test_dir, held_out=cfg.held_out)
        for split in ("train", "test")
    )
    options = {"count": cfg.num_samples, "flow": cfg.flow}
    options |= {name: getattr(cfg, name) for name in ("seed", "precision", "batch_size")}
    scores = {
        "model": str(path),
        "model_hash": content_hash(path.read_bytes()),
        "arithmetic": arithmetic(device, cfg.precision),
        **measure(model, train, test, **options),
        "provenance": provenance(device),
    }
    deciding = [scores[key] for key in ("model_hash", "reference_hash", "seed", "arithmetic")]
    name = f"likelihood_{short_name(path)}_{scores['n']}"
    folder = cfg.experiment_name or path.parent.name
    written = result_path(cfg, folder, name, [*deciding, cfg.flow])
    write_atomically(written, (json.dumps(scores, indent=2) + "\n").encode())
    save_beside(written, plot_bits(scores))
    print_bits(scores)
    print(f"\nwritten to       {written}")


def check_flags(cfg: EvalConfig) -> None:
    """Raises UserError if flags do not go together."""
    if cfg.flow and not cfg.likelihood:
        raise UserError(f"--flow {cfg.flow}: needs --likelihood")
    sampling = tuple(cfg.carried())
    apart = {"images": ("path_to_model", "likelihood", "validate_all")}
    apart["likelihood"] = ("validate_all", "reference_images", "memorization", "tstr")
    for flag, others in apart.items():
        for other in (*others, *sampling):
            if getattr(cfg, flag) and (other in sampling or getattr(cfg, other)):
                raise UserError(f"--{flag} and --{other}: give one, not both")
    if cfg.flow == 1:
        raise UserError("--flow 1: must be 0 or an integer >= 2, for a standard error")
    if cfg.seeds > 1 and (cfg.images or cfg.likelihood or cfg.validate_all):
        raise UserError(
            f"--seeds {cfg.seeds}: needs one model, not --images, --likelihood or --validate_all"
        )
    if cfg.seed + cfg.seeds > 2**63:
        raise UserError(f"--seeds {cfg.seeds}: the last seed would be above 2^63 - 1")
    if cfg.held_out and cfg.reference_images:
        raise UserError("--held_out and --reference_images: give one, not both")
    if cfg.validate_all and (cfg.path_to_model or not cfg.experiment_name):
        raise UserError("--validate_all: needs --experiment_name and no --path_to_model")


def main() -> None:
    cfg = parse(EvalConfig, "Score a model, or any images, against real images.")
    check_flags(cfg)
    if cfg.json:
        check_output(cfg.json, "--json", (".json",))
    else:
        writable_folder(Path("outputs"))
    device = pick_device(cfg.device)
    with distributed.joined(device):
        if cfg.likelihood:
            validate_likelihood(cfg, device)
        else:
            (validate_all if cfg.validate_all else validate_one)(cfg, device)


if __name__ == "__main__":
    run(main)
