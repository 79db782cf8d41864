"""Draw images from a trained model: settings, noise per image, batches, several processes."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import FEW_STEP_SAMPLER, GUIDANCE, GUIDED, SAMPLER, SamplingConfig, UserError
from models.diffusion import Denoiser, Watch
from models.trained import TrainedModel
from sampling.samplers import INPAINTERS, SAMPLERS, Sampler, encode
from utils import distributed
from utils.data_loader import to_model_range, to_uint8
from utils.device import autocast, sampling_batch
from utils.graphs import Graphed
from utils.random import ImageNoise, draw_labels

OF_SAMPLER = ("steps", "spacing", "eta", "churn")  # mean nothing for another sampler


def sampler_of(sampling: SamplingConfig) -> Sampler:
    return (SAMPLERS | INPAINTERS)[sampling.sampler]


def resolve(
    asked: SamplingConfig, model: TrainedModel, default_sampler: str | None = None
) -> SamplingConfig:
    """`asked` with every None filled in: from the checkpoint, else from the sampler's defaults.

    The checkpoint's steps, spacing, eta and churn apply only to its own sampler. eta and churn
    stay None for a sampler without that option. Raises UserError if a value does not fit the
    sampler or the model.
    """
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(SamplingConfig)}
    carried = dict(model.sampling)
    usual = SAMPLER
    if model.few_step:
        check_few_step(asked)
        usual = default_sampler = FEW_STEP_SAMPLER
    name = values["sampler"] or default_sampler or carried.get("sampler", usual)
    if name != carried.get("sampler", usual):
        carried = {key: value for key, value in carried.items() if key not in OF_SAMPLER}
    sampler, timesteps = (SAMPLERS | INPAINTERS)[name], model.diffusion.schedule.timesteps
    defaults = {
        "steps": min(sampler.steps or timesteps, timesteps),
        "spacing": sampler.spacing,
        "eta": sampler.eta,
        "churn": sampler.churn,
        "guidance": GUIDANCE if model.can_be_guided else 1.0,
        "guided_from": GUIDED[0],
        "guided_to": GUIDED[1],
        "batch_size": sampling_batch(model.device),
    }
    for key, default in defaults.items():
        if values[key] is None:
            values[key] = carried.get(key, default)
    resolved = SamplingConfig(**values | {"sampler": name})
    if resolved.guidance != 1 and model.needs_label:
        raise UserError(
            f"--guidance {resolved.guidance:g}: this network was trained with --label_dropout 0;"
            " must be 1"
        )
    return _check(resolved, timesteps)


def check_few_step(asked: SamplingConfig) -> None:
    """Raises UserError if a distilled network cannot be sampled as asked."""
    if asked.sampler not in (None, FEW_STEP_SAMPLER):
        raise UserError(
            f"--sampler {asked.sampler}: must be {FEW_STEP_SAMPLER} for a distilled network"
        )
    if asked.guidance not in (None, 1):
        raise UserError(
            f"--guidance {asked.guidance:g}: a distilled network cannot be guided; must be 1"
        )


def _check(sampling: SamplingConfig, timesteps: int) -> SamplingConfig:
    """`sampling` without the options that its sampler lacks. Raises UserError on bad values."""
    if sampling.steps > timesteps:
        raise UserError(f"--steps {sampling.steps}: must be an integer >= 1 and <= T = {timesteps}")
    low, high = sampling.guided_from, sampling.guided_to
    if low > high:
        raise UserError(f"--guided_from {low:g}: must be a number <= --guided_to = {high:g}")
    for option in ("eta", "churn"):
        value = getattr(sampling, option)
        if value is not None and getattr(sampler_of(sampling), option) is None:
            if value:
                having = sorted(k for k, s in SAMPLERS.items() if getattr(s, option) is not None)
                raise UserError(
                    f"--{option} {value:g}: only --sampler {' or '.join(having)} supports it"
                )
            sampling = dataclasses.replace(sampling, **{option: None})
    return sampling


def draws_noise(sampling: SamplingConfig) -> bool:
    """True if the starting noise alone does not determine the images."""
    between_steps = (sampler_of(sampling).noisy or sampling.eta) and sampling.steps > 1
    return bool(between_steps or sampling.churn)


def sampler_options(sampling: SamplingConfig) -> dict[str, float]:
    """The arguments of the sampler's function that `sampling`, once resolved, decides."""
    options = {name: getattr(sampling, name) for name in ("eta", "churn")}
    return {name: value for name, value in options.items() if value is not None}


def labels_for(model: TrainedModel, count: int, seed: int) -> Tensor | None:
    """Labels (count,) int64 for a class-conditional model, None for an unconditional one.

    Each label is as frequent as in the training data, so the samples come from the whole
    distribution p(x) = sum p(y) p(x | y). Label k of a seed does not depend on the count.
    """
    if not model.net.num_classes:
        return None
    return draw_labels(seed, range(count), torch.tensor(model.data.label_shares))


