"""Draw images from a trained model: `python generate.py` uses the shipped U-Net.

Architecture and noise schedule come from the checkpoint, never from flags. Under `torchrun` the
processes share the batches.
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
from models.drawing import make_plan
from models.samplers import check_steps, sample_images
from utils import distributed
from utils.checkpoint import load_checkpoint, load_weights
from utils.data_loader import to_uint8
from utils.device import pick_device
from utils.files import writable_folder, write_atomically
from utils.visualization import STRIP_ROWS, film, make_grid, save_gif, save_png, strip

FILMED = 100  # images in an animation


def load_model(path: str, device, flag="--checkpoint") -> tuple[TrainConfig, Diffusion, nn.Module]:
    """The config, the process and the averaged network that a checkpoint describes."""
    checkpoint = load_checkpoint(Path(path), flag)
    cfg = checkpoint["config"]
    with torch.device("meta"):  # takes no memory, whatever size the file says the network has
        net = build_model(cfg)
    load_weights(net, checkpoint["ema"], f"{flag} {path}", assign=True)
    net = net.float().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return cfg, build_diffusion(cfg, device), net


def count_evaluated(net: nn.Module) -> list[int]:
    """A list that grows from now on: how many images each call of `net` evaluates."""
    evaluated: list[int] = []
    net.register_forward_hook(lambda module, inputs, output: evaluated.append(len(output)))
    return evaluated


def draw_images(diffusion: Diffusion, net: nn.Module, count: int, what: str, **options) -> Tensor:
    """All images (count, 1, 28, 28) uint8 of `sample_images`; a bar says `what` they are.

    Of several processes, each draws a share of the batches, and all have all images in the end.
    """
    parts, share = [], (distributed.rank(), distributed.size())
    with tqdm(total=count, desc=what, unit="img", disable=share[0] > 0) as bar:
        for batch in sample_images(diffusion, net, count, share=share, **options):
            parts.append(batch)
            bar.update(min(len(batch) * share[1], count - bar.n))
    return torch.cat(distributed.interleave(parts))


class PathRecorder:
    """Wraps the first batch's denoiser and remembers x_t and x0_hat of its first images."""

    def __init__(self, images: int):
        self.images = images
        self.calls: list[Tensor] = []  # (images, 2, 1, 28, 28) uint8

    def __call__(self, denoise: Denoiser) -> Denoiser:
        if self.calls or not self.images:
            return denoise

        def recorded(x: Tensor, sigma: Tensor) -> Tensor:
            x0_hat = denoise(x, sigma)
            x_t = x / float((1 + sigma**2).sqrt())
            both = torch.stack([x_t[: self.images], x0_hat[: self.images]], dim=1)
            self.calls.append(to_uint8(both).cpu())
            return x0_hat

        return recorded

    def frames(self) -> Tensor:
        """(network calls, images, 2, 1, 28, 28) uint8: x_t and x0_hat."""
        return torch.stack(self.calls)


def save_npz(path: Path, images: Tensor) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.numpy())
    write_atomically(path, buffer.getvalue())


def generate(cfg: SampleConfig, device: torch.device) -> None:
    """Draw what `cfg` asks for and write the files it names."""
    trained, diffusion, net = load_model(cfg.checkpoint, device)
    plan = make_plan(cfg, trained, diffusion, net)
    steps = check_steps(cfg.steps, plan.sampler, diffusion.schedule.timesteps)
    for path in filter(None, (cfg.output, cfg.npz, cfg.strip, cfg.animate)):
        writable_folder(Path(path).parent)
        if Path(path).is_dir():
            raise UserError(f"output {path}: is a folder, must be a file")

    recorder = PathRecorder(FILMED if cfg.animate else STRIP_ROWS if cfg.strip else 0)
    images = draw_images(
        diffusion,
        net,
        plan.count,
        f"{plan.sampler}, {steps} steps",
        sampler=plan.sampler,
        steps=steps,
        spacing=cfg.spacing,
        seed=cfg.seed,
        labels=plan.labels,
        guidance=cfg.guidance,
        guided=(cfg.guided_from, cfg.guided_to),
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        start=plan.start,
        watch=recorder,
        **plan.options,
    )
    if not distributed.is_first():
        return
    grid = make_grid(torch.cat([*plan.above, images]), plan.columns, plan.padding)
    save_png(Path(cfg.output), grid)
    print(f"{cfg.output}: {len(images)} images")
    if cfg.reconstruct:
        error = (images.float() - plan.above[0].float()).square().mean().sqrt()
        print(f"drawn again with an error of {error:.1f} grey levels (root mean square)")
    if cfg.npz:
        save_npz(Path(cfg.npz), images)
        print(f"{cfg.npz}: images {tuple(images.shape)}")
    if cfg.strip:
        save_png(Path(cfg.strip), strip(recorder.frames()))
        print(f"{cfg.strip}: x0_hat along {steps} steps")
    if cfg.animate:
        save_gif(Path(cfg.animate), film(recorder.frames(), plan.columns, plan.padding))
        print(f"{cfg.animate}: x_t beside x0_hat along {steps} steps")


def main() -> None:
    cfg = parse(SampleConfig, "Draw images from a trained model.")
    device = pick_device(cfg.device)
    with distributed.joined(device):
        generate(cfg, device)


if __name__ == "__main__":
    run(main)
