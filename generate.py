"""Draw images from a trained model: `python generate.py` uses the shipped U-Net.

The architecture, noise schedule and image shape come from the checkpoint, never from flags.
Under `torchrun`, the processes share the batches.
"""

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import SampleConfig, parse
from models.trained import load_trained
from sampling.draw import PathRecorder, draw_images
from sampling.requests import Plan, make_plan
from utils import distributed
from utils.device import pick_device
from utils.files import check_different, check_ending, check_output, write_atomically
from utils.script import run
from utils.visualization import STRIP_ROWS, film, make_grid, save_gif, save_png, strip

FILMED = 100  # images in an animation
OUTPUTS = {"output": ".png", "npz": ".npz", "strip": ".png", "animate": ".gif"}


def generate(cfg: SampleConfig, device: torch.device) -> None:
    """Draw what `cfg` asks for and write the files it names."""
    model = load_trained(cfg.checkpoint, device)
    wanted = {flag: getattr(cfg, flag) for flag in OUTPUTS if getattr(cfg, flag) is not None}
    for flag, path in wanted.items():
        check_ending(path, f"--{flag}", (OUTPUTS[flag],))
    check_different(wanted)
    plan = make_plan(cfg, model)
    for flag, path in wanted.items():  # makes folders, so only after all that can be refused
        check_output(path, f"--{flag}", (OUTPUTS[flag],))
    recorded = FILMED if cfg.animate else STRIP_ROWS if cfg.strip else 0
    recorder = PathRecorder(recorded)
    images = draw_images(
        model,
        plan.count,
        plan.sampling,
        f"{plan.sampling.sampler}, {plan.sampling.steps} steps",
        labels=plan.labels,
        start=plan.start,
        given=plan.given,
        watch=recorder if recorded else None,
    )
    if distributed.is_first():
        write(cfg, plan, images, recorder)


def write(cfg: SampleConfig, plan: Plan, images: Tensor, recorder: PathRecorder) -> None:
    """Write the grid and the other files asked for, and print a line about each."""
    grid = make_grid(torch.cat([*plan.above, images]), plan.columns, plan.padding)
    save_png(Path(cfg.output), grid)
    print(f"{cfg.output}: {len(images)} images")
    if cfg.reconstruct:
        error = (images.float() - plan.above[0].float()).square().mean().sqrt()
        print(f"reconstructed with an error of {error:.1f} grey levels (root mean square)")
    if cfg.npz:
        save_npz(Path(cfg.npz), images, plan.labels)
        print(f"{cfg.npz}: images {tuple(images.shape)}")
    if cfg.strip:
        save_png(Path(cfg.strip), strip(recorder.frames()))
        print(f"{cfg.strip}: x0_hat over {plan.sampling.steps} steps")
    if cfg.animate:
        save_gif(Path(cfg.animate), film(recorder.frames(), plan.columns, plan.padding))
        print(f"{cfg.animate}: x_t beside x0_hat over {plan.sampling.steps} steps")


def save_npz(path: Path, images: Tensor, labels: Tensor | None) -> None:
    arrays = {"images": images.numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def main() -> None:
    cfg = parse(SampleConfig, "Draw images from a trained model.")
    device = pick_device(cfg.device)
    with distributed.joined(device):
        generate(cfg, device)


if __name__ == "__main__":
    run(main)
