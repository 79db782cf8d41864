"""The measurements behind the README's tables: each prints a Markdown table and draws a figure.

    python benchmark.py floors    what real images score against the test set, by their number
    python benchmark.py faults    which metric notices which fault in real images
    python benchmark.py features  images/s of the feature networks, and FID by another program
    python benchmark.py train     FID against minutes of training (--profile: where a step goes)
    python benchmark.py speedrun  minutes of training until a given FID
    python benchmark.py sample    images/s of the shipped networks, and of ancestral sampling
    python benchmark.py compare   the shipped networks beside real images and other programs'
    python benchmark.py samplers  FID against network calls, for each sampler
    python benchmark.py guidance  FID and agreement with the label against the guidance scale

Tables and figures are also written to outputs/benchmark/. Training and sampling are main.py's and
generate.py's own; scoring is not on the clock.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import write_png
from torchvision.transforms.functional import gaussian_blur

from config import (
    DEVICES,
    GUIDED,
    INCEPTION_DIMS,
    MODEL_TYPES,
    SAMPLER,
    SPACINGS,
    TrainConfig,
    UserError,
    parse,
    run,
    setting,
)
from config import SAMPLERS as SAMPLER_NAMES
from generate import count_evaluated, load_model
from main import Trainer, train
from models.diffusion import Diffusion
from models.drawing import pick_labels
from models.samplers import SAMPLERS, sample_images
from utils.data_loader import load_dataset, to_model_range
from utils.device import DTYPES, arithmetic, environment, pick_device, seeded_generator
from utils.features import FeatureNetwork, extract, load_features
from utils.files import load_images, write_atomically
from utils.metrics import fid, fid_spread
from utils.noise_scheduler import NoiseSchedule
from utils.scoring import METRICS, all_scores, content_hash, score_text, stand_ins
from utils.visualization import plot_faults, plot_learning_curves, plot_sampler_curves, save_figure

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


def feature_networks(cfg: "SpacesConfig | CompareConfig") -> list[FeatureNetwork]:
    """The ones that --features and --dims name."""
    names = ("mnist", "inception") if cfg.features == "both" else (cfg.features,)
    return [load_features(name, cfg.dims, pick_device(cfg.device)) for name in names]


def check_inception(cfg: "QualityConfig | SamplersConfig | GuidanceConfig") -> None:
    """Raises UserError where Inception is to score more images than there are."""
    if cfg.inception and cfg.inception > cfg.num_samples:
        raise UserError(f"--inception {cfg.inception}: must be at most --num_samples")


def reference_features(network: FeatureNetwork, data_dir: str) -> Tensor:
    """What every score here is held against: the features of MNIST's test set."""
    test, _ = load_dataset("mnist", data_dir, "test")
    return extract(network, test, "the test set", cache=True)


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


def floors(cfg: SpacesConfig) -> None:
    """What real training images score against the MNIST test set, for several numbers of them."""
    train, _ = load_dataset("mnist", cfg.data_dir, "train")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed))
    sizes = [n for n in (512, 1000, 2000, 5000, 10_000, 20_000) if n <= cfg.num_samples]
    rows = []
    for network in feature_networks(cfg):
        reference = reference_features(network, cfg.data_dir)
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
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(cfg.seed))
    sets = faulty_sets(images[chosen], labels[chosen], cfg.num_samples, cfg.seed)
    if cfg.other_images:
        path = Path(cfg.other_images)
        others = load_images(path, "--other_images")[: cfg.num_samples]
        sets[f"{path.stem}, n = {len(others)}"] = others
    found = {}
    for network in feature_networks(cfg):
        reference = reference_features(network, cfg.data_dir)
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


@dataclass(frozen=True)
class FeaturesConfig:
    """How many images to time the feature networks on."""

    num_samples: int = setting(2000, "PNGs in each of the two folders", low=40, high=10_000)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")


def pytorch_fid(*arguments: object) -> tuple[str, float]:
    """What that program's command line prints last, and the seconds it took."""
    command = [sys.executable, "-m", "pytorch_fid", *map(str, arguments)]
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1], time.perf_counter() - start


