"""All settings of the project, as frozen dataclasses. Their fields define the command-line flags.

This module imports nothing from the project at load time, so every other file can import it.
"""

import argparse
import dataclasses
import importlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

HALVES = ("left", "right", "top", "bottom")
DEVICES = ("auto", "cuda", "mps", "cpu")
INCEPTION_DIMS = (64, 192, 768, 2048)
PRECISIONS = ("auto", "fp32", "bf16")
LOSS_WEIGHTS = ("prediction", "bound")

# Tables in other modules, looked up when a command line is parsed: a new network, sampler or data
# set only needs an entry in its table, and its flag accepts it.
MODELS = "models:MODELS"
PREDICTIONS = "models.diffusion:TARGETS"
SAMPLERS = "sampling.samplers:SAMPLERS"
SCHEDULES = "utils.noise_scheduler:ALPHA_BARS"
SPACINGS = "utils.noise_scheduler:SPACINGS"
DATASETS = "utils.data_loader:DATASETS"

SAMPLER = "dpmpp_2m_sde"  # the best with few network calls
FEW_STEP_SAMPLER = "consistency"  # the only sampler for distilled networks
GUIDANCE = 1.75  # suits ten minutes of training; good networks need less, and may store their own
GUIDED = (0.6, 2.0)  # the noise levels sigma at which a shape becomes one class or another

DATA_DIR = "./data"
LONGEST_NAME = 200  # bytes of an experiment's name; file systems allow 255
PRETRAINED = Path(__file__).parent.absolute() / "checkpoints" / "pretrained"  # the shipped networks

Config = TypeVar("Config")


class UserError(Exception):
    """Bad input. The text is one line with the flag, the value given and the values allowed.

    Attributes:
        speaks: True if this process must print the error because no other process does.
    """

    speaks = False


