"""Training: FID against minutes, minutes to a given FID, and where the time of a step goes."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import (
    FOLDER,
    ROOMS,
    SEARCH_SEED,
    check_inception,
    draw,
    figure_text,
    judge,
    measurement_key,
    over_seeds,
    seconds_each,
    split_flags,
    write_table,
)
from benchmarks.figures import plot_learning_curves
from benchmarks.parts import Cost, cost_of_parts, gemm_rate
from config import DATA_DIR, DEVICES, MODELS, SamplingConfig, TrainConfig, UserError, parse, setting
from scoring.classifier import reads
from scoring.features import load_features
from training.denoising import DenoisingTrainer
from training.loop import Run, train
from utils.data_loader import Dataset, describe, load_dataset, to_model_range
from utils.device import DTYPES, arithmetic, pick_device
from utils.files import write_atomically
from utils.visualization import save_figure


@dataclass(frozen=True)
class QualityConfig:
    """What to train, for how long, and how to score it."""

    model_type: str = setting("unet", "noise predictor", choices=MODELS)
    max_minutes: float = setting(10.0, "time budget of a run", above=0)
    settings: str = setting("", "more flags of main.py, as in '--batch_size 64 --t_std 1.3'")
    sampling: str = setting("", "flags of generate.py for sampling, as in '--guidance 1'")
    fid: float = setting(3.0, "speedrun: stop the clock at this FID, `mnist` features", above=0)
    every: float = setting(1.0, "minutes of training between two scores", above=0)
    seeds: int = setting(3, "number of runs", low=1)
    num_samples: int = setting(5000, "images for each score", low=40)
    inception: int | None = setting(
        None, "train: at the end, also score N images by Inception (768)", low=40
    )
    held_out: bool = setting(
        False, "to choose settings: train without the last sixth of the images and score against it"
    )
    profile: bool = setting(False, "train: only show where the time of a training step goes")
    device: str = setting("auto", "device to run on", choices=DEVICES)
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")

    def training(self, seed: int) -> TrainConfig:
        """The settings of one run: main.py's defaults except for `settings`, within the budget.

        Raises UserError for bad settings, and for those that the benchmark chooses itself.
        """
        own = {
            "model_type": self.model_type,
            "max_minutes": self.max_minutes,
            "epochs": 100_000,
            "sample_every": 0,
            "seed": seed,
            "device": self.device,
            "data_dir": self.data_dir,
            "held_out": self.held_out,
        }
        flags = split_flags("settings", self.settings)
        for flag in flags:
            if flag.removeprefix("--").split("=")[0] in {*own, "teacher"}:
                raise UserError(f"--settings {flag}: cannot be set, the benchmark chooses its own")
        return dataclasses.replace(parse(TrainConfig, "", flags), **own)

    def drawing(self) -> SamplingConfig:
        """How to draw the images that are scored."""
        sampling = parse(SamplingConfig, "", split_flags("sampling", self.sampling))
        return dataclasses.replace(sampling, seed=SEARCH_SEED)


class Reached(Exception):
    """The speedrun's FID is reached."""


def learning_curve(cfg: QualityConfig, seed: int, goal: float) -> list[dict]:
    """`minutes` of training, `step` and `fid` during one run, which ends early at FID `goal`.

    Saved to a file as it grows, so that the same command continues after an interruption. Different
    settings, code, hardware or data start another run.
    """
    training, device, sampling = cfg.training(seed), pick_device(cfg.device), cfg.drawing()
    where = (training.dataset, training.data_dir, "train", training.test_dir)
    data = load_dataset(*where, limit=training.train_size, held_out=training.held_out)
    if not reads(data.info):
        raise UserError(f"--settings --dataset {training.dataset}: must be digits like MNIST's")
    networks = [load_features("mnist", 0, device)]
    if cfg.inception:
        networks.append(load_features("inception", 768, device))
    key = curve_key(cfg, training, sampling, data, [network.version for network in networks])
    name = f"benchmark_{cfg.model_type}_{cfg.max_minutes:g}min_{key}"
    path = FOLDER / f"kept_{name}.json"
    curve = json.loads(path.read_text()) if path.exists() else []
    reached = any(point["fid"] <= goal for point in curve)
    if reached or (curve and curve[-1]["minutes"] >= cfg.max_minutes):
        print(f"seed {seed}: as measured before, {path}")
        return curve
    score, *score_end = (judge(network, cfg.data_dir, cfg.held_out) for network in networks)

    def watch(run: Run) -> None:
        while curve and curve[-1]["minutes"] > run.minutes:  # scored before an interruption
            curve.pop()
        due = (curve[-1]["minutes"] if curve else 0.0) + cfg.every
        if run.minutes < due and run.progress < 1:
            return
        images = draw(run.trainer.model, cfg.num_samples, sampling)
        curve.append({"minutes": run.minutes, "step": run.step, "fid": score(images)})
        if cfg.inception and run.progress >= 1:
            curve[-1]["inception"] = score_end[0](images[: cfg.inception])
        write_atomically(path, json.dumps(curve).encode())
        if curve[-1]["fid"] <= goal:
            raise Reached

    training = dataclasses.replace(training, experiment_name=name)
    with contextlib.suppress(Reached):
        train(DenoisingTrainer(training, data.info, device), data, watch)
    return curve


