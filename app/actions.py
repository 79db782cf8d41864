"""The actions of the page, as plain methods that work without it. Pictures are uint8."""

import random
import time
from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import center_of_mass
from torch import Tensor

from config import HALVES, PRETRAINED, AppConfig, SampleConfig, SamplingConfig, UserError, check
from models.diffusion import Watch
from models.trained import TrainedModel, load_trained
from sampling.draw import count_evaluated, resolve, sample_images
from sampling.requests import GREY, MODE_SAMPLERS, Plan, load_mask, make_plan
from scoring.classifier import DigitClassifier, load_classifier
from scoring.diffusion_classifier import LEVELS, diffusion_classifier
from utils.data_loader import DIGITS, load_dataset, to_model_range, to_uint8
from utils.device import pick_device
from utils.visualization import enlarged, make_grid

DISTILLED = "U-Net, distilled"
NETWORKS = {DISTILLED: "unet_fewstep", "U-Net": "unet", "ResNet": "resnet", "SimpleCNN": "cnn"}
CANVAS = 280  # pixels a side
DRAWN, BETWEEN, COMPLETIONS = 64, 10, 8  # images


class Actions:
    """The shipped networks, and what can be done with them. Methods raise UserError on bad input.

    `network` is one of NETWORKS, `digit` a class name, `canvas` (S, S, 4) a drawing by hand.
    A `line` reports the time and the network calls of an action.
    """

    def __init__(self, cfg: AppConfig):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.model = cache(self.model)  # loaded on first use

    def model(self, network: str) -> tuple[TrainedModel, list[int]]:
        """The model, and the number of images that each of its calls evaluated."""
        path = PRETRAINED / f"{NETWORKS[network]}.pth"
        model = load_trained(path, self.device)
        return model, count_evaluated(model.net)

    @cached_property
    def test_digits(self) -> Tensor:
        """The test images, (N, 1, 28, 28)."""
        return load_dataset(self.cfg.dataset, self.cfg.data_dir, "test").images

    def test_digit(self) -> Image.Image:
        """A random test digit, for a canvas."""
        return enlarged(random.choice(self.test_digits), CANVAS // 28).convert("RGBA")

    def run(self, network: str, plan: Plan, watch: Watch | None = None) -> tuple[Tensor, str]:
        """Draw what `plan` says: images (N, 1, 28, 28), and a line."""
        model, evaluated = self.model(network)
        evaluated.clear()
        start = time.perf_counter()
        options = {"labels": plan.labels, "start": plan.start, "given": plan.given, "watch": watch}
        images = torch.cat(list(sample_images(model, plan.count, plan.sampling, **options)))
        seconds, calls = time.perf_counter() - start, sum(evaluated) / plan.count
        return images, f"{plan.count} images in {seconds:.2f} s, network calls for each: {calls:g}"

    def ask(self, network: str, watch: Watch | None = None, **flags) -> tuple[Tensor, str]:
        """Draw what `generate.py` would draw with these flags."""
        plan = make_plan(check(SampleConfig(**flags)), self.model(network)[0])
        return self.run(network, plan, watch)

    def draw(
        self, network: str, number: str, seed: int, steps: int, guidance: float
    ) -> tuple[Image.Image, str]:
        """64 digits, or a number as often as it fits in 64 images; and a line."""
        if len(number) > DRAWN:
            raise UserError(f"the number has {len(number)} digits: at most {DRAWN} can be drawn")
        row = len(number) if len(number) > 1 else 8
        flags = {"labels": ",".join(number) or None, "num_samples": DRAWN // row * row}
        images, line = self.ask(network, seed=seed, steps=steps, guidance=guidance, **flags)
        return enlarged(make_grid(images, row), 3), line

    def between(self, network: str, digit: str, first: int, last: int) -> tuple[Image.Image, str]:
        """Images from one seed to another, both ends included; and a line."""
        seeds = f"{first},{last}"
        images, line = self.ask(network, label=digit, interpolate=seeds, num_samples=BETWEEN)
        return enlarged(make_grid(images, BETWEEN), 4), line

    def path(self, network: str, digit: str, **flags) -> list[tuple[float, Image.Image]]:
        """One image's path: for each network call, sigma and x_t, x0_hat, eps_hat side by side.

        The noise eps_hat = (x - x0_hat) / sigma is shown at a third of its strength.
        """
        calls = []

        def watch(x: Tensor, sigma: Tensor, x0_hat: Tensor) -> None:
            x_t, eps_hat = x / float((1 + sigma**2).sqrt()), (x - x0_hat) / float(sigma)
            images = to_uint8(torch.cat([x_t, x0_hat, eps_hat / 3]))
            calls.append((float(sigma), enlarged(make_grid(images, 3), 6)))

        self.ask(network, watch, label=digit, num_samples=1, **flags)
        return calls

    def complete(
        self, network: str, canvas: np.ndarray, where: str, seed: int, report: Callable
    ) -> tuple[Image.Image, str]:
        """The known part of a digit, then completions of it; and a line.

        The missing part is the half that `where` names, or what is painted red on the canvas.
        `report` is called with the fraction of the work done.
        """
        model, _ = self.model(network)
        digit, missing = read_canvas(canvas)
        missing = load_mask(where, model.data) if where in HALVES else missing
        if not missing.any():
            raise UserError("nothing is missing: choose a half, or paint the missing part red")
        sampling = resolve(check(SamplingConfig(seed=seed)), model, MODE_SAMPLERS["inpaint"])
        schedule = model.diffusion.schedule
        known = to_model_range(digit.repeat(COMPLETIONS, 1, 1, 1))
        plan = Plan(COMPLETIONS, None, sampling)
        plan.given = {"known": known, "missing": missing.expand_as(known)}

        def watch(x: Tensor, sigma: Tensor, x0_hat: Tensor) -> None:
            report(1 - float(schedule.t_at(sigma)) / schedule.timesteps)

        images, line = self.run(network, plan, watch)
        images = torch.cat([digit.masked_fill(missing, GREY)[None], images])
        return enlarged(make_grid(images, 3), 4), line

    def opinions(self, network: str, canvas: np.ndarray) -> tuple[Image.Image, dict, dict, str]:
        """A digit as the judges see it, each judge's class probabilities, and a line.

        The judges are the classifier, and the diffusion model itself.
        """
        digit, start = centred(canvas), time.perf_counter()
        with torch.inference_mode():
            _, logits = load_classifier(self.device)(digit[None].to(self.device).float() / 255)
        own = diffusion_classifier(self.model(network)[0], digit[None])[0]
        line = f"{len(LEVELS) * len(own)} calls of {network}, {time.perf_counter() - start:.2f} s"
        judges = (logits[0].softmax(dim=0), own)
        return (
            enlarged(digit, 6),
            *(dict(zip(DIGITS, p.tolist(), strict=True)) for p in judges),
            line,
        )


def flat(canvas: np.ndarray) -> Image.Image:
    """The canvas as RGB, on a black background."""
    picture = Image.fromarray(canvas)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("RGB")


def read_canvas(canvas: np.ndarray) -> tuple[Tensor, Tensor]:
    """The digit (1, 28, 28) on a canvas (S, S, 4), and a bool mask of what is painted red."""
    small = flat(canvas).resize(DigitClassifier.shape[1:], Image.Resampling.BOX)
    red, green = (torch.from_numpy(np.array(small.getchannel(name)))[None] for name in "RG")
    return green, red.int() - green.int() > 64


def centred(canvas: np.ndarray) -> Tensor:
    """The digit (1, 28, 28) on a canvas (S, S, 4), placed as MNIST places digits.

    Its longer side is 20 pixels, and its centre of mass is in the middle (LeCun et al. 1998).
    """
    picture = flat(canvas).getchannel("G")
    box = picture.getbbox()
    if box is None:
        raise UserError("the canvas is empty: draw a digit first")
    scale = 20 / max(box[2] - box[0], box[3] - box[1])
    size = [max(1, round(scale * (box[i + 2] - box[i]))) for i in (0, 1)]
    picture = picture.resize(size, box=box)
    row, column = center_of_mass(np.asarray(picture))
    placed = Image.new("L", DigitClassifier.shape[1:])
    placed.paste(picture, (round(13.5 - column), round(13.5 - row)))
    return torch.from_numpy(np.array(placed))[None]
