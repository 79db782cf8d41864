"""Score a checkpoint, every checkpoint of a run, or any set of images against real ones.

Each score is printed beside its floor: what as many real images get from the same feature network
against the same reference. A model is as good as real data when it reaches the floor.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import DIGIT_DATASETS, EvalConfig, UserError, parse, run
from generate import count_evaluated, draw_images, load_model
from models.drawing import pick_labels
from models.samplers import SAMPLERS, check_steps
from utils import distributed
from utils.checkpoint import epoch_number, list_checkpoints
from utils.classifier import accuracy, train_classifier
from utils.data_loader import load_dataset
from utils.device import arithmetic, pick_device
from utils.diagnosis import Nearness, class_table, confusion_matrix
from utils.features import MNISTFeatures, extract, load_features
from utils.files import load_images, writable_folder, write_atomically
from utils.metrics import NEAREST_K
from utils.scoring import METRICS, Yardstick, content_hash, print_classes, print_scores, stand_ins
from utils.tensorboard_logger import TensorBoardLogger
from utils.visualization import plot_curve, plot_nearness, plot_scores, save_figure

TSTR_STEPS = 1000  # of training each of the two classifiers


@dataclass
class Candidate:
    """What is scored.

    images: uint8 (N, 1, H, W). labels: (N,) int64 that were asked for, or None. name: the folder
    under outputs/. dataset: what they should look like. facts: where they are from.
    """

    images: Tensor
    labels: Tensor | None
    name: str
    dataset: str
    facts: dict


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


def draw_candidate(cfg: EvalConfig, path: Path, device: torch.device) -> Candidate:
    """Sample from a checkpoint, and count what an image costs."""
    train_cfg, diffusion, net = load_model(path, device, "--path_to_model")
    if cfg.model_type and cfg.model_type != train_cfg.model_type:
        raise UserError(f"--model_type {cfg.model_type}: {path} holds a {train_cfg.model_type}")
    labels = pick_labels(net, cfg.num_samples, cfg.seed)
    guidance = diffusion.guidance if cfg.guidance is None else cfg.guidance
    if labels is None and (cfg.tstr or guidance != 1):
        flag = "--tstr" if cfg.tstr else f"--guidance {guidance:g}"
        raise UserError(f"{flag}: {path} is unconditional, and its images have no labels")
    steps = check_steps(cfg.steps, cfg.sampler, train_cfg.timesteps)
    spacing = cfg.spacing or SAMPLERS[cfg.sampler].spacing
    options = {"sampler": cfg.sampler, "steps": steps, "spacing": spacing, "seed": cfg.seed}
    options |= {"guidance": guidance, "guided": (cfg.guided_from, cfg.guided_to)}
    evaluated = count_evaluated(net)  # by this process
    images = draw_images(
        diffusion,
        net,
        cfg.num_samples,
        f"drawing with {path.name}",
        labels=labels,
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        **options,
    )
    facts = {
        "model": str(path),
        "model_hash": content_hash(path.read_bytes()),
        "model_type": train_cfg.model_type,
        **options,
        "arithmetic": arithmetic(device, cfg.precision),
        "network_calls": distributed.total(sum(evaluated)) / cfg.num_samples,
    }
    name = cfg.experiment_name or path.parent.name
    return Candidate(images, labels, name, train_cfg.dataset, facts)


def read_candidate(cfg: EvalConfig) -> Candidate:
    """Anybody's images, from a folder of PNGs, a .npz or a .npy."""
    path = Path(cfg.images)
    images = load_images(path, "--images")[: cfg.num_samples]
    if len(images) <= NEAREST_K:
        raise UserError(
            f"--images {path}: holds {len(images)} images, must be at least {NEAREST_K + 1}"
        )
    facts = {"images": cfg.images, "images_hash": content_hash(images.numpy().tobytes())}
    return Candidate(images, None, cfg.experiment_name or path.stem, cfg.dataset, facts)