@torch.inference_mode()
def sample_images(
    model: TrainedModel,
    count: int,
    asked: SamplingConfig,
    *,
    labels: Tensor | None = None,
    start: Tensor | None = None,
    given: dict[str, Tensor] | None = None,
    share: tuple[int, int] = (0, 1),
    watch: Watch | None = None,
) -> Iterator[Tensor]:
    """Draw images 0..count-1 of the seed, in batches (B, C, H, W) uint8 on the CPU.

    Args:
        asked: how to sample; `resolve` fills in what it leaves open.
        labels: (count,) int64, or None for an unconditional draw.
        start: (count, C, H, W) standard normal, to start from in place of the seed's noise.
        given: extra tensors for the sampler, with one entry per image.
        share: (r, R) draws only the batches numbered r, r + R, r + 2R, ...
        watch: called as watch(x, sigma, x0_hat) after each prediction for the first batch.
    """
    sampling, device = resolve(asked, model), model.device
    sigmas = model.diffusion.schedule.sampling_sigmas(sampling.steps, sampling.spacing)
    options = sampler_options(sampling)
    size = sampling.batch_size
    recorded = dataclasses.replace(model, net=Graphed(model.net))
    for first in range(share[0] * size, count, share[1] * size):
        numbers = range(first, min(first + size, count))

        def part(values: Tensor | None, numbers=numbers) -> Tensor | None:
            return None if values is None else values[numbers].to(device)

        # recording a batch's calls pays off from the second batch of that size
        called = recorded if len(numbers) == size < count else model
        denoise = guided_denoiser(
            called, part(labels), sampling, sigmas, watch if not first else None
        )
        noise = ImageNoise(sampling.seed, numbers, model.data.shape, device)
        x = noise() if start is None else part(start)
        x = x * float((1 + sigmas[0] ** 2).sqrt())  # x0 is unknown: give it unit variance
        own = {name: part(values) for name, values in (given or {}).items()}
        with autocast(device, sampling.precision):  # for the network; samplers stay in float32
            x0 = sampler_of(sampling).function(denoise, x, sigmas, noise, **options, **own)
        yield to_uint8(x0).cpu()


def guided_denoiser(
    model: TrainedModel,
    labels: Tensor | None,
    sampling: SamplingConfig,
    sigmas: Tensor,
    watch: Watch | None = None,
) -> Denoiser:
    """The model's denoiser for labels (B,) and decreasing levels `sigmas`, guided as asked."""
    guidance = partial(guidance_at, sampling=sampling, sigmas=sigmas)
    return model.diffusion.denoiser(model.net, labels, guidance, watch)


def guidance_at(sigma: Tensor, sampling: SamplingConfig, sigmas: Tensor) -> float:
    """The guidance scale for the step from noise level sigma to the next lower one of `sigmas`.

    A scale above 1 applies between `guided_from` and `guided_to`: above this interval, guidance
    reduces variety, and below it changes little (Kynkäänniemi et al. 2024). A step is guided in
    proportion to the share of it, in log sigma, that lies inside. The total amount of guidance
    therefore does not depend on where the levels fall.
    """
    if sampling.guidance <= 1:
        return sampling.guidance
    # Churn raises sigma above the step's level. If that exceeds the level before, `reached` begins
    # there, and the share is that of the way down to the step's own level.
    reached = sigmas[sigmas <= sigma]
    below = reached[reached < reached.max()] if len(reached) else reached
    top, bottom = float(sigma), float(below.max()) if len(below) else 0.0
    if bottom == 0:  # the last step, infinitely long in log sigma
        inside = float(sampling.guided_from <= top <= sampling.guided_to)
    else:
        high, low = min(top, sampling.guided_to), max(bottom, sampling.guided_from)
        inside = math.log(high / low) / math.log(top / bottom) if high > low else 0.0
    return 1 + (sampling.guidance - 1) * inside


def draw_images(
    model: TrainedModel, count: int, asked: SamplingConfig, what: str, **options: Any
) -> Tensor:
    """All images (count, C, H, W) uint8 of `sample_images`; a progress bar is labelled `what`.

    If there are several processes, each draws a share of the batches, and each returns all images.
    """
    parts, share = [], (distributed.rank(), distributed.size())
    with tqdm(total=count, desc=what, unit="img", disable=share[0] > 0) as bar:
        for batch in sample_images(model, count, asked, share=share, **options):
            parts.append(batch)
            bar.update(min(len(batch) * share[1], count - bar.n))
    return torch.cat(distributed.interleave(parts))


@torch.inference_mode()
def encode_images(
    model: TrainedModel, images: Tensor, asked: SamplingConfig, labels: Tensor | None = None
) -> Tensor:
    """Images (N, C, H, W) uint8 -> the noise from which `sample_images(start=noise)` draws them.

    Use the same settings there; the more steps, the closer the images are to the originals.
    """
    sampling, device = resolve(asked, model), model.device
    sigmas = model.diffusion.schedule.sampling_sigmas(sampling.steps, sampling.spacing)
    parts = []
    for numbers in torch.arange(len(images)).split(sampling.batch_size):
        y = None if labels is None else labels[numbers].to(device)
        with autocast(device, sampling.precision):
            x0 = to_model_range(images[numbers].to(device))
            x = encode(guided_denoiser(model, y, sampling, sigmas), x0, sigmas)
        parts.append((x / float((1 + sigmas[0] ** 2).sqrt())).cpu())
    return torch.cat(parts)


def count_evaluated(net: nn.Module) -> list[int]:
    """A list to which each future call of `net` appends how many images it evaluates."""
    evaluated: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: evaluated.append(len(output)))
    return evaluated


class PathRecorder:
    """Records x_t and x0_hat of the first images of a batch; for `sample_images(watch=...)`."""

    def __init__(self, images: int):
        self.images = images
        self.calls: list[Tensor] = []  # (images, 2, C, H, W) uint8

    def __call__(self, x: Tensor, sigma: Tensor, x0_hat: Tensor) -> None:
        x_t = x / float((1 + sigma**2).sqrt())
        both = torch.stack([x_t[: self.images], x0_hat[: self.images]], dim=1)
        self.calls.append(to_uint8(both).cpu())

    def frames(self) -> Tensor:
        """(network calls, images, 2, C, H, W) uint8: x_t and x0_hat."""
        return torch.stack(self.calls)
