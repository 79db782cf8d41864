"""Every setting of the project, as frozen values; the command-line flags are made from the fields.

This module imports nothing of the project when it is loaded, so every other file may import it.
"""

import argparse
import dataclasses
import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

HALVES = ("left", "right", "top", "bottom")
DEVICES = ("auto", "cuda", "mps", "cpu")
INCEPTION_DIMS = (64, 192, 768, 2048)
PRECISIONS = ("auto", "fp32", "bf16")
LOSS_WEIGHTS = ("prediction", "bound")

# Names that another room defines, read there when a command line is parsed: a new network, sampler
# or data set is one entry in its own table, and its flag knows it.
MODELS = "models:MODELS"
PREDICTIONS = "models.diffusion:TARGETS"
SAMPLERS = "sampling.samplers:SAMPLERS"
SCHEDULES = "utils.noise_scheduler:ALPHA_BARS"
SPACINGS = "utils.noise_scheduler:SPACINGS"
DATASETS = "utils.data_loader:DATASETS"

SAMPLER = "dpmpp_2m_sde"  # the best in few network calls
FEW_STEP_SAMPLER = "consistency"  # of distilled networks, which have no other
GUIDANCE = 1.5  # mends many digits of a network trained for minutes, and costs a good one little
GUIDED = (0.6, 2.0)  # the noise levels sigma that decide which class a drawn shape is

DATA_DIR = "./data"
PRETRAINED = Path(__file__).parent.absolute() / "checkpoints" / "pretrained"  # the shipped networks

Config = TypeVar("Config")


class UserError(Exception):
    """Bad input. Its text is one line naming the flag, the value got and the values allowed.

    Attributes:
        speaks: True where no other process says the same.
    """

    speaks = False


