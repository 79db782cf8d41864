"""Score a checkpoint, every checkpoint of a run, or any set of images against real ones.

Each score is printed beside its floor: what as many real images get from the same feature network
against the same reference. A model is as good as real data when it reaches the floor.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import DATA_DIR, EvalConfig, UserError, parse, run
from models.trained import TrainedModel, load_trained
from sampling.draw import count_evaluated, draw_images, labels_for, resolve
from scoring.evaluation import Candidate, Scorer
from scoring.features import check_features, load_features
from scoring.metrics import METRICS, NEAREST_K
from scoring.yardstick import Yardstick, content_hash, print_classes, print_scores, stand_ins
from utils import distributed
from utils.checkpoint import epoch_number, list_checkpoints
from utils.data_loader import describe, load_dataset
from utils.device import arithmetic, pick_device
from utils.files import load_images, writable_folder, write_atomically
from utils.tensorboard_logger import TensorBoardLogger
from utils.visualization import plot_curve, plot_scores, save_figure


def find_models(cfg: EvalConfig) -> list[Path]:
    """The checkpoints to score: --path_to_model, or the last or all of --experiment_name."""
    if cfg.path_to_model:
        return [Path(cfg.path_to_model)]
    if not cfg.experiment_name:
        raise UserError("nothing to score: give --path_to_model, --experiment_name or --images")
    folder = Path("checkpoints") / cfg.experiment_name
    saved = list_checkpoints(folder)
    if not saved:
        raise UserError(f"--experiment_name {cfg.experiment_name}: no checkpoints in {folder}")
    return saved if cfg.validate_all else saved[-1:]


def load_model(cfg: EvalConfig, path: Path, device: torch.device) -> TrainedModel:
    """The model to score. Raises UserError where it is not what the flags say."""
    model = load_trained(path, device, "--path_to_model")
    if cfg.model_type and cfg.model_type != model.config.model_type:
        raise UserError(f"--model_type {cfg.model_type}: {path} holds a {model.config.model_type}")
    check_features(cfg.features, model.data.shape, f"--path_to_model {path}")
    return model


def draw_candidate(cfg: EvalConfig, path: Path, model: TrainedModel) -> Candidate:
    """Sample from a checkpoint, and count what an image costs."""
    sampling = resolve(cfg, model)
    labels = labels_for(model, cfg.num_samples, cfg.seed)
    if labels is None and (cfg.tstr or sampling.guidance != 1):
        flag = "--tstr" if cfg.tstr else f"--guidance {sampling.guidance:g}"
        raise UserError(f"{flag}: {path} is unconditional, and its images have no labels")
    evaluated = count_evaluated(model.net)  # by this process
    what = f"drawing with {path.name}"
    images = draw_images(model, cfg.num_samples, sampling, what, labels=labels)
    options = dataclasses.asdict(sampling)
    del options["precision"]  # a metric has that name, and `arithmetic` says what it came to
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
    """Anybody's images, from a folder of pictures, a .npz or a .npy."""
    path = Path(cfg.images)
    images = load_images(path, "--images")[: cfg.num_samples]
    if len(images) <= NEAREST_K:
        raise UserError(
            f"--images {path}: holds {len(images)} images, must be at least {NEAREST_K + 1}"
        )
    check_features(cfg.features, tuple(images.shape[1:]), f"--images {path}")
    facts = {"images": cfg.images, "images_hash": content_hash(images.numpy().tobytes())}
    return Candidate(images, None, cfg.experiment_name or path.stem, facts)


def make_scorer(
    cfg: EvalConfig, candidate: Candidate, model: TrainedModel | None, device: torch.device
) -> Scorer:
    """The reference is the test set of the model's data, or --reference_images."""
    name = model.config.dataset if model else cfg.dataset
    data_dir = cfg.data_dir or (model.config.data_dir if model else DATA_DIR)
    test_dir = cfg.test_dir or (model.config.test_dir if model else None)
    real = partial(load_dataset, name, data_dir, test_dir=test_dir)
    stand_in, reference = None, cfg.reference_images
    if reference:
        fewest = 2 * (NEAREST_K + 1)  # as one half of them is held against the other
        images = load_images(Path(reference), "--reference_images", at_least=fewest)
    else:
        reference, images = f"{name} test set", real("test").images
    check_shapes(cfg, candidate.images, images, reference)
    if not cfg.reference_images:
        stand_in = stand_ins(real("train").images, len(candidate.images))
    network = load_features(cfg.features, cfg.dims, device)
    yardstick = Yardstick(network, reference, images, stand_in)
    info = model.data if model else describe(name, candidate.images)
    return Scorer(network, yardstick, info, real, device)


