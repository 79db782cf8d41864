"""Measures the metrics: scores of real images, which metric notices which fault, and speed."""

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from benchmarks.common import (
    FOLDER,
    feature_networks,
    read_digits,
    reference_features,
    with_spread,
    write_table,
)
from benchmarks.figures import plot_faults
from config import DATA_DIR, DEVICES, INCEPTION_DIMS, setting
from scoring.estimate import Estimate
from scoring.features import extract, load_features
from scoring.metrics import METRICS, Reference, all_scores, fid
from scoring.yardstick import default_draws
from utils.data_loader import load_dataset
from utils.device import pick_device
from utils.images import load_images
from utils.random import Stream, generator
from utils.visualization import save_figure, save_png


@dataclass(frozen=True)
class SpacesConfig:
    """Which feature spaces to compare, on which images."""

    features: str = setting("both", "feature networks", choices=("mnist", "inception", "both"))
    dims: int = setting(768, "Inception layer", choices=INCEPTION_DIMS)
    num_samples: int = setting(10_000, "number of real images, at most", low=40, high=20_000)
    other_images: str | None = setting(None, "faults: also score these images")
    seed: int = setting(
        0, "seed for the choice of real images and for the faults", low=0, high=2**63 - 1
    )
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")
    device: str = setting("auto", "device to run on", choices=DEVICES)


@dataclass(frozen=True)
class FloorsConfig(SpacesConfig):
    """The same, and the number of draws."""

    floor_draws: int | None = setting(
        None, "disjoint draws, at most; default 10 (inception: 10,000 images in all)", low=1
    )


def floors(cfg: FloorsConfig) -> None:
    """What real training images score against the MNIST test set, for several sample sizes.

    The mean over disjoint draws and the standard deviation of a draw, as in `scoring.yardstick`.
    """
    train = load_dataset("mnist", cfg.data_dir, "train").images
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed))
    sizes = [n for n in (512, 1000, 2000, 5000, 10_000, 20_000) if n <= cfg.num_samples]
    rows = []
    for network in feature_networks(cfg.features, cfg.dims, cfg.device):
        reference = Reference(reference_features(network, cfg.data_dir))
        for n in sizes:
            draws = min(cfg.floor_draws or default_draws(network, n), len(train) // n)
            images = train[chosen[: draws * n]]
            parts = extract(network, images, "real images", cache=True).split(n)
            found = [all_scores(part, reference) for part in parts]
            means = [Estimate.of([scores[name] for scores in found]) for name in METRICS]
            cells = [with_spread(mean.value, mean.spread) for mean in means]
            rows.append([network.name, n, draws, *cells])
    header = ["features", "n", "draws", *METRICS]
    write_table("floors", header, rows, pick_device(cfg.device), keys=2)


def faulty_sets(images: Tensor, labels: Tensor, n: int, seed: int) -> dict[str, Tensor]:
    """Sets of n images made from real ones (N, 1, 28, 28) uint8, by the name of their fault."""
    noise = torch.randn((n, *images.shape[1:]), generator=generator(Stream.NOISE, seed))
    return {
        "nothing": images[:n],
        "faint noise": (images[:n] + 4 * noise).round().clamp(0, 255).to(torch.uint8),
        "blurred": gaussian_blur(images[:n], 5, 0.7),
        "8 of 10 classes": images[labels < 8][:n],
        "each 4 times": images[: -(-n // 4)].repeat(4, 1, 1, 1)[:n],
    }


def faults(cfg: SpacesConfig) -> None:
    """Scores of real images with faults, by each metric in each feature space."""
    others = {}
    if cfg.other_images:
        path = Path(cfg.other_images)
        images = read_digits(path, "--other_images", cfg.num_samples, cfg.seed)
        others = {f"{path.stem}, n = {len(images)}": images}
    train = load_dataset("mnist", cfg.data_dir, "train")
    chosen = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(cfg.seed))
    sets = faulty_sets(train.images[chosen], train.labels[chosen], cfg.num_samples, cfg.seed)
    sets |= others
    found = {}
    for network in feature_networks(cfg.features, cfg.dims, cfg.device):
        reference = reference_features(network, cfg.data_dir)
        found[network.name] = {
            name: all_scores(extract(network, faulty, name, cache=True), reference)
            for name, faulty in sets.items()
        }
    rows = [
        [network, name, *(with_spread(*scores[metric]) for metric in METRICS)]
        for network, by_set in found.items()
        for name, scores in by_set.items()
    ]
    header = ["features", "what is wrong", *METRICS]
    write_table("faults", header, rows, pick_device(cfg.device), keys=2)
    save_figure(FOLDER / "faults.png", plot_faults(found, sets))


@dataclass(frozen=True)
class FeaturesConfig:
    """How many images to time the feature networks on."""

    num_samples: int = setting(2000, "PNGs in each of the two folders", low=40, high=10_000)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def pytorch_fid(*arguments: object) -> tuple[str, float]:
    """The last line that the pytorch-fid command prints, and the seconds it took."""
    command = [sys.executable, "-m", "pytorch_fid", *map(str, arguments)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1], time.perf_counter() - start


def features(cfg: FeaturesConfig) -> None:
    """Time to score two folders of PNGs, here and with the pytorch-fid command.

    One folder has test images, the other the same images blurred. Both programs start from the
    files. The time to start Python and import torch is excluded for both.
    """
    device = pick_device(cfg.device)
    test = load_dataset("mnist", cfg.data_dir, "test").images
    start = time.perf_counter()
    extract(load_features("mnist", 0, device), test, "the test set")
    seconds = time.perf_counter() - start
    print(f"\nmnist features of {len(test):,} images: {seconds:.1f} s")

    rows = []
    load_features("inception", 64, device)  # tells what is missing
    _, idle = pytorch_fid("--help")
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("sharp", "blurred")]
        sharp = test[: cfg.num_samples]
        for path, images in zip(folders, (sharp, gaussian_blur(sharp, 5, 0.7)), strict=True):
            path.mkdir()
            for k, image in enumerate(images):
                save_png(path / f"{k:05d}.png", image, scale=1)
        for dims in (64, 192, 768):
            start = time.perf_counter()
            network = load_features("inception", dims, device)
            sets = [load_images(path, "folder") for path in folders]
            own = fid(*(extract(network, images, "PNGs") for images in sets))
            own_seconds = time.perf_counter() - start
            said, seconds = pytorch_fid(*folders, "--dims", dims, "--device", device)
            other, count = float(said.split()[-1]), 2 * len(sharp)
            rows.append(
                [dims, own, other, abs(own / other - 1)]
                + [count / t for t in (own_seconds, seconds - idle)]
                + [(seconds - idle) / own_seconds]
            )
    header = ["`--dims`", "FID", "by pytorch-fid", "relative difference"]
    header += ["images/s", "of pytorch-fid", "ratio"]
    write_table("features", header, rows, device)