def features(cfg: FeaturesConfig) -> None:
    """Time to score two folders of PNGs, here and by the pytorch-fid command line.

    One folder holds test images, the other the same blurred. Both programs start from the files.
    Starting Python and importing torch is left out on both sides.
    """
    device = pick_device(cfg.device)
    test, _ = load_dataset("mnist", cfg.data_dir, "test")
    start = time.perf_counter()
    extract(load_features("mnist", 0, device), test, "the test set")
    seconds = time.perf_counter() - start
    print(f"\nmnist features of {len(test):,} images: {seconds:.1f} s")

    rows = []
    _, idle = pytorch_fid("--help")
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("sharp", "blurred")]
        sharp = test[: cfg.num_samples]
        for path, images in zip(folders, (sharp, gaussian_blur(sharp, 5, 0.7)), strict=True):
            path.mkdir()
            for k, image in enumerate(images):
                write_png(image, str(path / f"{k:05d}.png"))
        for dims in (64, 192, 768):
            start = time.perf_counter()
            network = load_features("inception", dims, device)
            sets = [load_images(path, "folder") for path in folders]
            own = fid(*(extract(network, images, "PNGs") for images in sets))
            own_seconds = time.perf_counter() - start
            said, seconds = pytorch_fid(*folders, "--dims", dims, "--device", device)
            other, count = float(said.split()[-1]), 2 * len(sharp)
            rows.append(
                [f"{dims}", f"{own:.6f}", f"{other:.6f}", f"{abs(own / other - 1):.1e}"]
                + [f"{count / t:.1f}" for t in (own_seconds, seconds - idle)]
                + [f"{(seconds - idle) / own_seconds:.2f}"]
            )
    header = ["`--dims`", "FID", "by pytorch-fid", "relative difference"]
    write_table("features", [*header, "images/s", "of pytorch-fid", "ratio"], rows)


@dataclass(frozen=True)
class QualityConfig:
    """What to train, for how long, and how closely to look."""

    model_type: str = setting("unet", "noise predictor", choices=MODEL_TYPES)
    max_minutes: float = setting(10.0, "time budget of a run", above=0)
    settings: str = setting("", "more flags of main.py, as in '--batch_size 64 --t_std 1.3'")
    fid: float = setting(3.0, "speedrun: stop the clock at this FID, `mnist` features", above=0)
    every: float = setting(1.0, "minutes of training between two scores", above=0)
    seeds: int = setting(3, "number of runs", low=1)
    num_samples: int = setting(5000, "images for each score", low=40)
    inception: int | None = setting(
        None, "train: score N images of the end by Inception as well (768)", low=40
    )
    profile: bool = setting(False, "train: only show what a training step spends its time on")
    device: str = setting("auto", "where to compute", choices=DEVICES)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")

    def training(self, seed: int) -> TrainConfig:
        """The settings of one run: main.py's defaults but for `settings`, within the budget.

        Raises UserError on bad ones, and on those that the benchmark chooses itself.
        """
        own = {
            "model_type": self.model_type,
            "max_minutes": self.max_minutes,
            "epochs": 100_000,
            "sample_every": 0,
            "seed": seed,
            "device": self.device,
            "data_dir": self.data_dir,
        }
        flags = shlex.split(self.settings)
        for flag in flags:
            if flag.removeprefix("--").split("=")[0] in own:
                raise UserError(f"--settings {flag}: is the benchmark's own to choose")
        return dataclasses.replace(parse(TrainConfig, "", flags), **own)


def draw(diffusion: Diffusion, net: nn.Module, count: int, seed: int, **options) -> Tensor:
    """(count, 1, 28, 28) uint8 images, as generate.py draws them; by default, by its defaults."""
    labels = pick_labels(net, count, seed)
    batches = sample_images(diffusion, net, count, seed=seed, labels=labels, **options)
    return torch.cat(list(batches))


def judge(network: FeatureNetwork, data_dir: str) -> Callable[[Tensor], float]:
    """The FID of images against MNIST's test set, in the features of `network`."""
    reference = reference_features(network, data_dir)
    return lambda images: fid(extract(network, images, "samples"), reference)


class Reached(Exception):
    """The speedrun's FID is reached."""