def check_shapes(cfg: EvalConfig, images: Tensor, reference: Tensor, name: str) -> None:
    """Raises UserError where samples and reference differ in size or colour."""
    size, wanted = tuple(images.shape[1:]), tuple(reference.shape[1:])
    if size != wanted:
        what = f"--images {cfg.images}" if cfg.images else "the samples"
        raise UserError(f"{what}: are of size {size}, must be {wanted} as in {name}")


def write_scores(path: Path, scores: dict | list) -> None:
    write_atomically(path, (json.dumps(scores, indent=2) + "\n").encode())
    print(f"\nwritten to       {path}")


def validate_one(cfg: EvalConfig, device: torch.device) -> None:
    """Score one candidate; table, JSON and figure."""
    model = None
    if cfg.images:
        candidate = read_candidate(cfg)
    else:
        path = find_models(cfg)[0]
        model = load_model(cfg, path, device)
        candidate = draw_candidate(cfg, path, model)
    if not distributed.is_first():
        return
    scorer = make_scorer(cfg, candidate, model, device)
    scores = scorer.evaluate(candidate, cfg.memorization, cfg.tstr)
    folder = Path("outputs") / candidate.name
    name = f"scores_{scores['features']}_{scores['n']}"
    save_figure(folder / f"{name}.png", plot_scores(scores, candidate.images))
    print_scores(scores)
    if "classes" in scores:
        print_classes(scores)
    write_scores(Path(cfg.json) if cfg.json else folder / f"{name}.json", scores)
    for line in scores["warnings"]:
        print(f"validation.py: warning: {line}", file=sys.stderr)


def validate_all(cfg: EvalConfig, device: torch.device) -> None:
    """Score every checkpoint of an experiment; a curve, TensorBoard scalars and one JSON file."""
    scorer, logger, found = None, None, []
    for path in find_models(cfg):
        model = load_model(cfg, path, device)
        candidate = draw_candidate(cfg, path, model)
        if not distributed.is_first():
            continue
        scorer = scorer or make_scorer(cfg, candidate, model, device)
        scores = scorer.evaluate(candidate, cfg.memorization, cfg.tstr)
        found.append({"epoch": epoch_number(path), **scores})
        print(f"{path}: fid {scores['fid']:.3f}, floor {scores['fid_floor']:.3f}")
        logger = logger or TensorBoardLogger(Path("runs") / cfg.experiment_name / "validation")
        values = {f"{name}_{scores['features']}": scores[name] for name in METRICS}
        logger.scalars(epoch_number(path), group="validation", **values)
    if not distributed.is_first():
        return
    logger.close()
    folder = Path("outputs") / cfg.experiment_name
    name = f"scores_{scores['features']}_{scores['n']}_all"
    save_figure(folder / f"{name}.png", plot_curve(found))
    write_scores(Path(cfg.json) if cfg.json else folder / f"{name}.json", found)


def main() -> None:
    cfg = parse(EvalConfig, "Score a model, or any images, against real ones.")
    if cfg.images:
        for flag in ("path_to_model", "validate_all", "tstr", *cfg.carried()):
            if getattr(cfg, flag):
                raise UserError(f"--images and --{flag}: give one of them")
    if cfg.validate_all and (cfg.path_to_model or not cfg.experiment_name):
        raise UserError("--validate_all: needs --experiment_name and no --path_to_model")
    if cfg.json:
        writable_folder(Path(cfg.json).parent)
    device = pick_device(cfg.device)
    with distributed.joined(device):
        (validate_all if cfg.validate_all else validate_one)(cfg, device)


if __name__ == "__main__":
    run(main)
