"""Requests to a trained model besides plain samples, read from the flags of `generate.py`.

Classes (`--label`, `--labels`, `--digits`), pictures to complete (`--inpaint`) or to encode and
redraw (`--reconstruct`), and interpolation between two seeds (`--interpolate`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from config import FEW_STEP_SAMPLER, HALVES, SampleConfig, SamplingConfig, UserError
from models.trained import TrainedModel
from sampling.draw import draws_noise, encode_images, labels_for, resolve
from utils import distributed
from utils.data_loader import DatasetInfo, to_model_range, to_uint8
from utils.image_checks import check_shape
from utils.images import load_images
from utils.random import ImageNoise

MODES = ("digits", "inpaint", "reconstruct", "interpolate")
# Their samplers: RePaint to complete pictures, and a deterministic one to draw from a given start
MODE_SAMPLERS = {"inpaint": "repaint", "reconstruct": "unipc", "interpolate": "unipc"}
# The modes that need a denoiser, and why
FLOW_MODES = {
    "inpaint": "RePaint needs a denoiser at every noise level",
    "reconstruct": "encoding runs the flow of a denoiser backwards",
}
GREY = 96  # shown where a picture will be completed


@dataclass
class Plan:
    """What to draw and how to show it.

    Attributes:
        count: number of images.
        labels: (count,), or None for an unconditional draw.
        sampling: how to draw, as `resolve` returns it.
        start: (count, C, H, W) noise to start from, or None for the seed's.
        given: extra tensors for the sampler, with one entry per image.
        above: pictures (count, C, H, W) uint8 to show above the drawn ones, one row each.
        columns: columns of the grid; None for a square grid.
        padding: pixels between images.
    """

    count: int
    labels: Tensor | None
    sampling: SamplingConfig
    start: Tensor | None = None
    given: dict[str, Tensor] = field(default_factory=dict)
    above: list[Tensor] = field(default_factory=list)
    columns: int | None = None
    padding: int = 2


def make_plan(cfg: SampleConfig, model: TrainedModel) -> Plan:
    """Read from the flags what to draw. Raises UserError if they do not fit together."""
    modes = [name for name in MODES if getattr(cfg, name) is not None]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: only one of them at a time")
    if (cfg.mask is None) != (cfg.inpaint is None):
        raise UserError("--inpaint and --mask: each needs the other")
    if cfg.inpaint and cfg.sampler:
        raise UserError(f"--sampler {cfg.sampler}: --inpaint uses its own sampler, RePaint")
    if model.few_step and modes and modes[0] in FLOW_MODES:
        raise UserError(f"--{modes[0]}: {FLOW_MODES[modes[0]]}; a distilled network is not one")
    sampling = resolve(cfg, model, MODE_SAMPLERS.get("".join(modes)))

    wanted = wanted_labels(cfg, model)
    count = len(wanted) if cfg.digits else cfg.num_samples
    pictures = None
    if cfg.inpaint or cfg.reconstruct:
        pictures = load_pictures(cfg, model)
        count = len(pictures)
    if wanted:
        labels = torch.tensor(wanted).repeat(-(-count // len(wanted)))[:count]
    else:  # the classes of given pictures and of interpolated images are unknown
        labels = labels_for(model, count, cfg.seed) if not modes else None
    if cfg.guidance not in (None, 1) and labels is None:
        why = "no class is asked for" if model.net.num_classes else "this model is unconditional"
        raise UserError(f"--guidance {cfg.guidance:g}: {why}; must be 1")
    if labels is None and model.needs_label:
        raise UserError(f"--{modes[0]}: this network always needs a class; give --label")

    plan = Plan(count, labels, sampling)
    if cfg.digits:
        plan.columns, plan.padding = count, 0
    elif cfg.interpolate:
        plan_interpolation(plan, cfg, model)
    elif cfg.inpaint:
        plan_inpainting(plan, cfg, pictures, model.data)
    elif cfg.reconstruct:
        plan_reconstruction(plan, pictures, model)
    return plan


def wanted_labels(cfg: SampleConfig, model: TrainedModel) -> list[int]:
    """The classes that --label, --labels or --digits ask for. Raises UserError on bad ones."""
    asked = [name for name in ("label", "labels", "digits") if getattr(cfg, name) is not None]
    if not asked:
        return []
    name, value = asked[0], getattr(cfg, asked[0])
    if len(asked) > 1:
        raise UserError(f"--{name} and --{asked[1]}: only one of them can choose the classes")
    if not model.net.num_classes:
        raise UserError(f"--{name} {value}: this model is unconditional and takes no label")
    parts = {"label": [value], "labels": value.split(","), "digits": list(value)}[name]
    numbers = [class_number(part, model.data) for part in parts]
    if not parts or None in numbers:
        names = model.data.class_names
        allowed = ", ".join(names if len(names) <= 20 else [*names[:20], "..."])
        example = {"labels": ", as in 0,1,2", "digits": ", as in 31415926"}.get(name, "")
        raise UserError(f"--{name} {value}: must name classes among {allowed}{example}")
    return numbers


def class_number(text: str, data: DatasetInfo) -> int | None:
    """The label of a class given by name, or by number if no name is a number; None if unknown."""
    if text in data.class_names:
        return data.class_names.index(text)
    named_by_numbers = any(name.isdecimal() for name in data.class_names)
    if named_by_numbers or not text.isdecimal() or len(text) > 9:
        return None
    return int(text) if int(text) < data.num_classes else None


def load_pictures(cfg: SampleConfig, model: TrainedModel) -> Tensor:
    """The pictures (N, C, H, W) uint8 that --inpaint or --reconstruct names, at most num_samples.

    A single picture to complete is repeated num_samples times, to complete it in different ways.
    """
    flag, source = ("inpaint", cfg.inpaint) if cfg.inpaint else ("reconstruct", cfg.reconstruct)
    if source == "test":
        with distributed.first_goes_ahead():
            limit = cfg.num_samples
            return model.dataset("test", cfg.data_dir, cfg.test_dir, limit=limit).images
    images = load_images(Path(source), f"--{flag}", at_least=1)
    check_shape(images, model.data.shape, f"--{flag} {source}")
    if len(images) == 1 and cfg.inpaint:
        return images.repeat(cfg.num_samples, 1, 1, 1)
    return images[: cfg.num_samples]


def load_mask(mask: str, data: DatasetInfo) -> Tensor:
    """(1, H, W) bool, true where to draw: one half, or where a PNG is brighter than mid-grey."""
    missing = torch.zeros(1, data.height, data.width, dtype=torch.bool)
    if mask in HALVES:
        dim = 2 if mask in ("left", "right") else 1
        half = missing.shape[dim] // 2
        missing.narrow(dim, 0 if mask in ("left", "top") else half, half).fill_(True)
        return missing
    if Path(mask).suffix.lower() != ".png":
        raise UserError(f"--mask {mask}: must be one of {', '.join(HALVES)}, or a PNG file")
    images = load_images(Path(mask), "--mask", at_least=1)
    check_shape(images, (1, data.height, data.width), f"--mask {mask}")
    return images[0] > 127


def plan_inpainting(plan: Plan, cfg: SampleConfig, pictures: Tensor, data: DatasetInfo) -> None:
    """Rows: the picture, its known part, the drawn result."""
    missing = load_mask(cfg.mask, data).expand_as(pictures)
    plan.above, plan.columns = [pictures, pictures.masked_fill(missing, GREY)], plan.count
    plan.given = {"known": to_model_range(pictures), "missing": missing}


def plan_interpolation(plan: Plan, cfg: SampleConfig, model: TrainedModel) -> None:
    """A row from image 0 of one seed to image 0 of another, along a great circle in noise space."""
    need_determinism(plan, "interpolate")
    parts = cfg.interpolate.split(",")
    if len(parts) != 2 or not all(map(is_seed, parts)):
        raise UserError(f"--interpolate {cfg.interpolate}: must be two seeds, like 3,4")
    ends = [ImageNoise(int(part), range(1), model.data.shape)() for part in parts]
    plan.start, plan.columns = slerp(*ends, plan.count), plan.count


def is_seed(text: str) -> bool:
    return text.isdecimal() and len(text) < 20 and int(text) < 2**63


def slerp(a: Tensor, b: Tensor, count: int) -> Tensor:
    """`count` noises from a to b (1, C, H, W), inclusive, evenly along the arc (Shoemake 1985).

    Unlike points on a straight line, all of them have the norm of noise.
    """
    share = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # works for equal noises too
    return (a * torch.sin((1 - share) * angle) + b * torch.sin(share * angle)) / torch.sin(angle)


def plan_reconstruction(plan: Plan, pictures: Tensor, model: TrainedModel) -> None:
    """Rows: the picture, the noise that encodes it, the picture drawn from that noise."""
    need_determinism(plan, "reconstruct")
    if plan.sampling.steps < 2:
        raise UserError(f"--steps {plan.sampling.steps}: must be at least 2 for --reconstruct")
    plan.start = encode_images(model, pictures, plan.sampling, plan.labels)
    plan.above, plan.columns = [pictures, to_uint8(plan.start / 3)], plan.count


def need_determinism(plan: Plan, flag: str) -> None:
    if draws_noise(plan.sampling):
        name, steps = plan.sampling.sampler, plan.sampling.steps
        if name == FEW_STEP_SAMPLER:
            raise UserError(f"--steps {steps}: must be 1 for --{flag}; more steps draw fresh noise")
        raise UserError(f"--sampler {name}: --{flag} needs one that draws no noise of its own")
