"""Bits per dimension of a trained model, from the bounds in `scoring.likelihood` and the flow."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from config import UserError
from models.trained import TrainedModel
from scoring.decoder import BIN, Decoder
from scoring.likelihood import (
    DRAWS,
    FITTED_ON,
    Bound,
    Denoise,
    Likelihood,
    denoiser_of,
    flow_log_density,
)
from scoring.yardstick import image_hash
from utils.data_loader import Dataset, to_model_range
from utils.random import Stream, generator, random_order

FLOW_BATCH = 50  # images solved together, as one system of equations


def some(data: Dataset, count: int, seed: int, labelled: bool) -> tuple[Tensor, Tensor | None]:
    """At most `count` images and labels, picked at random because files may be sorted."""
    chosen = random_order(len(data.images), seed)[:count]
    return data.images[chosen], data.labels[chosen] if labelled else None


def per_dim(nats: Tensor, size: int) -> tuple[float, float]:
    """Mean bits per dimension and its standard error, from nats (N,) of images of `size` values."""
    bits = nats.double() / math.log(2) / size
    return bits.mean().item(), (bits.var(correction=0) / max(len(bits) - 1, 1)).sqrt().item()


def measure(
    model: TrainedModel,
    train: Dataset,
    test: Dataset,
    *,
    count: int,
    flow: int,
    seed: int,
    precision: str,
    batch_size: int | None = None,
) -> dict:
    """The content of the JSON file: bits/dim of `count` test images, in total and by part.

    Each figure has an `_error`, its standard error over images. The first `flow` images are also
    measured with the probability flow. Raises UserError for a distilled network.
    """
    if model.few_step:
        raise UserError(
            "--likelihood: a distilled network denoises at only a few levels, but the bound needs"
            " all of them; must be a network that was not distilled"
        )
    labelled, size = model.net.num_classes > 0, math.prod(model.data.shape)
    known, told = some(train, FITTED_ON, seed, labelled)
    images, labels = some(test, count, seed, labelled)
    denoise = denoiser_of(model, precision)
    options = {"seed": seed, "device": model.device, "batch_size": batch_size}
    fitted = Likelihood(denoise, model.diffusion.schedule.sigmas, known, told, **options)
    sigmas = fitted.levels.sigmas
    bound = fitted.bound(images, labels)
    label = label_nats(model, labels, len(images))
    found = {"n": len(images), "reference_hash": image_hash(images), "seed": seed}
    found |= {"draws": DRAWS, "levels": len(sigmas), "decoded_from_sigma": sigmas[0].item()}
    found |= in_bits(figures(bound, label), size)
    found["by_level"] = by_level(bound, sigmas, size)
    if flow:
        denoise = denoiser_of(model, "fp32")  # the solver would track bfloat16 rounding errors
        own = generator(Stream.NOISE, seed, 1)
        part = slice(0, flow)
        y = None if labels is None else labels[part]
        nats = flow_nats(denoise, fitted.decoder, sigmas, images[part], y, own, model.device)
        nats = {name: value + label[part] for name, value in nats.items()}
        nats["flow_minus_bound"] = nats["flow"] - figures(bound, label)["bits_per_dim"][part]
        found |= in_bits(nats, size) | {"n_flow": len(nats["flow"])}
    return found


def in_bits(nats: dict[str, Tensor], size: int) -> dict[str, float]:
    """Each figure in bits per dimension, and its `_error`, the standard error over images."""
    found = {}
    for name, values in nats.items():
        found[name], found[f"{name}_error"] = per_dim(values, size)
    return found


def label_nats(model: TrainedModel, labels: Tensor | None, count: int) -> Tensor:
    """-log of the label's share, (N,): p(x) >= p(y) p(x | y). 0 for an unconditional network."""
    if labels is None:
        return torch.zeros(count).double()
    shares = torch.tensor(model.data.label_shares).double()
    return -(shares / shares.sum()).log()[labels]


