"""Sampling: speed, and quality against network calls and against guidance."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from torch import Tensor

from benchmarks.common import (
    FOLDER,
    ROOMS,
    SEARCH_SEED,
    Figure,
    check_inception,
    draw,
    draw_timed,
    judge,
    load_digits,
    measurement_key,
    over_seeds,
    reference_features,
    shipped_networks,
    whole_numbers,
    with_spread,
    write_table,
)
from benchmarks.figures import plot_sampler_curves
from config import (
    DATA_DIR,
    DEVICES,
    FEW_STEP_SAMPLER,
    GUIDANCE,
    GUIDED,
    PRETRAINED,
    SAMPLER,
    SamplingConfig,
    UserError,
    setting,
)
from models.trained import TrainedModel
from sampling.draw import count_evaluated, guidance_at, labels_for, resolve, sampler_options
from sampling.samplers import SAMPLERS
from scoring.diagnosis import Nearness, flat_pixels
from scoring.features import extract, load_features
from scoring.metrics import Reference, all_scores
from scoring.yardstick import content_hash, stand_ins
from utils.checkpoint import newest
from utils.data_loader import Dataset, load_dataset
from utils.device import pick_device
from utils.files import write_atomically
from utils.visualization import save_figure

DISTILLED = PRETRAINED / "unet_fewstep.pth"


def alike(cfg: SamplingConfig, **options) -> SamplingConfig:
    """Other `options`, with the seed, batch size and precision of `cfg`."""
    return SamplingConfig(
        seed=cfg.seed, batch_size=cfg.batch_size, precision=cfg.precision, **options
    )


@dataclass(frozen=True)
class SpeedConfig(SamplingConfig):
    """How to draw, and how many images."""

    num_samples: int = setting(500, "images to time", low=1)
    rounds: int = setting(3, "how often to time each; DDPM once", low=1)
    device: str = setting("auto", "device to run on", choices=DEVICES)


def sample(cfg: SpeedConfig) -> None:
    """Images/s of the shipped networks: by default, with T steps of DDPM, and distilled."""
    device, ways = pick_device(cfg.device), {}
    ancestral = alike(cfg, sampler="ddpm", guidance=1.0)
    for name, model in shipped_networks(device):
        ways[name] = (name, model, cfg)
        ways[f"{name}, ddpm"] = (name, model, ancestral)
    if DISTILLED.exists() and "unet" in ways:
        model = load_digits(DISTILLED, device)
        for steps in (1, 2):
            sampling = alike(cfg, steps=steps)
            ways[f"unet_fewstep, {steps}"] = ("unet", model, sampling)
    rates, calls = {way: [] for way in ways}, {}
    for number in range(cfg.rounds):
        for way, (_, model, sampling) in ways.items():
            if number == 0 or sampling is not ancestral:
                _, rate, calls[way] = draw_timed(model, cfg.num_samples, sampling)
                rates[way].append(rate)
    rows = [
        [way, calls[way], over_seeds(rates[way]), mean(rates[way]) / mean(rates[name])]
        for way, (name, *_) in ways.items()
    ]
    header = ["drawn by", "calls", "images/s", "times the network's default"]
    write_table("sample", header, rows, device)


VARIETY = ("fid", "precision", "recall", "coverage")
FEW = 4  # calls; a distilled network gains nothing from more


@dataclass(frozen=True)
class SamplersConfig(SamplingConfig):
    """What to sample from, with how many network calls, and how many images to score.

    Of the sampling settings, `sampler` selects a single sampler, and `steps` follow from `calls`.
    """

    checkpoint: str = setting(str(PRETRAINED / "unet.pth"), "the model to sample from")
    distilled: str = setting(str(DISTILLED), "its distilled version, if that file exists")
    calls: str = setting("1,2,4,6,8,10,15,20,50,100,300", "network calls per image, at most")
    num_samples: int = setting(10_000, "images for each score", low=40)
    inception: int | None = setting(None, "also score N of them by Inception (768)", low=40)
    variety: bool = setting(
        False, "also recall, coverage and memorization of the default and of the distilled network"
    )
    held_out: bool = setting(False, "to choose settings: score against held-out training images")
    seed: int = setting(SEARCH_SEED, "seed of the samples", low=0, high=2**63 - 1)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def affordable(sampling: SamplingConfig, model: TrainedModel, calls: int) -> SamplingConfig | None:
    """`sampling` with the most steps that fit into `calls` network calls per image, or None."""
    schedule = model.diffusion.schedule
    for steps in range(min(calls, schedule.timesteps), 0, -1):
        tried = resolve(dataclasses.replace(sampling, steps=steps), model)
        if calls_of(tried, schedule.sampling_sigmas(steps, tried.spacing)) <= calls:
            return tried
    return None


def calls_of(sampling: SamplingConfig, sigmas: Tensor) -> int:
    """Network calls per image, counted by running the sampler without a network."""
    calls, x = [], sigmas.new_zeros(1, 1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1 if guidance_at(sigma, sampling, sigmas) in (0, 1) else 2)
        return x

    options = sampler_options(sampling)
    SAMPLERS[sampling.sampler].function(denoise, x, sigmas, lambda: x, **options)
    return sum(calls)


class Measured:
    """FIDs in several feature spaces, cached in a file so that none is measured twice.

    The file name must identify the code and the data, as `measurement_key` does.
    """

    def __init__(self, path: Path, spaces: list[tuple[str, int, Callable[[Tensor], float]]]):
        """spaces: name of the features, number of images, and a function for the FID of images."""
        self.path, self.spaces = path, spaces
        self.known = json.loads(path.read_text()) if path.exists() else {}

    def scores(self, what: str, images_of: Callable[[int], Tensor]) -> list[float]:
        """The FID in each space, over its number of images; images_of(n) draws n of them."""
        keys = [f"{what}, {n} {name}" for name, n, _ in self.spaces]
        pairs = zip(keys, self.spaces, strict=True)
        missing = [pair for pair in pairs if pair[0] not in self.known]
        if missing:
            images = images_of(max(n for _, (_, n, _) in missing))
            for key, (_, n, score) in missing:
                self.known[key] = score(images[:n])
            write_atomically(self.path, json.dumps(self.known, indent=1).encode())
        return [self.known[key] for key in keys]


def samplers(cfg: SamplersConfig) -> None:
    """FID against network calls per image: each sampler unguided, and the default one guided.

    Results that the same code has measured before are reused.
    """
    calls = whole_numbers("calls", cfg.calls, at_least=1)
    check_inception(cfg.inception, cfg.num_samples)
    device = pick_device(cfg.device)
    model = load_digits(cfg.checkpoint, device, held_out=cfg.held_out)
    networks = [(load_features("mnist", 0, device), cfg.num_samples)]
    if cfg.inception:
        networks.append((load_features("inception", 768, device), cfg.inception))
    data = [
        load_dataset("mnist", cfg.data_dir, split, held_out=cfg.held_out)
        for split in ("train", "test")
    ]
    versions = [network.version for network, _ in networks]
    key = measurement_key(device, (*ROOMS, "benchmarks/sampling.py"), data, versions)
    spaces = [
        (network.name, n, judge(network, cfg.data_dir, cfg.held_out)) for network, n in networks
    ]
    measured = Measured(FOLDER / f"kept_samplers_{key}.json", spaces)
    curves = sampler_curves(cfg, model, measured, calls, data[0].images)
    distilled = load_distilled(cfg)
    if distilled:
        add_distilled(cfg, distilled, curves, measured, calls)
    header = ["sampler", "n", *(f"{k} calls" for k in calls)]
    for (name, n, _), curve_of in zip(spaces, curves, strict=True):
        rows = [[what, n, *map(curve.get, calls)] for what, curve in curve_of.items()]
        write_table(f"samplers_{name}", header, rows, device)
    titles = [f"FID, {name}, n = {n:,}" for name, n, _ in spaces]
    figure = plot_sampler_curves(dict(zip(titles, curves, strict=True)))
    save_figure(FOLDER / "samplers.png", figure)
    if cfg.variety:
        rows = variety(cfg, model, distilled, *data)
        header = ["drawn by", "calls", *VARIETY, "closer, pixels", "closer, features"]
        write_table("samplers_variety", header, rows, device, keys=2)


def sampler_curves(
    cfg: SamplersConfig,
    model: TrainedModel,
    measured: Measured,
    calls: list[int],
    train: Tensor,
) -> list[dict[str, dict[int, float]]]:
    """For each space {row of the table: {network calls: FID}}; the first row is of real images."""
    real = "real training images"
    floors = measured.scores(real, partial(stand_ins, train))
    curves = [{real: dict.fromkeys(calls, floor)} for floor in floors]
    samplers = [name for name in SAMPLERS if model.few_step == (name == FEW_STEP_SAMPLER)]
    entries = [(name, 1.0) for name in samplers]
    if model.can_be_guided:
        entries.append((SAMPLER, GUIDANCE if cfg.guidance is None else cfg.guidance))
    for sampler, guidance in dict.fromkeys(entries):  # equal with --guidance 1
        if cfg.sampler not in (None, sampler):
            continue
        asked = dataclasses.replace(cfg, sampler=sampler, guidance=guidance, steps=None)
        row = f"{sampler}, {resolve(asked, model).spacing}"
        row += f", guidance {guidance:g}" * (guidance != 1)
        for most in calls:
            sampling = affordable(asked, model, most)
            if sampling is None:
                continue
            images_of = partial(draw, model, sampling=sampling)
            found = measured.scores(drawn_as(cfg.checkpoint, sampling), images_of)
            for curve, value in zip(curves, found, strict=True):
                curve.setdefault(row, {})[most] = value
    return curves


def drawn_as(checkpoint: str, sampling: SamplingConfig) -> str:
    """The network and all settings that decide its images, as the key of a measurement."""
    path, settings = newest(checkpoint), dataclasses.asdict(sampling).items()
    said = [f"{name} {value}" for name, value in settings if value is not None]
    return ", ".join([f"{path.stem} {content_hash(path.read_bytes())}", *said])


def load_distilled(cfg: SamplersConfig) -> TrainedModel | None:
    """The distilled network, if it is there and wanted.

    None with --held_out if the network was trained on those images.
    """
    path = Path(cfg.distilled)
    if not path.exists() or cfg.sampler not in (None, FEW_STEP_SAMPLER):
        return None
    model = load_digits(path, pick_device(cfg.device), "--distilled")
    return None if cfg.held_out and not model.config.held_out else model


def add_distilled(
    cfg: SamplersConfig,
    model: TrainedModel,
    curves: list[dict[str, dict]],
    measured: Measured,
    calls: list[int],
) -> None:
    """Add a row to the `curves`: the distilled network, at up to FEW calls."""
    for steps in (k for k in calls if k <= FEW):
        sampling = resolve(alike(cfg, steps=steps), model)
        images_of = partial(draw, model, sampling=sampling)
        found = measured.scores(drawn_as(cfg.distilled, sampling), images_of)
        for curve, value in zip(curves, found, strict=True):
            row = f"{FEW_STEP_SAMPLER}, {Path(cfg.distilled).stem}"
            curve.setdefault(row, {})[steps] = value


def variety(
    cfg: SamplersConfig,
    model: TrainedModel,
    distilled: TrainedModel | None,
    train: Dataset,
    test: Dataset,
) -> list[list[Figure]]:
    """Rows for the default sampler and the distilled network: what a narrow one would lack.

    Scores in `mnist` features, and in pixels and features the probability that a sample is closer
    to the training set than a test image is (`Nearness`).
    """
    asked = dataclasses.replace(cfg, sampler=None, steps=None)
    ways = [(model, resolve(asked, model))]
    for steps in (1, 2) if distilled else ():
        ways.append((distilled, resolve(alike(cfg, steps=steps), distilled)))
    network = load_features("mnist", 0, pick_device(cfg.device))
    known = [extract(network, x.images, "real images", cache=True) for x in (test, train)]
    reference, pixels = Reference(known[0]), [flat_pixels(x.images) for x in (test, train)]
    rows = []
    for drawing, sampling in ways:
        evaluated = count_evaluated(drawing.net)
        images = draw(drawing, cfg.num_samples, sampling)
        features = extract(network, images, "samples")
        scores = all_scores(features, reference)
        nearness = [Nearness(flat_pixels(images), *pixels), Nearness(features, *known)]
        cells = [with_spread(*scores[metric]) for metric in VARIETY]
        calls = sum(evaluated) / len(images)
        rows.append([sampling.sampler, calls, *cells, *(found.closer for found in nearness)])
    return rows


ABOVE_GUIDED = (GUIDED[1], 12.0)  # shows what guidance does at these levels


@dataclass(frozen=True)
class GuidanceConfig(SamplingConfig):
    """Which scales to try on which model; scales and noise levels override the sampling flags."""

    checkpoint: str = setting(str(PRETRAINED / "unet.pth"), "the model to sample from")
    scales: str = setting("0,1,1.5,2,3,4", "guidance scales")
    inception: int | None = setting(None, "also score N of them by Inception (768)", low=40)
    num_samples: int = setting(2000, "images for each scale", low=40)
    held_out: bool = setting(False, "to choose settings: score against held-out training images")
    seed: int = setting(SEARCH_SEED, "seed of the samples", low=0, high=2**63 - 1)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")


def guidance(cfg: GuidanceConfig) -> None:
    """What guidance gains and costs: agreement of the classifier with the label, and scores."""
    try:
        scales = [float(part) for part in cfg.scales.split(",")]
    except ValueError:
        raise UserError(f"--scales {cfg.scales}: must be numbers, like 1,1.5,2") from None
    check_inception(cfg.inception, cfg.num_samples)
    device = pick_device(cfg.device)
    model = load_digits(cfg.checkpoint, device, held_out=cfg.held_out)
    labels = labels_for(model, cfg.num_samples, cfg.seed)
    if labels is None:
        raise UserError(f"--checkpoint {cfg.checkpoint}: is unconditional; guidance needs labels")
    network = load_features("mnist", 0, device)
    reference = reference_features(network, cfg.data_dir, cfg.held_out)
    header = ["guidance", "at sigma", "calls", "agreement", "FID, mnist", "precision", "recall"]
    if cfg.inception:
        header.append(f"FID, inception-768, n = {cfg.inception:,}")
        score = judge(load_features("inception", 768, device), cfg.data_dir, cfg.held_out)
    evaluated = count_evaluated(model.net)
    rows = []
    for scale, (low, high) in itertools.product(scales, (GUIDED, ABOVE_GUIDED, (0.0, math.inf))):
        where = "all" if high == math.inf else f"{low:g} to {high:g}"
        if scale <= 1 and where != "all":  # such a scale applies at all levels
            continue
        evaluated.clear()
        asked = dataclasses.replace(cfg, guidance=scale, guided_from=low, guided_to=high)
        images = draw(model, cfg.num_samples, asked)
        calls = sum(evaluated) / cfg.num_samples
        features = extract(network, images, "samples")
        read = network.probabilities(features).argmax(dim=1)
        scores = all_scores(features, reference)
        cells = [scale, where, calls, (read == labels).double().mean().item()]
        cells += [with_spread(*scores[metric]) for metric in ("fid", "precision", "recall")]
        if cfg.inception:
            cells.append(score(images[: cfg.inception]))
        rows.append(cells)
    write_table("guidance", header, rows, device, keys=2)