def learning_curve(cfg: QualityConfig, seed: int, goal: float) -> list[dict]:
    """`minutes` of training, `step` and `fid` on the way of one run, which ends early at `goal`.

    Kept in a file as it grows, so that the same command goes on after an interruption. Other
    settings make another run.
    """
    training, device = cfg.training(seed), pick_device(cfg.device)
    measured = (dataclasses.asdict(training), cfg.num_samples, cfg.every, cfg.inception)
    settings = content_hash(json.dumps(measured).encode())
    name = f"benchmark_{cfg.model_type}_{cfg.max_minutes:g}min_{settings}"
    path = FOLDER / f"{name}.json"
    curve = json.loads(path.read_text()) if path.exists() else []
    reached = any(point["fid"] <= goal for point in curve)
    if reached or (curve and curve[-1]["minutes"] >= cfg.max_minutes):
        print(f"seed {seed}: as measured before, {path}")
        return curve
    score = judge(load_features("mnist", 0, device), cfg.data_dir)
    if cfg.inception:
        score_end = judge(load_features("inception", 768, device), cfg.data_dir)

    def watch(trainer: Trainer) -> None:
        while curve and curve[-1]["minutes"] > trainer.minutes:  # scored before an interruption
            curve.pop()
        due = (curve[-1]["minutes"] if curve else 0.0) + cfg.every
        if trainer.minutes < due and trainer.progress < 1:
            return
        # a seed of its own: what is chosen by these scores is reported by others
        images = draw(trainer.diffusion, trainer.ema.model, cfg.num_samples, seed=1000)
        curve.append({"minutes": trainer.minutes, "step": trainer.step, "fid": score(images)})
        if cfg.inception and trainer.progress >= 1:
            curve[-1]["inception"] = score_end(images[: cfg.inception])
        write_atomically(path, json.dumps(curve).encode())
        if curve[-1]["fid"] <= goal:
            raise Reached

    with contextlib.suppress(Reached):
        train(dataclasses.replace(training, experiment_name=name), watch)
    return curve


def spread_text(values: list[float]) -> str:
    """Mean and standard deviation of what the seeds gave."""
    if len(values) == 1:
        return f"{values[0]:#.3g}"
    return score_text(statistics.mean(values), statistics.stdev(values))


def train_benchmark(cfg: QualityConfig) -> None:
    """FID against minutes of training, from a cold start, for several seeds."""
    if cfg.profile:
        profile(cfg)
        return
    check_inception(cfg)
    curves = [learning_curve(cfg, seed, goal=0.0) for seed in range(cfg.seeds)]
    save_figure(FOLDER / f"train_{cfg.model_type}.png", plot_learning_curves(curves))
    rows = [
        [f"{seed}", f"{point['minutes']:.1f}", f"{point['step']}", f"{point['fid']:.3f}"]
        for seed, curve in enumerate(curves)
        for point in curve
    ]
    write_table(f"train_{cfg.model_type}", ["seed", "minutes", "step", "FID"], rows)
    scores = spread_text([curve[-1]["fid"] for curve in curves])
    claim = f"FID {scores} (mnist features, n = {cfg.num_samples:,})"
    if cfg.inception:
        scores = spread_text([curve[-1]["inception"] for curve in curves])
        claim += f", {scores} (inception 768, n = {cfg.inception:,})"
    print(f"# {cfg.model_type}, {cfg.max_minutes:g} minutes, {cfg.seeds} seeds: {claim}")


def speedrun(cfg: QualityConfig) -> None:
    """Minutes of training, from a cold start, until samples have a given FID, for several seeds."""
    curves = [learning_curve(cfg, seed, goal=cfg.fid) for seed in range(cfg.seeds)]
    reached = [
        next((point["minutes"] for point in curve if point["fid"] <= cfg.fid), None)
        for curve in curves
    ]
    rows = [[f"{k}", "-" if m is None else f"{m:.2f}"] for k, m in enumerate(reached)]
    write_table(f"speedrun_{cfg.model_type}", ["seed", "minutes"], rows)
    if None in reached:
        claim = f"{reached.count(None)} of {cfg.seeds} seeds missed it in {cfg.max_minutes:g} min"
    else:
        claim = f"{spread_text(reached)} minutes, {cfg.seeds} seeds"
    measure = f"mnist features, n = {cfg.num_samples:,}"
    print(f"# {cfg.model_type} to FID {cfg.fid:g} ({measure}): {claim}")


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


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best matrix product this machine does, in `dtype`."""
    rates = []
    for n in (512, 1024, 2048, 4096):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rates.append(2 * n**3 / seconds_each(lambda a=a, b=b: a @ b, device))
    return max(rates)


def profile(cfg: QualityConfig) -> None:
    """What one training step spends its time on, and its share of the machine's GEMM rate."""
    training = cfg.training(0)
    device = pick_device(cfg.device, training.precision)
    labels = torch.zeros(60_000, dtype=torch.long, device=device)
    trainer = Trainer(training, labels, device, FOLDER)
    x0 = to_model_range(torch.randint(256, (training.batch_size, 1, 28, 28), dtype=torch.uint8))
    step = partial(trainer.train_step, x0.to(device), labels[: training.batch_size])
    seconds = seconds_each(step, device, times=30)
    with FlopCounterMode(display=False) as counter:
        step()
    precision = arithmetic(device, training.precision)
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))
    rate, best = counter.get_total_flops() / seconds, gemm_rate(device, DTYPES[precision])
    print(
        f"{cfg.model_type}, batch {training.batch_size}: {seconds * 1e3:.0f} ms a step,"
        f" {training.batch_size / seconds:.0f} images/s, {rate / 1e9:.0f} GFLOP/s:"
        f" {rate / best:.0%} of the best {precision} matrix product's {best / 1e9:.0f}"
    )


