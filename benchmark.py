"""The measurements behind the README's tables: each prints a Markdown table and draws a figure.

    python benchmark.py floors    what real images score against the test set, by their number
    python benchmark.py faults    which metric notices which fault in real images

Tables and figures are also written to outputs/benchmark/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from config import DEVICES, INCEPTION_DIMS, UserError, parse, run, setting
from utils.data_loader import load_dataset
from utils.device import pick_device, seeded_generator
from utils.features import extract, load_features
from utils.files import load_images, write_atomically
from utils.scoring import METRICS, all_scores, score_text
from utils.visualization import plot_faults, save_figure

FOLDER = Path("outputs") / "benchmark"


@dataclass(frozen=True)
class SpacesConfig:
    """Which feature spaces to compare, on which images."""

    features: str = setting("both", "feature networks", choices=("mnist", "inception", "both"))
    dims: int = setting(768, "Inception layer", choices=INCEPTION_DIMS)
    num_samples: int = setting(10_000, "how many real images, at most", low=40, high=20_000)
    other_images: str | None = setting(None, "faults: score these images as well")
    seed: int = setting(0, "which real images, and the faults' randomness", low=0)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")
    device: str = setting("auto", "where to compute", choices=DEVICES)

    def networks(self) -> list:
        names = ("mnist", "inception") if self.features == "both" else (self.features,)
        return [load_features(name, self.dims, pick_device(self.device)) for name in names]


def write_table(name: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, on the terminal and as a file."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
    print(f"\n{text}")
    write_atomically(FOLDER / f"{name}.md", text.encode())


def floors(cfg: SpacesConfig) -> None:
    """What real training images score against the MNIST test set, for several numbers of them."""
    train, _ = load_dataset("mnist", cfg.data_dir, "train")
    test, _ = load_dataset("mnist", cfg.data_dir, "test")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed))
    sizes = [n for n in (512, 1000, 2000, 5000, 10_000, 20_000) if n <= cfg.num_samples]
    rows = []
    for network in cfg.networks():
        reference = extract(network, test, "the test set", cache=True)
        features = extract(network, train[chosen[: sizes[-1]]], "real images", cache=True)
        for n in sizes:
            scores = all_scores(features[:n], reference)
            cells = [score_text(*scores[name]) for name in METRICS]
            rows.append([network.name, f"{n:,}", *cells])
    write_table("floors", ["features", "n", *METRICS], rows)


def faulty_sets(images: Tensor, labels: Tensor, n: int, seed: int) -> dict[str, Tensor]:
    """Sets of n images made of real ones (N, 1, 28, 28) uint8, by the name of what is wrong."""
    noise = torch.randn((n, *images.shape[1:]), generator=seeded_generator(seed))
    return {
        "nothing": images[:n],
        "faint noise": (images[:n] + 4 * noise).round().clamp(0, 255).to(torch.uint8),
        "blurred": gaussian_blur(images[:n], 5, 0.7),
        "8 of 10 classes": images[labels < 8][:n],
        "each 4 times": images[: -(-n // 4)].repeat(4, 1, 1, 1)[:n],
    }


def faults(cfg: SpacesConfig) -> None:
    """What is done to real images, and what each metric in each feature space makes of it."""
    images, labels = load_dataset("mnist", cfg.data_dir, "train")
    test, _ = load_dataset("mnist", cfg.data_dir, "test")
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(cfg.seed))
    sets = faulty_sets(images[chosen], labels[chosen], cfg.num_samples, cfg.seed)
    if cfg.other_images:
        path = Path(cfg.other_images)
        others = load_images(path, "--other_images")[: cfg.num_samples]
        sets[f"{path.stem}, n = {len(others)}"] = others
    found = {}
    for network in cfg.networks():
        reference = extract(network, test, "the test set", cache=True)
        found[network.name] = {
            name: all_scores(extract(network, faulty, name, cache=True), reference)
            for name, faulty in sets.items()
        }
    rows = [
        [network, name, *(score_text(*scores[metric]) for metric in METRICS)]
        for network, by_set in found.items()
        for name, scores in by_set.items()
    ]
    write_table("faults", ["features", "what is wrong", *METRICS], rows)
    save_figure(FOLDER / "faults.png", plot_faults(found, sets))


BENCHMARKS = {"floors": (SpacesConfig, floors), "faults": (SpacesConfig, faults)}


def main() -> None:
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r}: must be one of {', '.join(BENCHMARKS)}")
    kind, measure = BENCHMARKS[name]
    measure(parse(kind, measure.__doc__, flags))


if __name__ == "__main__":
    run(main)