def figures(bound: Bound, label: Tensor) -> dict[str, Tensor]:
    """The reported figures, in nats for each image."""
    around = bound.prior + bound.reconstruction
    return {
        "bits_per_dim": around + bound.diffusion + label,
        "bits_per_dim_given_label": around + bound.diffusion,
        "bits_per_dim_discrete": around + bound.diffusion_discrete + label,
        "prior": bound.prior,
        "diffusion": bound.diffusion,
        "diffusion_discrete": bound.diffusion_discrete,
        "reconstruction": bound.reconstruction,
        "reconstruction_alone": bound.reconstruction_alone,
        "label": label,
    }


def by_level(bound: Bound, sigmas: Tensor, size: int) -> list[dict]:
    """The diffusion integral, split into half octaves of sigma that sum to it."""
    octave = ((bound.sigmas / sigmas[0]).log2() * 2).long()
    bits = torch.zeros(int(octave.max()) + 1, dtype=torch.float64)
    bits.index_add_(0, octave.flatten(), bound.paid.flatten() / math.log(2) / size)
    low = [sigmas[0].item() * 2 ** (k / 2) for k in range(len(bits))]
    return [
        {"from": sigma, "to": sigma * 2**0.5, "bits_per_dim": paid}
        for sigma, paid in zip(low, (bits / len(bound.paid)).tolist(), strict=True)
    ]


def flow_nats(
    denoise: Denoise,
    decoder: Decoder,
    sigmas: Tensor,
    images: Tensor,
    labels: Tensor | None,
    own: torch.Generator,
    device: torch.device,
) -> dict[str, Tensor]:
    """Two upper bounds on -log p(image), each (N,), from the density of the flow.

    `flow` replaces the prior and diffusion parts with the flow's density and keeps the decoder:
    -log p(k) <= E log q(z_0 | k) - log p(z_0) - log p(k | z_0).  This makes it comparable with
    the variational bound. `flow_uniform` adds uniform noise one grey level wide, as normalising
    flows do (Theis et al. 2016). It is high unless the lowest sigma is far below that width;
    otherwise the density is too smooth for pixels that are exactly black.
    """
    found = {"flow": [], "flow_uniform": []}
    lowest = float(sigmas[0])
    with tqdm(total=len(images), desc="following the flow", unit="img") as bar:
        for rows in torch.arange(len(images)).split(FLOW_BATCH):
            x, size = to_model_range(images[rows]), images[0].numel()
            eps = torch.randn(x.shape, generator=own)
            u = torch.rand(x.shape, generator=own) - 0.5
            y = None if labels is None else labels[rows].to(device)

            def density(z: Tensor, y=y) -> Tensor:
                return flow_log_density(denoise, z.to(device), y, sigmas, own)

            z = x + lowest * eps
            with torch.inference_mode():
                x_hat = denoise(z.to(device), sigmas[:1].expand(len(z)), y).cpu()
            squares = eps.square().flatten(1).sum(1)
            noise = -(squares + size * math.log(2 * math.pi * lowest**2)) / 2  # log q(z_0 | k)
            decoded = decoder.nats(x_hat, images[rows])[0]
            found["flow"].append(noise - density(z) + decoded)
            found["flow_uniform"].append(-density(x + BIN * u) - size * math.log(BIN))
            bar.update(len(rows))
    return {name: torch.cat(parts) for name, parts in found.items()}


def print_bits(found: dict) -> None:
    """Print the parts and their sums."""

    def line(text: str, *names: str) -> None:
        cells = [f"{found[name]:.4f} ± {found[f'{name}_error']:.4f}" for name in names]
        print(f"{text:28}" + "".join(f"{cell:>20}" for cell in cells))

    print(f"{found['n']} test images, decoded from sigma {found['decoded_from_sigma']:.4f}")
    print(f"\n{'bits/dim':28}{'continuous time':>20}{str(found['levels']) + ' levels':>20}")
    line("prior", "prior", "prior")
    line("diffusion", "diffusion", "diffusion_discrete")
    line("reconstruction", "reconstruction", "reconstruction")
    if found["label"]:
        line("label", "label", "label")
    line("total (upper bound)", "bits_per_dim", "bits_per_dim_discrete")
    if found["label"]:
        line("  given the label", "bits_per_dim_given_label")
    if "flow" in found:
        print(f"\nprobability flow, {found['n_flow']} images")
        line("same decoder", "flow")
        line("  minus their upper bound", "flow_minus_bound")
        line("uniform dequantisation", "flow_uniform")