@dataclass(frozen=True)
class SpeedConfig:
    """What to draw with, and how many."""

    num_samples: int = setting(250, "images to time", low=1)
    device: str = setting("auto", "where to compute", choices=DEVICES)


def shipped_networks(
    device: torch.device,
) -> Iterator[tuple[str, TrainConfig, Diffusion, nn.Module]]:
    """Name, training, process and weights of each network in checkpoints/pretrained/."""
    for name in MODEL_TYPES:
        path = Path("checkpoints/pretrained") / f"{name}.pth"
        if path.exists():
            yield name, *load_model(path, device)


def draw_timed(
    diffusion: Diffusion, net: nn.Module, count: int, **options
) -> tuple[Tensor, float, float]:
    """Images 0..count-1 of seed 0, images/s and network calls an image; warm-up not counted."""
    draw(diffusion, net, min(count, 16), seed=0, steps=2)
    evaluated = count_evaluated(net)
    start = time.perf_counter()
    images = draw(diffusion, net, count, seed=0, **options)
    rate = count / (time.perf_counter() - start)
    return images, rate, sum(evaluated) / count


def sample(cfg: SpeedConfig) -> None:
    """Images/s of the shipped networks at generate.py's defaults, and by T steps of DDPM."""
    rows = []
    for name, trained, diffusion, net in shipped_networks(pick_device(cfg.device)):
        _, rate, calls = draw_timed(diffusion, net, cfg.num_samples)
        slow = {"sampler": "ddpm", "steps": trained.timesteps, "guidance": 1.0}
        _, slow_rate, slow_calls = draw_timed(diffusion, net, cfg.num_samples, **slow)
        times = [f"{calls:.0f}", f"{rate:.1f}", f"{slow_calls:.0f}", f"{slow_rate:.2f}"]
        rows.append([name, *times, f"{rate / slow_rate:.1f}"])
    header = ["network", "calls", "images/s", "calls, ddpm", "images/s, ddpm", "ratio"]
    write_table("sample", header, rows)


@dataclass(frozen=True)
class CompareConfig:
    """What to hold the shipped networks against, and at how many images."""

    images: str | None = setting(None, "other programs' images, as in a.npz,b.npz")
    sizes: str = setting("512,5000", "numbers of images to score")
    features: str = setting("both", "feature networks", choices=("mnist", "inception", "both"))
    dims: int = setting(768, "Inception layer", choices=INCEPTION_DIMS)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")


def compare(cfg: CompareConfig) -> None:
    """FID of the shipped networks, of other programs' images and of real ones, in both spaces."""
    sizes = whole_numbers("sizes", cfg.sizes, at_least=2)
    device, most = pick_device(cfg.device), max(sizes)
    paths = [Path(part) for part in (cfg.images or "").split(",") if part]
    others = {path.stem: load_images(path, "--images")[:most] for path in paths}
    train, _ = load_dataset("mnist", cfg.data_dir, "train")
    sets = {"real training images": stand_ins(train, most)}
    facts = {}
    for name, trained, diffusion, net in shipped_networks(device):
        sets[name], rate, calls = draw_timed(diffusion, net, most)
        size = sum(weight.numel() for weight in net.parameters()) / 1e6
        budget = (
            f"{trained.max_minutes:g} min" if trained.max_minutes else f"{trained.epochs} epochs"
        )
        facts[name] = [f"{size:.2f} M", budget, f"{calls:.0f}", f"{rate:.1f}"]
    sets |= others
    rows = {name: [name, *facts.get(name, ["", "", "", ""])] for name in sets}
    columns = []
    for network in feature_networks(cfg):
        reference = reference_features(network, cfg.data_dir)
        columns += [f"FID, {network.name}, n = {n:,}" for n in sizes]
        for name, images in sets.items():
            features = extract(network, images, name, cache=True)
            for n in sizes:
                part = features[:n]
                score = "-"
                if len(part) == n:
                    score = score_text(fid(part, reference), fid_spread(part, reference))
                rows[name].append(score)
    header = ["images", "parameters", "trained", "calls", "images/s", *columns]
    write_table("compare", header, list(rows.values()))