def named(place: str) -> Any:
    """What "module:NAME" stands for; the module is loaded now."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def setting(default: Any, help: str, *, choices=None, low=None, above=None, high=None) -> Any:
    """A config field that knows its help text and its allowed values (`above` is exclusive).

    `choices` is a tuple, or "module:TABLE" for the names in a table of another module.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """What `main.py` trains, and how. A checkpoint carries one, so that it explains itself."""

    teacher: str | None = setting(None, "checkpoint to distil: to draw in one call what it draws")
    model_type: str = setting("unet", "noise predictor", choices=MODELS)
    width: int | None = setting(None, "base channels; default 64, resnet 96", low=4, high=1024)
    fourier: int = setting(0, "octaves of sines of the pixels as inputs too", low=0, high=8)
    class_conditional: bool = setting(True, "tell the network which class an image is of")
    label_dropout: float = setting(0.05, "share of labels hidden for guidance", low=0, high=1)

    timesteps: int = setting(300, "number of noise levels T", low=2, high=10_000)
    schedule: str = setting("cosine", "noise schedule", choices=SCHEDULES)
    prediction: str = setting("v", "what the network predicts", choices=PREDICTIONS)
    t_mean: float = setting(0.0, "mean of logit(t / T) in training", low=-10, high=10)
    t_std: float = setting(1.0, "standard deviation of logit(t / T)", above=0, high=10)
    t_even: float = setting(0.25, "share of the batch with t drawn evenly instead", low=0, high=1)

    loss_weight: str = setting(
        "prediction", "of errors; bound: what they cost in bits/dim", choices=LOSS_WEIGHTS
    )

    dataset: str = setting("mnist", "what to learn", choices=DATASETS)
    data_dir: str = setting(DATA_DIR, "where the data is, or is downloaded to; folder: the images")
    test_dir: str | None = setting(None, "folder: test images; default a tenth of --data_dir")
    held_out: bool = setting(False, "leave out the last sixth of the training images, to choose by")
    train_size: int | None = setting(None, "use only the first N training images", low=1)

    epochs: int = setting(20, "passes over the data", low=1)
    max_minutes: float | None = setting(None, "time budget; the schedule anneals to it", above=0)
    batch_size: int = setting(128, "images a step", low=1)
    lr: float = setting(4e-3, "peak learning rate", above=0, high=1)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0, high=100)
    grad_clip: float = setting(1.0, "largest gradient norm", above=0)
    ema_length: float = setting(
        0.05, "EMA width, as a share of the run so far", low=1e-6, high=0.28
    )
    seed: int = setting(0, "seed of weights, data order and noise", low=0, high=2**63 - 1)

    device: str = setting("auto", "where to compute", choices=DEVICES)
    precision: str = setting(
        "auto", "auto: bf16 where that is fast; tf32: CUDA", choices=(*PRECISIONS, "tf32")
    )
    compile: bool = setting(
        False, "torch.compile: on a GPU twice the speed, after up to a minute of compiling"
    )
    deterministic: bool = setting(False, "on CUDA too, the same seed gives the same weights")

    experiment_name: str | None = setting(None, "folder name; default from the settings")
    save_every: float = setting(10.0, "minutes between checkpoints inside an epoch", above=0)
    keep: int = setting(3, "how many of the last checkpoints stay", low=1)
    sample_every: int = setting(1, "epochs between pictures (0: only at the end)", low=0)

    def experiment(self) -> str:
        """The run's folder name under checkpoints/, outputs/ and runs/."""
        if self.experiment_name:
            return self.experiment_name
        return (
            f"diffusion_model_{self.model_type}_{self.epochs}epochs"
            f"_{self.timesteps}timesteps_{self.lr}lr" + "_distilled" * (self.teacher is not None)
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. None stands for the checkpoint's value, else for the sampler's own.

    `sampling.draw.resolve` fills in every None; the result is what a score file records.
    """

    sampler: str | None = setting(
        None, f"default {SAMPLER}; unipc to interpolate and reconstruct", choices=SAMPLERS
    )
    steps: int | None = setting(None, "sampling steps; default from the sampler", low=1)
    spacing: str | None = setting(
        None, "of noise levels; default from the sampler", choices=SPACINGS
    )
    eta: float | None = setting(
        None, "share of DDPM's noise; default ddim 0, dpmpp_2m_sde 0.75", low=0, high=1
    )
    churn: float | None = setting(None, "heun: S_churn, fresh noise over all steps", low=0)
    guidance: float | None = setting(
        None,
        f"1: conditional, 0: unconditional, more: stronger; default {GUIDANCE} with labels",
        low=0,
    )
    guided_from: float | None = setting(
        None, f"lowest noise level sigma guided by more than 1; default {GUIDED[0]}", low=0
    )
    guided_to: float | None = setting(
        None, f"highest noise level guided by more than 1; default {GUIDED[1]}", low=0
    )
    seed: int = setting(0, "image k of a seed is always the same image", low=0, high=2**63 - 1)
    batch_size: int | None = setting(
        None, "images in one network call; default 250, on a GPU 1000", low=1
    )
    precision: str = setting("auto", "auto: bf16 where that is fast", choices=PRECISIONS)

    def carried(self) -> dict[str, Any]:
        """The values given that a checkpoint may carry: how its network is best sampled."""
        names = {f.name for f in dataclasses.fields(SamplingConfig)} - MACHINE_FIELDS
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


MACHINE_FIELDS = {"seed", "batch_size", "precision"}  # say nothing of a network


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """What `generate.py` draws."""

    checkpoint: str = setting(str(PRETRAINED / "unet.pth"), "the model to sample from")
    num_samples: int = setting(64, "how many images", low=1)
    label: str | None = setting(None, "class by name or number (class-conditional models)")
    labels: str | None = setting(None, "classes in turn, as in 0,1,2")
    digits: str | None = setting(None, "write this number, as in 31415926, a digit an image")
    inpaint: str | None = setting(None, "pictures to complete: `test`, a PNG, folder, .npz, .npy")
    mask: str | None = setting(None, f"what to draw anew ({', '.join(HALVES)}, or a PNG: white)")
    reconstruct: str | None = setting(None, "pictures to encode into noise and to draw from it")
    interpolate: str | None = setting(None, "two seeds, as in 3,4, to draw what lies between")
    data_dir: str | None = setting(None, "where the pictures of `test` are; default as in training")
    test_dir: str | None = setting(None, "folder: test images; default as in training")
    device: str = setting("auto", "where to compute", choices=DEVICES)
    output: str = setting("outputs/samples.png", "PNG grid to write")
    npz: str | None = setting(None, "also write `images`, uint8 (N, C, H, W), and their `labels`")
    strip: str | None = setting(None, "also write a PNG of the denoising path of 8 images")
    animate: str | None = setting(None, "also write a GIF of it, x_t beside x0_hat, 100 images")


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """What `validation.py` scores, and against what."""

    path_to_model: str | None = setting(None, "checkpoint to score")
    experiment_name: str | None = setting(None, "run folder; without --path_to_model its last")
    model_type: str | None = setting(None, "checked against the model", choices=MODELS)
    validate_all: bool = setting(False, "score every checkpoint of --experiment_name")
    images: str | None = setting(None, "score these, not a model: a folder, .npz or .npy")
    reference_images: str | None = setting(None, "compare with these, not the data's test set")
    held_out: bool = setting(
        False, "compare with the last sixth of the training images: for what is chosen by scores"
    )
    num_samples: int = setting(10_000, "how many images to score", low=6)
    seeds: int = setting(1, "draw them from N seeds on, and give the mean", low=1)
    floor_draws: int | None = setting(
        None, "draws of real images, as far as they fit; default 10, inception 10,000 images", low=1
    )
    features: str = setting("mnist", "feature network", choices=("mnist", "inception"))
    dims: int = setting(2048, "Inception layer", choices=INCEPTION_DIMS)
    memorization: bool = setting(False, "look for copies of training images")
    tstr: bool = setting(False, "train on synthetic, test on real (class-conditional models)")
    likelihood: bool = setting(False, "bits/dim of --num_samples test images, and no samples")
    flow: int = setting(0, "--likelihood: of so many images by the probability flow too", low=0)
    device: str = setting("auto", "where to compute", choices=DEVICES)
    dataset: str | None = setting(None, "reference for --images; default mnist", choices=DATASETS)
    data_dir: str | None = setting(
        None, "where the data is, or is downloaded to; default as in training"
    )
    test_dir: str | None = setting(None, "folder: test images; default as in training")
    json: str | None = setting(None, "result file; default outputs/<experiment>/scores_....json")


@dataclass(frozen=True)
class AppConfig:
    """The page that `python -m app` shows."""

    port: int = setting(7860, "of the page, on this machine alone", low=1024, high=65_535)
    dataset: str = setting(
        "synthetic", "where test digits are from", choices=("mnist", "synthetic")
    )
    data_dir: str = setting(DATA_DIR, "where the data is, or is downloaded to")
    device: str = setting("auto", "where to compute", choices=DEVICES)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _field_type(f: dataclasses.Field) -> type:
    """`int` for a field annotated `int` or `int | None`."""
    named = (f.type, *getattr(f.type, "__args__", ()))
    return next(kind for kind in (bool, int, float, str) if kind in named)


def _choices(f: dataclasses.Field) -> tuple:
    """The values that a field may have; () where they are not listed."""
    choices = f.metadata["choices"] or ()
    return tuple(named(choices)) if isinstance(choices, str) else choices


def _describe(f: dataclasses.Field) -> str:
    """The allowed values in words, e.g. 'an integer >= 1'."""
    if _choices(f):
        return "one of " + ", ".join(map(str, _choices(f)))
    noun = {int: "an integer", float: "a number", str: "text", bool: "a boolean"}[_field_type(f)]
    signs = {"low": ">=", "above": ">", "high": "<="}
    limits = [f"{s} {f.metadata[k]:g}" for k, s in signs.items() if f.metadata[k] is not None]
    return f"{noun} {' and '.join(limits)}".strip()


def check(config: Config) -> Config:
    """Return `config` if every field is allowed, else raise UserError naming the first bad one."""
    for f in dataclasses.fields(config):
        value, limits, kind = getattr(config, f.name), f.metadata, _field_type(f)
        if value is None and f.default is None:
            continue
        right_type = isinstance(value, kind) or (kind is float and isinstance(value, int))
        ok = right_type and (kind is bool or not isinstance(value, bool))
        if ok and kind in (int, float):
            ok = (
                math.isfinite(value)
                and (limits["low"] is None or value >= limits["low"])
                and (limits["above"] is None or value > limits["above"])
                and (limits["high"] is None or value <= limits["high"])
            )
        if value == "" != f.default:
            raise UserError(f'--{f.name} "": must not be empty')
        if not ok or (limits["choices"] and value not in _choices(f)):
            raise UserError(f"--{f.name} {value}: must be {_describe(f)}")
    name = getattr(config, "experiment_name", None)
    if name is not None and (
        not name.strip(". ") or set(name) & set("/\\") or not name.isprintable()
    ):
        raise UserError(f"--experiment_name {name!r}: must be a plain folder name")
    return config


def from_dict(kind: type[Config], values: dict) -> Config:
    """Rebuild a config stored in a checkpoint. Raises UserError on unknown or bad fields."""
    known = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise UserError("its config holds settings this version does not know")
    return check(kind(**values))


def parse(
    kind: type[Config], description: str, argv: list[str] | None = None, **defaults: Any
) -> Config:
    """Read the command line into a checked, frozen config. Bad flags raise UserError.

    `defaults` take the places of the fields' own.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    for f in dataclasses.fields(kind):
        text, default = f.metadata["help"], defaults.get(f.name, f.default)
        if _choices(f):
            text += f" ({', '.join(map(str, _choices(f)))})"
        if default not in (None, False):
            text += f" [{default}]"
        text = text.replace("%", "%%")
        if _field_type(f) is bool:
            action = argparse.BooleanOptionalAction if f.default else "store_true"
            parser.add_argument(f"--{f.name}", action=action, default=default, help=text)
        else:
            metavar = {int: "N", float: "X", str: "TEXT"}[_field_type(f)]
            parser.add_argument(f"--{f.name}", default=default, metavar=metavar, help=text)
    values = vars(parser.parse_args(argv))
    for f in dataclasses.fields(kind):
        if isinstance(values[f.name], str):
            try:
                values[f.name] = _field_type(f)(values[f.name])
            except ValueError:
                raise UserError(f"--{f.name} {values[f.name]}: must be {_describe(f)}") from None
    return check(kind(**values))