def curve_key(
    cfg: QualityConfig,
    training: TrainConfig,
    sampling: SamplingConfig,
    data: Dataset,
    versions: list[str],
) -> str:
    """A hash of all that decides a learning curve; `versions`: of the feature networks."""
    test = load_dataset("mnist", cfg.data_dir, "test", held_out=cfg.held_out)
    settings = (dataclasses.asdict(training), dataclasses.asdict(sampling))
    counts = (cfg.num_samples, cfg.every, cfg.inception)
    rooms = (*ROOMS, "training", "benchmarks/training.py")
    device = pick_device(cfg.device)
    return measurement_key(device, rooms, [data, test], *settings, *counts, versions)


def train_benchmark(cfg: QualityConfig) -> None:
    """FID against minutes of training, from a cold start, for several seeds."""
    if cfg.profile:
        profile(cfg)
        return
    check_inception(cfg.inception, cfg.num_samples)
    curves = [learning_curve(cfg, seed, goal=0.0) for seed in range(cfg.seeds)]
    save_figure(FOLDER / f"train_{cfg.model_type}.png", plot_learning_curves(curves))
    rows = [
        [seed, point["step"], point["minutes"], point["fid"]]
        for seed, curve in enumerate(curves)
        for point in curve
    ]
    device = pick_device(cfg.device)
    write_table(
        f"train_{cfg.model_type}_curves", ["seed", "step", "minutes", "FID"], rows, device, keys=2
    )
    ends = {"mnist": (cfg.num_samples, "fid"), "inception-768": (cfg.inception, "inception")}
    rows = [
        [features, n, cfg.max_minutes, cfg.seeds, over_seeds([curve[-1][key] for curve in curves])]
        for features, (n, key) in ends.items()
        if n
    ]
    header = ["features", "n", "minutes", "seeds", "FID"]
    write_table(f"train_{cfg.model_type}", header, rows, device)


def speedrun(cfg: QualityConfig) -> None:
    """Minutes of training, from a cold start, until samples have a given FID, for several seeds."""
    curves = [learning_curve(cfg, seed, goal=cfg.fid) for seed in range(cfg.seeds)]
    reached = [
        next((point["minutes"] for point in curve if point["fid"] <= cfg.fid), None)
        for curve in curves
    ]
    rows = [[seed, minutes] for seed, minutes in enumerate(reached)]
    header = ["seed", "minutes"]
    write_table(f"speedrun_{cfg.model_type}", header, rows, pick_device(cfg.device))
    if None in reached:
        claim = f"{reached.count(None)} of {cfg.seeds} seeds missed it in {cfg.max_minutes:g} min"
    else:
        claim = f"{figure_text(over_seeds(reached))} minutes, {cfg.seeds} seeds"
    measure = f"mnist features, n = {cfg.num_samples:,}"
    print(f"# {cfg.model_type} to FID {cfg.fid:g} ({measure}): {claim}")


def profile(cfg: QualityConfig) -> None:
    """Where the time of a training step goes, and its share of the machine's GEMM rate."""
    training = cfg.training(0)
    device = pick_device(cfg.device, training.precision)
    batch, precision = training.batch_size, arithmetic(device, training.precision)
    images = torch.randint(256, (batch, 1, 28, 28), dtype=torch.uint8)
    data = describe("mnist", images)
    trainer = DenoisingTrainer(training, data, device)
    eager = DenoisingTrainer(dataclasses.replace(training, compile=False), data, device)
    x0 = to_model_range(images).to(device)
    y = torch.zeros(batch, dtype=torch.long, device=device)
    step = partial(trainer.train_step, x0, y, progress=0.0)
    seconds = seconds_each(step, device, times=30)
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
    kind = "cuda" if device.type == "cuda" else "cpu"
    print(profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=15))
    parts = cost_of_parts(trainer, eager, x0, y, times=10)
    whole = Cost(seconds, sum(part.operations for part in parts.values()))
    best = gemm_rate(device, DTYPES[precision])
    rows = [
        [
            name,
            cost.seconds * 1e3,
            batch / cost.seconds,
            cost.operations / cost.seconds / 1e9,
            cost.operations / cost.seconds / best,
        ]
        for name, cost in {**parts, "the whole step": whole}.items()
    ]
    header = ["part of a step", "ms", "images/s", "GFLOP/s", "of the best product's"]
    write_table(f"profile_{cfg.model_type}_{batch}_{precision}", header, rows, device)
    print(
        f"{batch / seconds:.0f} images/s: {whole.operations / seconds / best:.0%} of the best"
        f" {precision} matrix product's {best / 1e9:.0f} GFLOP/s"
    )