@dataclass(frozen=True)
class SamplersConfig:
    """What to draw with, how often the network may be called, and how closely to look."""

    checkpoint: str = setting("checkpoints/pretrained/unet.pth", "the model to sample from")
    sampler: str | None = setting(None, "only this one", choices=SAMPLER_NAMES)
    spacing: str | None = setting(None, "in place of the sampler's own", choices=SPACINGS)
    calls: str = setting("4,6,8,10,15,20,50,100,300", "network calls an image, at most")
    num_samples: int = setting(10_000, "images for each score", low=40)
    inception: int | None = setting(None, "score N of them by Inception as well (768)", low=40)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")


def affordable_steps(
    schedule: NoiseSchedule, sampler: str, spacing: str, guidance: float, calls: int
) -> int:
    """The most steps that take at most so many network calls an image; 0 where none or T do not."""
    best = 0
    for steps in range(1, min(calls, schedule.timesteps) + 1):
        levels = schedule.sampling_sigmas(steps, spacing)[:-1].tolist()
        if sampler == "heun":  # whose every step between two of the levels calls at both of them
            levels += levels[1:-1]
        twice = sum(guidance > 1 and GUIDED[0] <= sigma <= GUIDED[1] for sigma in levels)
        best = steps if len(levels) + twice <= calls else best
    return best


def samplers(cfg: SamplersConfig) -> None:
    """FID against network calls an image: each sampler unguided, and the default one guided.

    What was measured before is kept, and not done again.
    """
    calls = whole_numbers("calls", cfg.calls, at_least=1)
    check_inception(cfg)
    device = pick_device(cfg.device)
    _, diffusion, net = load_model(cfg.checkpoint, device)
    spaces = [("mnist", cfg.num_samples, judge(load_features("mnist", 0, device), cfg.data_dir))]
    if cfg.inception:
        network = load_features("inception", 768, device)
        spaces.append((network.name, cfg.inception, judge(network, cfg.data_dir)))
    path = FOLDER / f"samplers_{content_hash(Path(cfg.checkpoint).read_bytes())}.json"
    known = json.loads(path.read_text()) if path.exists() else {}

    def scores(what: str, images_of: Callable[[int], Tensor]) -> list[float]:
        """In each feature space, the FID of as many images as are scored there."""
        keys = [f"{what}, {n} {name}" for name, n, _ in spaces]
        missing = [part for part in zip(keys, spaces, strict=True) if part[0] not in known]
        if missing:
            images = images_of(max(n for _, (_, n, _) in missing))
            for key, (_, n, score) in missing:
                known[key] = score(images[:n])
            write_atomically(path, json.dumps(known, indent=1).encode())
        return [known[key] for key in keys]

    real = "real training images"
    train, _ = load_dataset("mnist", cfg.data_dir, "train")
    floors = scores(real, partial(stand_ins, train))
    curves = [{real: dict.fromkeys(calls, floor)} for floor in floors]
    entries = [(name, 1.0) for name in SAMPLER_NAMES] + [(SAMPLER, diffusion.guidance)]
    for sampler, guidance in dict.fromkeys(entries):  # an unguided network's two are one
        if cfg.sampler not in (None, sampler):
            continue
        spacing = cfg.spacing or SAMPLERS[sampler].spacing
        row = f"{sampler}, {spacing}" + f", guidance {guidance:g}" * (guidance != 1)
        options = {"sampler": sampler, "spacing": spacing, "guidance": guidance}
        for most in calls:
            steps = affordable_steps(diffusion.schedule, sampler, spacing, guidance, most)
            if not steps:
                continue
            # a seed of its own: what is chosen by these scores is reported by others
            images_of = partial(draw, diffusion, net, seed=1000, steps=steps, **options)
            found = scores(f"{row}, {steps} steps", images_of)
            for curve, value in zip(curves, found, strict=True):
                curve.setdefault(row, {})[most] = value
    titles = [f"FID, {name}, n = {n:,}" for name, n, _ in spaces]
    for (name, _, _), title, curve_of in zip(spaces, titles, curves, strict=True):
        rows = [
            [what] + [f"{curve[k]:.4f}" if k in curve else "-" for k in calls]
            for what, curve in curve_of.items()
        ]
        write_table(f"samplers_{name}", [title, *(f"{k} calls" for k in calls)], rows)
    figure = plot_sampler_curves(dict(zip(titles, curves, strict=True)))
    save_figure(FOLDER / "samplers.png", figure)


