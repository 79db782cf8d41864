"""The shipped networks compared with real images and with other programs."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import (
    draw_timed,
    feature_networks,
    read_digits,
    reference_features,
    shipped_networks,
    whole_numbers,
    with_spread,
    write_table,
)
from config import DATA_DIR, DEVICES, INCEPTION_DIMS, SamplingConfig, UserError, setting
from models import MODELS
from scoring.features import extract
from scoring.metrics import fid, fid_spread
from scoring.yardstick import stand_ins
from utils.data_loader import load_dataset
from utils.device import pick_device


@dataclass(frozen=True)
class CompareConfig(SamplingConfig):
    """What to compare the shipped networks with, and at how many images."""

    images: str | None = setting(None, "other programs' images, as in a.npz,b.npz")
    sizes: str = setting("512,5000", "numbers of images to score")
    features: str = setting("both", "feature networks", choices=("mnist", "inception", "both"))
    dims: int = setting(768, "Inception layer", choices=INCEPTION_DIMS)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def compare(cfg: CompareConfig) -> None:
    """FID of the shipped networks, real images and other programs' images, in both spaces."""
    sizes = whole_numbers("sizes", cfg.sizes, at_least=2)
    device, most = pick_device(cfg.device), max(sizes)
    paths = [Path(part) for part in (cfg.images or "").split(",") if part]
    others = {path.stem: read_digits(path, "--images", most, cfg.seed) for path in paths}
    real = "real training images"
    if len(others) < len(paths) or others.keys() & {real, *MODELS}:
        raise UserError(f"--images {cfg.images}: two sets of images would have the same name")
    train = load_dataset("mnist", cfg.data_dir, "train").images
    sets = {real: stand_ins(train, most)}
    facts = {}
    for name, model in shipped_networks(device):
        sets[name], rate, calls = draw_timed(model, most, cfg)
        size = sum(weight.numel() for weight in model.net.parameters()) / 1e6
        minutes, epochs = model.config.max_minutes, model.config.epochs
        budget = f"{minutes:g} min" if minutes else f"{epochs} epochs"
        facts[name] = [size, budget, calls, rate]
    sets |= others
    rows = {name: [name, *facts.get(name, [None] * 4)] for name in sets}
    columns = []
    for network in feature_networks(cfg.features, cfg.dims, cfg.device):
        reference = reference_features(network, cfg.data_dir)
        columns += [f"FID, {network.name}, n = {n:,}" for n in sizes]
        for name, images in sets.items():
            features = extract(network, images, name, cache=True)
            for n in sizes:
                part = features[:n]
                score = None
                if len(part) == n:
                    score = with_spread(fid(part, reference), fid_spread(part, reference))
                rows[name].append(score)
    header = ["images", "parameters, M", "trained", "calls", "images/s", *columns]
    write_table("compare", header, list(rows.values()), device)
