"""What the benchmarks share: drawing, scoring, timing, and the tables they write."""

import json
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import PRETRAINED, SamplingConfig, UserError
from models import MODELS
from models.trained import TrainedModel, load_trained
from sampling.draw import count_evaluated, labels_for, sample_images
from scoring.classifier import DigitClassifier, reads
from scoring.features import FeatureNetwork, extract, load_features
from scoring.metrics import NEAREST_K, Reference, fid
from scoring.yardstick import content_hash, image_hash, score_text
from utils.data_loader import Dataset, load_dataset
from utils.device import pick_device
from utils.files import write_atomically
from utils.image_checks import check_shape
from utils.images import load_images
from utils.provenance import hardware, provenance, source_hash
from utils.random import random_order

FOLDER = Path("outputs") / "benchmark"
SEARCH_SEED = 1000  # of samples used to choose something; reported results use other seeds

# the code that decides what samples score; a benchmark that caches results adds its own file
ROOMS = ("config.py", "models", "sampling", "scoring", "utils", "benchmarks/common.py")

Figure = float | str | dict[str, float] | None  # a dict holds a `value` and its `spread`


def feature_networks(features: str, dims: int, device: str) -> list[FeatureNetwork]:
    """The feature networks that --features (mnist, inception or both) and --dims select."""
    names = ("mnist", "inception") if features == "both" else (features,)
    return [load_features(name, dims, pick_device(device)) for name in names]


def check_inception(inception: int | None, num_samples: int) -> None:
    """Raises UserError if Inception would have to score more images than there are."""
    if inception and inception > num_samples:
        raise UserError(f"--inception {inception}: must be at most --num_samples")


def reference_features(network: FeatureNetwork, data_dir: str, held_out: bool = False) -> Tensor:
    """The reference of every score here: the features of MNIST's test set.

    With `held_out`, those of the held-out training images, for choosing settings.
    """
    test = load_dataset("mnist", data_dir, "test", held_out=held_out)
    return extract(network, test.images, "the reference", cache=True)


def judge(
    network: FeatureNetwork, data_dir: str, held_out: bool = False
) -> Callable[[Tensor], float]:
    """A function that gives the FID of images against `reference_features` of `network`."""
    reference = Reference(reference_features(network, data_dir, held_out))
    return lambda images: fid(extract(network, images, "samples"), reference)


def whole_numbers(flag: str, value: str, at_least: int) -> list[int]:
    """The integers in '512,5000'. Raises UserError if one is not an integer or is too small."""
    numbers = [int(part) if part.isdecimal() else -1 for part in value.split(",")]
    if min(numbers) < at_least:
        raise UserError(f"--{flag} {value}: must be integers >= {at_least}, like 8,16")
    return numbers


def measurement_key(
    device: torch.device, rooms: tuple[str, ...], data: list[Dataset], *deciding: Any
) -> str:
    """A hash of everything that decides a measurement, for the name of its cache file.

    It covers the source in `rooms` (see `source_hash`), torch, the hardware, the data, and whatever
    else is `deciding`, as JSON.
    """
    sets = [(image_hash(each.images), content_hash(each.labels.numpy().tobytes())) for each in data]
    parts = [source_hash(rooms), torch.__version__, hardware(device), sets, deciding]
    return content_hash(json.dumps(parts, sort_keys=True).encode())


def split_flags(flag: str, text: str) -> list[str]:
    """The flags in the value of `flag`, split like a shell. Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{flag} {text}: cannot be split into flags: {error}") from None


def load_digits(
    path: str, device: torch.device, flag: str = "--checkpoint", held_out: bool = False
) -> TrainedModel:
    """The model in a checkpoint. Raises UserError also unless it draws digits like MNIST's."""
    model = load_trained(path, device, flag, held_out)
    if not reads(model.data):
        raise UserError(
            f"{flag} {path}: was trained on {model.data.name}; must be trained on digits like"
            " MNIST's, because the benchmarks compare with those"
        )
    return model


def read_digits(path: Path, flag: str, most: int, seed: int) -> Tensor:
    """`most` images of another program, or all if there are fewer, uint8 (N, 1, 28, 28).

    They are drawn at random, because files are often sorted by class. Raises UserError.
    """
    found = load_images(path, flag, at_least=NEAREST_K + 1)
    check_shape(found, DigitClassifier.shape, f"{flag} {path}", like="MNIST")
    return found[random_order(len(found), seed)[:most]]


def with_spread(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "spread": spread}


def figure_text(figure: Figure, form: str = "") -> str:
    """A figure as text. `form` is a Python format, such as ".3f", for the value and its spread.

    Without one, a spread gets two digits and a number four. None is "".
    """
    if figure is None or isinstance(figure, str):
        return figure or ""
    if isinstance(figure, dict):
        value, spread = figure["value"], figure["spread"]
        text = f"{value:{form}} ± {spread:{form}}" if form else score_text(value, spread)
    else:
        whole = isinstance(figure, int) or abs(figure) >= 1000
        text = format(figure, form or (",.0f" if whole else ".4g"))
    return text.replace("%", " %")


def write_table(
    name: str, header: list[str], rows: list[list[Figure]], device: torch.device, keys: int = 1
) -> None:
    """Print a table of figures; write it as Markdown, and as a JSON file that `report` can publish.

    The first `keys` cells of a row name it: the file stores the row under them, as a dict
    {column: figure}.
    """
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[figure_text(cell) or "-" for cell in row] for row in rows]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
    print(f"\n{text}")
    write_atomically(FOLDER / f"{name}.md", text.encode())
    values = {}
    for row in rows:
        place = values
        for cell in row[:keys]:
            place = place.setdefault(cell if isinstance(cell, str) else f"{cell:g}", {})
        place.update(zip(header, row, strict=True))
    result = json.dumps(provenance(device) | {"values": values}, indent=1, ensure_ascii=False)
    write_atomically(FOLDER / f"{name}.json", f"{result}\n".encode())


def over_seeds(values: list[float]) -> Figure:
    """Mean and standard deviation over seeds or rounds; with only one, its value."""
    if len(values) == 1:
        return values[0]
    return with_spread(statistics.mean(values), statistics.stdev(values))


def draw(model: TrainedModel, count: int, sampling: SamplingConfig) -> Tensor:
    """(count, C, H, W) uint8 images, as generate.py draws them."""
    labels = labels_for(model, count, sampling.seed)
    return torch.cat(list(sample_images(model, count, sampling, labels=labels)))


def shipped_networks(device: torch.device) -> Iterator[tuple[str, TrainedModel]]:
    """Each network in checkpoints/pretrained/, by name."""
    for name in MODELS:
        path = PRETRAINED / f"{name}.pth"
        if path.exists():
            yield name, load_trained(path, device)


def draw_timed(
    model: TrainedModel, count: int, sampling: SamplingConfig
) -> tuple[Tensor, float, float]:
    """Images 0..count-1 of a seed, images/s and network calls per image; warm-up is not timed."""
    draw(model, min(count, 16), SamplingConfig(steps=2))
    evaluated = count_evaluated(model.net)
    start = time.perf_counter()
    images = draw(model, count, sampling)
    rate = count / (time.perf_counter() - start)
    return images, rate, sum(evaluated) / count


def seconds_each(work: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """Mean time of a call, after two warm-up calls."""
    for count in (2, times):
        start = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / count
    return seconds