def named(place: str) -> Any:
    """The object that "module:NAME" refers to. Imports the module."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def setting(default: Any, help: str, *, choices=None, low=None, above=None, high=None) -> Any:
    """A config field with its help text and its allowed values (`above` is exclusive).

    `choices` is a tuple, or "module:TABLE" for the names in a table of another module.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high}
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """What `main.py` trains, and how. Each checkpoint contains one, so it describes itself."""

    teacher: str | None = setting(
        None, "checkpoint to distil into a model that draws images in one network call"
    )
    model_type: str = setting("unet", "network architecture", choices=MODELS)
    width: int | None = setting(None, "base channels; default 64 (resnet: 96)", low=4, high=1024)
    fourier: int = setting(0, "octaves of Fourier features of pixels as extra input", low=0, high=8)
    class_conditional: bool = setting(True, "condition the network on class labels")
    label_dropout: float = setting(0.05, "fraction of labels dropped, for guidance", low=0, high=1)

    timesteps: int = setting(300, "number of noise levels T", low=2, high=10_000)
    schedule: str = setting("cosine", "noise schedule", choices=SCHEDULES)
    prediction: str = setting("v", "what the network predicts", choices=PREDICTIONS)
    t_mean: float = setting(0.0, "mean of logit(t / T) for training timesteps t", low=-10, high=10)
    t_std: float = setting(1.0, "standard deviation of logit(t / T) in training", above=0, high=10)
    t_even: float = setting(0.25, "fraction of timesteps drawn uniformly instead", low=0, high=1)

    loss_weight: str = setting(
        "prediction",
        "weigh errors equally, or by their cost in bits/dim",
        choices=LOSS_WEIGHTS,
    )

    dataset: str = setting("mnist", "data set to train on", choices=DATASETS)
    data_dir: str = setting(
        DATA_DIR, "data directory; missing files are downloaded (--dataset folder: your images)"
    )
    test_dir: str | None = setting(
        None, "test images for --dataset folder; default a tenth of --data_dir"
    )
    held_out: bool = setting(
        False, "leave out the last sixth of the training images, for `validation.py --held_out`"
    )
    train_size: int | None = setting(None, "use only the first N training images", low=1)

    epochs: int = setting(20, "passes over the data", low=1)
    max_minutes: float | None = setting(None, "time budget; the lr schedule ends with it", above=0)
    batch_size: int = setting(128, "images per step", low=1)
    lr: float = setting(4e-3, "peak learning rate", above=0, high=1)
    weight_decay: float = setting(0.01, "decoupled weight decay", low=0, high=100)
    grad_clip: float = setting(1.0, "clip gradients to this norm", above=0)
    ema_length: float = setting(
        0.05, "EMA width, as a fraction of the run so far", low=1e-6, high=0.28
    )
    seed: int = setting(0, "seed for weights, data order and noise", low=0, high=2**63 - 1)

    device: str = setting("auto", "device to run on", choices=DEVICES)
    precision: str = setting(
        "auto", "auto: bf16 where fast, else fp32; tf32: CUDA only", choices=(*PRECISIONS, "tf32")
    )
    compile: bool = setting(
        False, "use torch.compile: twice as fast on a GPU, after up to a minute of compiling"
    )
    deterministic: bool = setting(False, "make the same seed give the same weights on CUDA too")

    experiment_name: str | None = setting(None, "folder name; default: built from the settings")
    save_every: float = setting(10.0, "minutes between checkpoints within an epoch", above=0)
    keep: int = setting(3, "number of latest checkpoints to keep", low=1)
    sample_every: int = setting(1, "epochs between sample grids (0: only at the end)", low=0)

    def experiment(self) -> str:
        """The run's folder name under checkpoints/, outputs/ and runs/."""
        if self.experiment_name:
            return self.experiment_name
        data = f"_{self.dataset}" * (self.dataset != "mnist")
        data += f"_{Path(self.data_dir).name}" * (self.dataset == "folder")
        distilled = "_distilled" * (self.teacher is not None)
        return (
            f"diffusion_model_{self.model_type}{data}_{self.epochs}epochs"
            f"_{self.timesteps}timesteps_{self.lr}lr{distilled}"
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample. None means the checkpoint's value or, failing that, the sampler's default.

    `sampling.draw.resolve` fills in each None that the sampler uses; score files record the result.
    """

    sampler: str | None = setting(
        None,
        f"method; default {SAMPLER} (unipc to interpolate or reconstruct; distilled: consistency)",
        choices=SAMPLERS,
    )
    steps: int | None = setting(None, "sampling steps; default depends on the sampler", low=1)
    spacing: str | None = setting(
        None, "spacing of the noise levels; default depends on the sampler", choices=SPACINGS
    )
    eta: float | None = setting(
        None, "fraction of DDPM's noise to add; default ddim 0, dpmpp_2m_sde 0.75", low=0, high=1
    )
    churn: float | None = setting(None, "heun: S_churn, fresh noise added over all steps", low=0)
    guidance: float | None = setting(
        None,
        "scale; 0: unconditional, 1: conditional, more: stronger; default the checkpoint's, else"
        f" {GUIDANCE:g} with labels",
        low=0,
    )
    guided_from: float | None = setting(
        None, f"lowest noise level sigma for --guidance above 1; default {GUIDED[0]}", low=0
    )
    guided_to: float | None = setting(
        None, f"highest noise level sigma for --guidance above 1; default {GUIDED[1]}", low=0
    )
    seed: int = setting(0, "random seed; its image k is always the same", low=0, high=2**63 - 1)
    batch_size: int | None = setting(None, "images per network call; default 250, GPU 1000", low=1)
    precision: str = setting("auto", "auto: bf16 where it is fast, else fp32", choices=PRECISIONS)

    def carried(self) -> dict[str, Any]:
        """The values set here that a checkpoint may store: how best to sample its network."""
        names = {f.name for f in dataclasses.fields(SamplingConfig)} - MACHINE_FIELDS
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


MACHINE_FIELDS = {"seed", "batch_size", "precision"}  # do not depend on the network


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """What `generate.py` draws."""

    checkpoint: str = setting(str(PRETRAINED / "unet.pth"), "model to draw with, or a run's folder")
    num_samples: int = setting(64, "number of images", low=1)
    label: str | None = setting(None, "class to draw, by name or number (class-conditional models)")
    labels: str | None = setting(None, "classes to draw in turn, as in 0,1,2")
    digits: str | None = setting(None, "number to draw, as in 31415926, one image per digit")
    inpaint: str | None = setting(
        None, "pictures to complete: `test` (the test set), or a PNG, folder, .npz or .npy"
    )
    mask: str | None = setting(
        None,
        f"with --inpaint: the part to draw ({', '.join(HALVES)}, or the white pixels of a PNG)",
    )
    reconstruct: str | None = setting(
        None, "pictures (as for --inpaint) to encode into noise and draw again"
    )
    interpolate: str | None = setting(None, "two seeds to interpolate between, as in 3,4")
    data_dir: str | None = setting(None, "data directory for `test`; default as in training")
    test_dir: str | None = setting(None, "test images of a folder data set; default as in training")
    device: str = setting("auto", "device to run on", choices=DEVICES)
    output: str = setting("outputs/samples.png", "PNG file for the grid of images")
    npz: str | None = setting(None, "also write a .npz: `images` uint8 (N, C, H, W) and `labels`")
    strip: str | None = setting(None, "also write a PNG of 8 images being denoised")
    animate: str | None = setting(
        None, "also write a GIF of 100 images being denoised, x_t beside x0_hat"
    )


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """What `validation.py` scores, and against what."""

    path_to_model: str | None = setting(None, "checkpoint to score, or a run's folder")
    experiment_name: str | None = setting(None, "run folder; scores its last checkpoint by default")
    model_type: str | None = setting(None, "fail if the model is of another type", choices=MODELS)
    validate_all: bool = setting(False, "score every checkpoint of --experiment_name")
    images: str | None = setting(None, "score these images, not a model: a folder, .npz or .npy")
    reference_images: str | None = setting(None, "compare with these images, not the test set")
    held_out: bool = setting(
        False, "compare with the last sixth of the training images, to choose models by score"
    )
    num_samples: int = setting(10_000, "number of images to score", low=6)
    seeds: int = setting(1, "average the scores over N seeds, counting from --seed", low=1)
    floor_draws: int | None = setting(
        None, "sets of real images to score, at most; default 10 (inception: 10,000 images)", low=1
    )
    features: str = setting("mnist", "feature network", choices=("mnist", "inception"))
    dims: int = setting(2048, "Inception layer, by its number of features", choices=INCEPTION_DIMS)
    memorization: bool = setting(False, "check samples for copies of training images")
    tstr: bool = setting(
        False, "train on synthetic, test on real: a classifier learns from labelled samples"
    )
    likelihood: bool = setting(False, "score bits/dim of --num_samples test images, not samples")
    flow: int = setting(0, "with --likelihood: also score N images by the probability flow", low=0)
    device: str = setting("auto", "device to run on", choices=DEVICES)
    dataset: str | None = setting(None, "reference for --images; default mnist", choices=DATASETS)
    data_dir: str | None = setting(
        None, "data directory; missing files are downloaded; default as in training"
    )
    test_dir: str | None = setting(None, "test images of a folder data set; default as in training")
    json: str | None = setting(
        None, "result file; default: a name of its own in outputs/<experiment>/"
    )


@dataclass(frozen=True)
class AppConfig:
    """The page that `python -m app` shows."""

    port: int = setting(7860, "port of the page, on this machine only", low=1024, high=65_535)
    dataset: str = setting("synthetic", "source of the test digits", choices=("mnist", "synthetic"))
    data_dir: str = setting(DATA_DIR, "data directory; missing files are downloaded")
    device: str = setting("auto", "device to run on", choices=DEVICES)


def program() -> str:
    """The name of the script that runs, or of the package: `benchmarks` for `-m benchmarks`."""
    script = Path(sys.argv[0])
    return script.parent.name if script.name == "__main__.py" else script.name


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _field_type(f: dataclasses.Field) -> type:
    """`int` for a field annotated `int` or `int | None`."""
    named = (f.type, *getattr(f.type, "__args__", ()))
    return next(kind for kind in (bool, int, float, str) if kind in named)


def _choices(f: dataclasses.Field) -> tuple:
    """The values that a field may have, or () if they are not listed."""
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
                (kind is int or math.isfinite(value))
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
        not name.strip(". ")
        or set(name) & set("/\\")
        or not name.isprintable()
        or len(name.encode()) > LONGEST_NAME
    ):
        limit = f"a plain folder name of at most {LONGEST_NAME} bytes"
        raise UserError(f"--experiment_name {name[:LONGEST_NAME]!r}: must be {limit}")
    return config


def from_dict(kind: type[Config], values: dict) -> Config:
    """Rebuild a config stored in a checkpoint. Raises UserError on unknown or bad fields."""
    known = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not set(values) <= known:
        raise UserError("its config has settings that this version does not know")
    return check(kind(**values))


def parse(
    kind: type[Config], description: str, argv: list[str] | None = None, **defaults: Any
) -> Config:
    """Read the command line into a checked, frozen config. Bad flags raise UserError.

    `defaults` override the defaults of the fields.
    """
    parser = _Parser(prog=program(), description=description, allow_abbrev=False)
    for f in dataclasses.fields(kind):
        text, default = f.metadata["help"], defaults.get(f.name, f.default)
        if _choices(f):
            text += f" ({', '.join(map(str, _choices(f)))})"
        if default is not None and default is not False:
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
