"""Draw images from a trained model: `python generate.py` uses the shipped U-Net.

Architecture and noise schedule come from the checkpoint, never from flags.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import SampleConfig, TrainConfig, UserError, parse, run
from models import build_diffusion, build_model
from models.diffusion import Denoiser, Diffusion
from models.samplers import check_steps, sample_images
from utils.checkpoint import load_checkpoint, load_weights
from utils.data_loader import to_uint8
from utils.device import pick_device
from utils.files import writable_folder, write_atomically
from utils.visualization import make_grid, save_png

STRIP_ROWS, STRIP_COLUMNS = 8, 12


def load_model(path: str, device, flag="--checkpoint") -> tuple[TrainConfig, Diffusion, nn.Module]:
    """The config, the process and the averaged network that a checkpoint describes."""
    checkpoint = load_checkpoint(Path(path), flag)
    cfg = checkpoint["config"]
    net = build_model(cfg)
    load_weights(net, checkpoint["ema"], f"{flag} {path}")
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return cfg, build_diffusion(cfg, device), net


def pick_labels(net: nn.Module, count: int, seed: int, label: int | None = None) -> Tensor | None:
    """Labels (count,) for a class-conditional network; None for another.

    They are all `label`; or, to draw from the whole distribution p(x) = sum p(y) p(x | y), they
    come as often as in the training data. Label k of a seed is the same whatever the count.
    Raises UserError for a label on an unconditional network.
    """
    if not net.num_classes:
        if label is not None:
            raise UserError(f"--label {label}: this model is unconditional and takes no label")
        return None
    if label is not None:
        return torch.full((count,), label)
    shares = net.condition.label_shares.double().cpu().numpy()
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.choice(net.num_classes, count, p=shares / shares.sum()))


class PathRecorder:
    """Wraps the first batch's denoiser and remembers x0_hat of its first images at every call."""

    def __init__(self):
        self.frames: list[Tensor] = []

    def __call__(self, denoise: Denoiser) -> Denoiser:
        if self.frames:
            return denoise

        def recorded(x: Tensor, sigma: Tensor) -> Tensor:
            x0_hat = denoise(x, sigma)
            self.frames.append(to_uint8(x0_hat[:STRIP_ROWS]).cpu())
            return x0_hat

        return recorded

    def strip(self) -> Tensor:
        """A picture of the path: a row an image, from the first call to the last."""
        last = len(self.frames) - 1
        picked = np.linspace(0, last, min(last + 1, STRIP_COLUMNS)).round().astype(int)
        frames = torch.stack([self.frames[k] for k in picked], dim=1)  # (rows, columns, 1, H, W)
        return make_grid(frames.flatten(0, 1), columns=len(picked))


def main() -> None:
    cfg = parse(SampleConfig, "Draw images from a trained model.")
    device = pick_device(cfg.device)
    _, diffusion, net = load_model(cfg.checkpoint, device)
    labels = pick_labels(net, cfg.num_samples, cfg.seed, cfg.label)
    if cfg.guidance != 1 and labels is None:
        raise UserError(f"--guidance {cfg.guidance:g}: this model is unconditional; must be 1")
    steps = check_steps(cfg.steps, cfg.sampler, diffusion.schedule.timesteps)
    for path in filter(None, (cfg.output, cfg.npz, cfg.strip)):
        writable_folder(Path(path).parent)
        if Path(path).is_dir():
            raise UserError(f"output {path}: is a folder, must be a file")

    recorder = PathRecorder()
    batches = sample_images(
        diffusion,
        net,
        cfg.num_samples,
        sampler=cfg.sampler,
        steps=steps,
        spacing=cfg.spacing,
        seed=cfg.seed,
        labels=labels,
        guidance=cfg.guidance,
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        watch=recorder if cfg.strip else lambda denoise: denoise,
    )
    parts = []
    with tqdm(total=cfg.num_samples, desc=f"{cfg.sampler}, {steps} steps", unit="img") as bar:
        for batch in batches:
            parts.append(batch)
            bar.update(len(batch))
    images = torch.cat(parts)
    save_png(Path(cfg.output), make_grid(images))
    print(f"{cfg.output}: {len(images)} images")
    if cfg.npz:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=images.numpy())
        write_atomically(Path(cfg.npz), buffer.getvalue())
        print(f"{cfg.npz}: images {tuple(images.shape)}")
    if cfg.strip:
        save_png(Path(cfg.strip), recorder.strip())
        print(f"{cfg.strip}: x0_hat along {steps} steps")


if __name__ == "__main__":
    run(main)
