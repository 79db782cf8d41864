"""A diffusion model as a classifier: it picks the label that helps most to remove noise."""

import math

import torch
from torch import Tensor

from config import UserError
from models.trained import TrainedModel
from utils.data_loader import to_model_range
from utils.device import autocast, sampling_batch
from utils.random import ImageNoise

# Noise levels sigma where labels matter: less noise is removed equally well under every label, and
# more hides the digit. Each level has its own noise; only the mean over many levels is reliable.
LEVELS = tuple(torch.logspace(math.log10(1.5), math.log10(9), 24).tolist())


@torch.inference_mode()
def denoising_errors(
    model: TrainedModel, images: Tensor, levels: tuple[float, ...] = LEVELS, seed: int = 0
) -> Tensor:
    """The error of the predicted noise of images under each label: (N, classes), float64.

    |eps - eps_hat(x, sigma, label)|^2, summed over pixels, averaged over `levels`. All labels see
    the same noise, so errors differ only because of the label (Li et al. 2023, section 3.2).
    Takes len(levels) * classes network calls per image.

    Args:
        images: (N, C, H, W) uint8.
        levels: noise levels sigma.
        seed: of the noise.
    """
    if model.few_step or not model.net.num_classes:
        lacks = "a distilled one" if model.few_step else "one without labels"
        raise UserError(f"a diffusion classifier needs a class-conditional network, not {lacks}")
    classes, device, parts = model.net.num_classes, model.device, []
    for numbers in torch.arange(len(images)).split(max(1, sampling_batch(device) // classes)):
        x0 = to_model_range(images[numbers].to(device))
        labels = torch.arange(classes, device=device).repeat(len(x0))
        denoise = model.diffusion.denoiser(model.net, labels)
        span = range(int(numbers[0]), int(numbers[-1]) + 1)
        noise = ImageNoise(seed, span, model.data.shape, device)
        errors = torch.zeros(len(labels), dtype=torch.float64)
        for level in torch.tensor(levels, dtype=torch.float64):
            eps = noise().repeat_interleave(classes, dim=0)
            clean = x0.repeat_interleave(classes, dim=0)
            with autocast(device, "auto"):
                x0_hat = denoise(clean + float(level) * eps, level)
            # eps - eps_hat = (x0_hat - x0) / sigma
            squares = ((x0_hat - clean) / float(level)).flatten(1).square()
            errors += squares.sum(dim=1).cpu().double()
        parts.append((errors / len(levels)).view(-1, classes))
    return torch.cat(parts)


def diffusion_classifier(model: TrainedModel, images: Tensor, **options) -> Tensor:
    """Probabilities (N, classes) of the labels of images (N, C, H, W) uint8.

    The softmax of minus `denoising_errors` (Li et al. 2023, eq. 5), which takes the same options.
    Up to a factor and a constant, the error bounds -log p(image | label); all labels are equally
    likely beforehand.
    """
    return (-denoising_errors(model, images, **options)).softmax(dim=1)
