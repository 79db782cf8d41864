"""Score a checkpoint, or any set of images, by its Frechet distance to real ones.

Every score is printed beside its floor: what as many real training images get from the same
network against the same reference. A model is as good as real data when it reaches the floor.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from config import EvalConfig, UserError, parse, run
from generate import load_model, pick_labels
from models.diffusion import check_steps
from models.samplers import sample_images
from utils.checkpoint import list_checkpoints
from utils.data_loader import load_dataset
from utils.device import pick_device
from utils.features import FeatureNetwork, cached_features, extract, load_features
from utils.files import load_images, writable_folder, write_atomically
from utils.metrics import fid

FLOOR_SEED = 0  # which training images stand in for a perfect model


def find_model(cfg: EvalConfig) -> Path:
    """The checkpoint to score: --path_to_model, or the last one of --experiment_name."""
    if cfg.path_to_model:
        return Path(cfg.path_to_model)
    if not cfg.experiment_name:
        raise UserError("nothing to score: give --path_to_model, --experiment_name or --images")
    folder = Path("checkpoints") / cfg.experiment_name
    saved = list_checkpoints(folder)
    if not saved:
        raise UserError(f"--experiment_name {cfg.experiment_name}: no checkpoints in {folder}")
    return saved[-1]


class ModelSource:
    """Images that a checkpoint draws, as a stream."""

    def __init__(self, cfg: EvalConfig, device: torch.device):
        path = find_model(cfg)
        flag = "--path_to_model"
        self.train_cfg, self.diffusion, self.net = load_model(path, device, flag)
        if cfg.model_type and cfg.model_type != self.train_cfg.model_type:
            raise UserError(
                f"--model_type {cfg.model_type}: {path} holds a {self.train_cfg.model_type}"
            )
        self.labels = pick_labels(cfg.num_samples, None, self.train_cfg.class_conditional)
        steps = check_steps(cfg.steps, cfg.sampler, self.train_cfg.timesteps)
        self.dataset, self.count = self.train_cfg.dataset, cfg.num_samples
        self.name = cfg.experiment_name or path.parent.name
        self.facts = {"model": str(path), "model_type": self.train_cfg.model_type}
        self.facts |= {"sampler": cfg.sampler, "steps": steps, "seed": cfg.seed}
        self.options = {"sampler": cfg.sampler, "steps": steps, "seed": cfg.seed}
        self.options |= {"guidance": cfg.guidance, "batch_size": cfg.batch_size}

    def features(self, network: FeatureNetwork) -> Tensor:
        batches = sample_images(
            self.diffusion, self.net, self.count, labels=self.labels, **self.options
        )
        return extract(network, batches, self.count, "samples")


class FileSource:
    """Images from a folder of PNGs or an .npz."""

    def __init__(self, cfg: EvalConfig):
        self.images = load_images(Path(cfg.images), "--images")[: cfg.num_samples]
        self.dataset, self.count = cfg.dataset, len(self.images)
        self.name = cfg.experiment_name or Path(cfg.images).stem
        self.facts = {"images": cfg.images}

    def features(self, network: FeatureNetwork) -> Tensor:
        return cached_features(network, self.images, Path(self.facts["images"]).name)


def real_features(
    cfg: EvalConfig, dataset: str, count: int, network: FeatureNetwork
) -> tuple[Tensor, Tensor]:
    """Features of the reference images, and of `count` other real ones for the floor.

    The reference is the test set and the others are training images; of --reference_images, which
    has no training set, one random half is held against the other.
    """
    generator = torch.Generator().manual_seed(FLOOR_SEED)
    if cfg.reference_images:
        images = load_images(Path(cfg.reference_images), "--reference_images")
        reference = cached_features(network, images, "reference images")
        order = torch.randperm(len(images), generator=generator)
        return reference, reference[order]
    test, _ = load_dataset(dataset, cfg.data_dir, "test")
    train, _ = load_dataset(dataset, cfg.data_dir, "train")
    chosen = torch.randperm(len(train), generator=generator)[:count]
    reference = cached_features(network, test, "test set")
    return reference, cached_features(network, train[chosen], "training images")


def evaluate(cfg: EvalConfig) -> dict:
    """Score what `cfg` names. Returns the content of the JSON file, at least fid and fid_floor."""
    device = pick_device(cfg.device)
    if cfg.images and cfg.path_to_model:
        raise UserError("--images and --path_to_model: give one of them")
    source = FileSource(cfg) if cfg.images else ModelSource(cfg, device)
    if source.count < 2:
        raise UserError(f"--images {cfg.images}: has {source.count} images, must be at least 2")
    network = load_features(cfg.features, cfg.dims, device)
    reference, others = real_features(cfg, source.dataset, source.count, network)
    if cfg.reference_images:
        half = len(others) // 2
        floor, floor_n = fid(others[:half], others[half:]), half
    else:
        floor, floor_n = fid(others, reference), len(others)
    score = fid(source.features(network), reference)
    return {
        "fid": score,
        "fid_floor": floor,
        "n": source.count,
        "n_floor": floor_n,
        "n_reference": len(reference),
        "reference": cfg.reference_images or f"{source.dataset} test set",
        "features": network.name,
        "feature_version": network.version,
        "experiment": source.name,
        **source.facts,
    }


def main() -> None:
    cfg = parse(EvalConfig, "Score a model, or any images, against real ones.")
    if cfg.json:
        writable_folder(Path(cfg.json).parent)
    scores = evaluate(cfg)
    name = f"scores_{scores['features']}_{scores['n']}.json"
    path = Path(cfg.json) if cfg.json else Path("outputs") / scores["experiment"] / name
    write_atomically(path, (json.dumps(scores, indent=2) + "\n").encode())
    for key, value in scores.items():
        print(f"{key:16} {value:.4f}" if isinstance(value, float) else f"{key:16} {value}")
    print(f"written to       {path}")


if __name__ == "__main__":
    run(main)