ABOVE_GUIDED = (GUIDED[1], 12.0)  # to show what guidance does there


@dataclass(frozen=True)
class GuidanceConfig:
    """Which scales to try on which model."""

    checkpoint: str = setting("checkpoints/pretrained/unet.pth", "the model to sample from")
    scales: str = setting("0,1,1.5,2,3,4", "guidance scales")
    steps: int | None = setting(None, "sampling steps; default from the sampler", low=1)
    inception: int | None = setting(None, "score N of them by Inception as well (768)", low=40)
    num_samples: int = setting(2000, "images for each scale", low=40)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    data_dir: str = setting("./data", "where MNIST is, or is downloaded to")


def guidance(cfg: GuidanceConfig) -> None:
    """What the guidance scale buys and costs: agreement of the classifier's reading, and scores."""
    try:
        scales = [float(part) for part in cfg.scales.split(",")]
    except ValueError:
        raise UserError(f"--scales {cfg.scales}: must be numbers, like 1,1.5,2") from None
    check_inception(cfg)
    device = pick_device(cfg.device)
    _, diffusion, net = load_model(cfg.checkpoint, device)
    labels = pick_labels(net, cfg.num_samples, seed=1000)
    if labels is None:
        raise UserError(f"--checkpoint {cfg.checkpoint}: is unconditional; guidance needs labels")
    network = load_features("mnist", 0, device)
    reference = reference_features(network, cfg.data_dir)
    header = ["guidance", "at sigma", "calls", "agreement", "FID, mnist", "precision", "recall"]
    if cfg.inception:
        header.append(f"FID, inception-768, n = {cfg.inception:,}")
        score = judge(load_features("inception", 768, device), cfg.data_dir)
    evaluated = count_evaluated(net)
    rows = []
    for scale, guided in itertools.product(scales, (GUIDED, ABOVE_GUIDED, (0.0, math.inf))):
        where = "all" if guided[1] == math.inf else f"{guided[0]:g} to {guided[1]:g}"
        if scale <= 1 and where != "all":  # which is guided everywhere, whatever the levels
            continue
        evaluated.clear()
        options = {"guidance": scale, "guided": guided, "steps": cfg.steps}
        images = draw(diffusion, net, cfg.num_samples, seed=1000, **options)
        calls = sum(evaluated) / cfg.num_samples
        features = extract(network, images, "samples")
        read = network.probabilities(features).argmax(dim=1)
        scores = all_scores(features, reference)
        cells = [f"{scale:g}", where, f"{calls:.0f}", f"{(read == labels).float().mean():.4f}"]
        cells += [score_text(*scores[metric]) for metric in ("fid", "precision", "recall")]
        if cfg.inception:
            cells.append(f"{score(images[: cfg.inception]):.4f}")
        rows.append(cells)
    write_table("guidance", header, rows)


BENCHMARKS = {
    "floors": (SpacesConfig, floors),
    "faults": (SpacesConfig, faults),
    "features": (FeaturesConfig, features),
    "train": (QualityConfig, train_benchmark),
    "speedrun": (QualityConfig, speedrun),
    "sample": (SpeedConfig, sample),
    "compare": (CompareConfig, compare),
    "samplers": (SamplersConfig, samplers),
    "guidance": (GuidanceConfig, guidance),
}


def main() -> None:
    name, *flags = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r}: must be one of {', '.join(BENCHMARKS)}")
    kind, measure = BENCHMARKS[name]
    cfg = parse(kind, measure.__doc__, flags)
    measure(cfg)
    for key, value in environment(pick_device(cfg.device)).items():
        print(f"# {key}: {value}")


if __name__ == "__main__":
    run(main)
