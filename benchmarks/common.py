"""What the benchmarks share: drawing, scoring, timing, and the tables they write."""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from config import SamplingConfig, UserError
from models import MODELS
from models.trained import TrainedModel, load_trained
from sampling.draw import count_evaluated, labels_for, sample_images
from scoring.features import FeatureNetwork, extract, load_features
from scoring.metrics import Reference, fid
from scoring.yardstick import score_text
from utils.data_loader import load_dataset
from utils.device import pick_device
from utils.files import write_atomically

FOLDER = Path("outputs") / "benchmark"
SEARCH_SEED = 1000  # of samples by which something is chosen; what is reported has other seeds


def feature_networks(features: str, dims: int, device: str) -> list[FeatureNetwork]:
    """The ones that --features (mnist, inception or both) and --dims name."""
    names = ("mnist", "inception") if features == "both" else (features,)
    return [load_features(name, dims, pick_device(device)) for name in names]


def check_inception(inception: int | None, num_samples: int) -> None:
    """Raises UserError where Inception is to score more images than there are."""
    if inception and inception > num_samples:
        raise UserError(f"--inception {inception}: must be at most --num_samples")


def reference_features(network: FeatureNetwork, data_dir: str, held_out: bool = False) -> Tensor:
    """What every score here is held against: the features of MNIST's test set.

    With `held_out`, those of the training images that are held out, to choose by.
    """
    test = load_dataset("mnist", data_dir, "test", held_out=held_out)
    return extract(network, test.images, "the reference", cache=True)


def judge(
    network: FeatureNetwork, data_dir: str, held_out: bool = False
) -> Callable[[Tensor], float]:
    """The FID of images against `reference_features`, in the features of `network`."""
    reference = Reference(reference_features(network, data_dir, held_out))
    return lambda images: fid(extract(network, images, "samples"), reference)


def whole_numbers(flag: str, value: str, at_least: int) -> list[int]:
    """The integers in '512,5000'. Raises UserError where one is none, or too small."""
    numbers = [int(part) if part.isdecimal() else -1 for part in value.split(",")]
    if min(numbers) < at_least:
        raise UserError(f"--{flag} {value}: must be integers >= {at_least}, like 8,16")
    return numbers


def write_table(name: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, on the terminal and as a file."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
    print(f"\n{text}")
    write_atomically(FOLDER / f"{name}.md", text.encode())


def spread_text(values: list[float]) -> str:
    """Mean and standard deviation of what the seeds gave."""
    if len(values) == 1:
        return f"{values[0]:#.3g}"
    return score_text(statistics.mean(values), statistics.stdev(values))


def draw(model: TrainedModel, count: int, sampling: SamplingConfig) -> Tensor:
    """(count, C, H, W) uint8 images, as generate.py draws them."""
    labels = labels_for(model, count, sampling.seed)
    return torch.cat(list(sample_images(model, count, sampling, labels=labels)))


def shipped_networks(device: torch.device) -> Iterator[tuple[str, TrainedModel]]:
    """Each network in checkpoints/pretrained/, by name."""
    for name in MODELS:
        path = Path("checkpoints/pretrained") / f"{name}.pth"
        if path.exists():
            yield name, load_trained(path, device)


def draw_timed(
    model: TrainedModel, count: int, sampling: SamplingConfig
) -> tuple[Tensor, float, float]:
    """Images 0..count-1 of a seed, images/s and network calls an image; warm-up not counted."""
    draw(model, min(count, 16), SamplingConfig(steps=2))
    evaluated = count_evaluated(model.net)
    start = time.perf_counter()
    images = draw(model, count, sampling)
    rate = count / (time.perf_counter() - start)
    return images, rate, sum(evaluated) / count


def seconds_each(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Mean time of a call, after two that do not count."""
    for count in (2, times):
        start = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / count
    return seconds
