"""What may be asked of a trained model besides plain samples, read from the flags of `generate.py`.

Classes (`--label`, `--labels`, `--digits`), pictures to complete (`--inpaint`) or to encode and
draw again (`--reconstruct`), and what lies between two seeds (`--interpolate`).
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import HALVES, IMAGE_SIZE, SAMPLER, SampleConfig, TrainConfig, UserError
from models.diffusion import Diffusion
from models.samplers import SAMPLERS, ImageNoise, check_steps, encode_images
from utils.data_loader import load_dataset, to_model_range, to_uint8
from utils.files import load_images

MODES = ("digits", "inpaint", "reconstruct", "interpolate")
# Their samplers: RePaint for pictures, and one without noise where the start alone is to decide
MODE_SAMPLERS = {"inpaint": "repaint", "reconstruct": "unipc", "interpolate": "unipc"}
OPTIONS = {"eta": ("ddim", "dpmpp_2m_sde"), "churn": ("heun",)}  # and the samplers that have them
GREY = 96  # shown where a picture is to be completed


def pick_labels(net: nn.Module, count: int, seed: int) -> Tensor | None:
    """Labels (count,) for a class-conditional network; None for another.

    They come as often as in the training data, so that the samples are drawn from the whole
    distribution p(x) = sum p(y) p(x | y). Label k of a seed is the same whatever the count.
    """
    if not net.num_classes:
        return None
    shares = net.condition.label_shares.double().cpu().numpy()
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.choice(net.num_classes, count, p=shares / shares.sum()))


def wanted_labels(cfg: SampleConfig, net: nn.Module) -> list[int]:
    """The classes that --label, --labels or --digits ask for. Raises UserError on bad ones."""
    asked = [name for name in ("label", "labels", "digits") if getattr(cfg, name) is not None]
    if not asked:
        return []
    name, value = asked[0], getattr(cfg, asked[0])
    if len(asked) > 1:
        raise UserError(f"--{name} and --{asked[1]}: only one of them can choose the classes")
    if not net.num_classes:
        raise UserError(f"--{name} {value}: this model is unconditional and takes no label")
    parts = value.split(",") if name == "labels" else list(str(value))
    if not parts or not set(parts) <= set("0123456789"):
        form = "like 0,1,2" if name == "labels" else "like 31415926"
        raise UserError(f"--{name} {value}: must be digits from 0 to 9, {form}")
    return [int(part) for part in parts]


@dataclass
class Plan:
    """What to draw and how to show it.

    Attributes:
        count: of images.
        labels: (count,), or None for an unconditional draw.
        sampler, options: its name, and its own arguments.
        start: (count, 1, 28, 28) noise to begin with, or None for the seed's.
        above: pictures (count, 1, 28, 28) uint8 to show above the drawn ones, a row each.
        columns: of the grid; None for a square one.
        padding: pixels between images.
    """

    count: int
    labels: Tensor | None
    sampler: str
    options: dict
    start: Tensor | None = None
    above: list[Tensor] = field(default_factory=list)
    columns: int | None = None
    padding: int = 2


def make_plan(
    cfg: SampleConfig, trained: TrainConfig, diffusion: Diffusion, net: nn.Module
) -> Plan:
    """Read from the flags what to draw. Raises UserError where they do not fit together."""
    modes = [name for name in MODES if getattr(cfg, name) is not None]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: only one of them at a time")
    if (cfg.mask is None) != (cfg.inpaint is None):
        raise UserError("--inpaint and --mask: each needs the other")
    sampler = cfg.sampler or MODE_SAMPLERS.get("".join(modes), SAMPLER)
    own = {}
    for name, samplers in OPTIONS.items():
        value = getattr(cfg, name)
        if sampler in samplers and value is not None:
            own[name] = value
        elif value:
            raise UserError(f"--{name} {value:g}: only --sampler {' or '.join(samplers)} has it")

    wanted = wanted_labels(cfg, net)
    count = len(wanted) if cfg.digits else cfg.num_samples
    pictures = None
    if cfg.inpaint or cfg.reconstruct:
        pictures = load_pictures(cfg, trained)
        count = len(pictures)
    if wanted:
        labels = torch.tensor(wanted).repeat(-(-count // len(wanted)))[:count]
    else:  # of given pictures, and of what lies between two seeds, no class is known
        labels = pick_labels(net, count, cfg.seed) if not modes else None
    if cfg.guidance not in (None, 1) and labels is None:
        why = "no class is asked for" if net.num_classes else "this model is unconditional"
        raise UserError(f"--guidance {cfg.guidance:g}: {why}; must be 1")

    plan = Plan(count, labels, sampler, own)
    if cfg.digits:
        plan.columns, plan.padding = count, 0
    elif cfg.interpolate:
        plan_interpolation(plan, cfg)
    elif cfg.inpaint:
        plan_inpainting(plan, cfg, pictures)
    elif cfg.reconstruct:
        plan_reconstruction(plan, cfg, pictures, diffusion, net)
    return plan


def load_pictures(cfg: SampleConfig, trained: TrainConfig) -> Tensor:
    """The pictures (N, 1, 28, 28) uint8 that --inpaint or --reconstruct name, at most num_samples.

    A single one to complete comes num_samples times, to be completed in as many ways.
    """
    flag, source = ("inpaint", cfg.inpaint) if cfg.inpaint else ("reconstruct", cfg.reconstruct)
    if source == "test":
        return load_dataset(trained.dataset, cfg.data_dir, "test")[0][: cfg.num_samples]
    images = load_sized(source, flag)
    if len(images) == 1 and cfg.inpaint:
        return images.repeat(cfg.num_samples, 1, 1, 1)
    return images[: cfg.num_samples]


def load_sized(source: str, flag: str) -> Tensor:
    """One or more pictures (N, 1, 28, 28) uint8. Raises UserError where not of this size."""
    images = load_images(Path(source), f"--{flag}", at_least=1)
    if images.shape[2:] != (IMAGE_SIZE, IMAGE_SIZE):
        size = " x ".join(map(str, images.shape[2:]))
        raise UserError(f"--{flag} {source}: is {size} pixels, must be {IMAGE_SIZE} x {IMAGE_SIZE}")
    return images


def load_mask(mask: str) -> Tensor:
    """(1, 28, 28) bool, true where to draw: a half, or where a PNG is brighter than middle grey."""
    missing = torch.zeros(1, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.bool)
    if mask in HALVES:
        start = 0 if mask in ("left", "top") else IMAGE_SIZE // 2
        dim = 2 if mask in ("left", "right") else 1
        missing.narrow(dim, start, IMAGE_SIZE // 2).fill_(True)
        return missing
    if Path(mask).suffix.lower() != ".png":
        raise UserError(f"--mask {mask}: must be one of {', '.join(HALVES)}, or a PNG file")
    return load_sized(mask, "mask")[0] > 127


def plan_inpainting(plan: Plan, cfg: SampleConfig, pictures: Tensor) -> None:
    """Rows: the picture, what is known of it, what is drawn."""
    if cfg.sampler:
        raise UserError(f"--sampler {cfg.sampler}: --inpaint has a sampler of its own, RePaint")
    missing = load_mask(cfg.mask).expand_as(pictures)
    plan.above, plan.columns = [pictures, pictures.masked_fill(missing, GREY)], plan.count
    plan.options = {"known": to_model_range(pictures), "missing": missing}


def plan_interpolation(plan: Plan, cfg: SampleConfig) -> None:
    """A row from image 0 of one seed to image 0 of another, along a great circle of the noise."""
    need_determinism(plan, "interpolate")
    parts = cfg.interpolate.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise UserError(f"--interpolate {cfg.interpolate}: must be two seeds, like 3,4")
    shape = (1, IMAGE_SIZE, IMAGE_SIZE)
    ends = [ImageNoise(int(part), range(1), shape, torch.device("cpu"))() for part in parts]
    plan.start, plan.columns = slerp(*ends, plan.count), plan.count


def slerp(a: Tensor, b: Tensor, count: int) -> Tensor:
    """`count` noises from a to b (1, C, H, W), both included, evenly along the arc (Shoemake 1985).

    Unlike those on a straight line, all of them are as long as noise is.
    """
    share = torch.linspace(0, 1, count).view(-1, 1, 1, 1)
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))  # of equal noises too
    return (a * torch.sin((1 - share) * angle) + b * torch.sin(share * angle)) / torch.sin(angle)


def plan_reconstruction(
    plan: Plan, cfg: SampleConfig, pictures: Tensor, diffusion: Diffusion, net: nn.Module
) -> None:
    """Rows: the picture, the noise that it is encoded into, what is drawn from that noise."""
    need_determinism(plan, "reconstruct")
    steps = check_steps(cfg.steps, plan.sampler, diffusion.schedule.timesteps)
    if steps < 2:
        raise UserError(f"--steps {steps}: must be at least 2 for --reconstruct")
    plan.start = encode_images(
        diffusion,
        net,
        pictures,
        steps=steps,
        spacing=cfg.spacing or SAMPLERS[plan.sampler].spacing,
        labels=plan.labels,
        guidance=cfg.guidance,
        guided=(cfg.guided_from, cfg.guided_to),
        batch_size=cfg.batch_size,
        precision=cfg.precision,
    )
    plan.above, plan.columns = [pictures, to_uint8(plan.start / 3)], plan.count


def need_determinism(plan: Plan, flag: str) -> None:
    if any(plan.options.values()) or plan.sampler in ("ddpm", "dpmpp_2m_sde"):
        raise UserError(f"--sampler {plan.sampler}: --{flag} needs one without noise of its own")