class Scorer:
    """Feature networks and real data, loaded once, and everything that can be asked of a candidate.

    evaluate() returns the content of the JSON file: at least fid, fid_floor, n and features.
    """

    def __init__(self, cfg: EvalConfig, candidate: Candidate, device: torch.device):
        self.cfg, self.dataset, self.device = cfg, candidate.dataset, device
        self.network = load_features(cfg.features, cfg.dims, device)
        self.yardstick = Yardstick(cfg, self.dataset, candidate.images, self.network)
        # the classifier sorts samples and finds copies, whatever network scores them
        shared = self.network.name == MNISTFeatures.name
        self.classifier = self.network if shared else MNISTFeatures(device)

    def evaluate(self, candidate: Candidate) -> dict:
        images, cfg = candidate.images, self.cfg
        features = extract(self.network, images, "samples")
        seen = features
        if self.classifier is not self.network:
            seen = extract(self.classifier, images, "samples")
        scores = self.yardstick.score(features)
        scores |= {"experiment": candidate.name, **candidate.facts}
        scores["warnings"] = self.yardstick.warnings(len(images))
        if self.dataset in DIGIT_DATASETS:
            scores |= self.classes(candidate, features, seen)
        elif self.network is self.classifier:
            scores["warnings"].append(f"features mnist were learnt on digits, not {self.dataset}")
        if cfg.memorization:
            scores |= self.memorization(candidate, seen)
        if cfg.tstr:
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
            found["agreement"] = (digits == candidate.labels).double().mean().item()
            found["confusion"] = confusion_matrix(candidate.labels, digits).tolist()
        return found

    def real_probabilities(self, images: Tensor) -> Tensor:
        return self.classifier.probabilities(
            extract(self.classifier, images, "real images", cache=True)
        )

    def memorization(self, candidate: Candidate, seen: Tensor) -> dict:
        """Are samples copies of training images, in pixels or in features of the classifier?"""
        train, labels = load_dataset(self.dataset, self.cfg.data_dir, "train")
        test, _ = load_dataset(self.dataset, self.cfg.data_dir, "test")
        pixels = [x.flatten(1).float() / 255 for x in (candidate.images, test, train)]
        real = [extract(self.classifier, x, "real images", cache=True) for x in (test, train)]
        spaces = {"pixels": Nearness(*pixels), "features": Nearness(seen, *real)}
        figure = plot_nearness(spaces, candidate.images, train, labels)
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

        One classifier learns from the samples and the labels they were asked to be, the other from
        as many training images; both for the same number of steps, however few images there are.
        """
        images, labels = load_dataset(self.dataset, self.cfg.data_dir, "train")
        test = load_dataset(self.dataset, self.cfg.data_dir, "test")
        count = min(len(candidate.images), len(images))
        sets = {
            "tstr_accuracy": (candidate.images, candidate.labels),
            "tstr_accuracy_real": (stand_ins(images, count), stand_ins(labels, count)),
        }
        epochs = -(-TSTR_STEPS // max(1, count // 128))
        return {
            key: accuracy(train_classifier(*data, self.device, epochs=epochs), *test, self.device)
            for key, data in sets.items()
        }


def write_scores(path: Path, scores: dict | list) -> None:
    write_atomically(path, (json.dumps(scores, indent=2) + "\n").encode())
    print(f"\nwritten to       {path}")


def validate_one(cfg: EvalConfig, device: torch.device) -> None:
    """Score one candidate; table, JSON and figure."""
    if cfg.images:
        candidate = read_candidate(cfg)
    else:
        candidate = draw_candidate(cfg, find_models(cfg)[0], device)
    if not distributed.is_first():
        return
    scorer = Scorer(cfg, candidate, device)
    scores = scorer.evaluate(candidate)
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
        candidate = draw_candidate(cfg, path, device)
        if not distributed.is_first():
            continue
        scorer = scorer or Scorer(cfg, candidate, device)
        scores = {"epoch": epoch_number(path), **scorer.evaluate(candidate)}
        found.append(scores)
        print(f"{path}: fid {scores['fid']:.3f}, floor {scores['fid_floor']:.3f}")
        logger = logger or TensorBoardLogger(Path("runs") / cfg.experiment_name / "validation")
        values = {f"{name}_{scores['features']}": scores[name] for name in METRICS}
        logger.scalars(scores["epoch"], group="validation", **values)
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
        for flag in ("path_to_model", "validate_all", "tstr"):
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
