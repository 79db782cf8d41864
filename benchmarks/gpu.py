"""CUDA graphs on one GPU: images/s of training with and without them, and of sampling."""

import dataclasses
from dataclasses import dataclass

import torch

from benchmarks.common import draw_timed, seconds_each, split_flags, whole_numbers, write_table
from config import DEVICES, PRETRAINED, SamplingConfig, TrainConfig, UserError, parse, setting
from models.trained import TrainedModel, load_trained
from sampling.draw import labels_for, resolve
from training.denoising import DenoisingTrainer
from training.optimization import Optimization
from utils.data_loader import describe, to_model_range
from utils.device import autocast, pick_device
from utils.graphs import Graphed


@dataclass(frozen=True)
class GPUConfig(SamplingConfig):
    """What to train, what to sample from, and how many images."""

    batch_sizes: str = setting("512,2048", "images per training step")
    settings: str = setting("", "more flags of main.py, as in '--model_type cnn'")
    times: int = setting(50, "steps to time", low=1)
    checkpoint: str = setting(str(PRETRAINED / "unet.pth"), "the model to sample from")
    num_samples: int = setting(10_000, "images to draw", low=1)
    device: str = setting("auto", "device to run on: a GPU", choices=DEVICES)


def gpu(cfg: GPUConfig) -> None:
    """Images/s on one GPU: training, plain and as one graph, and sampling."""
    training = parse(TrainConfig, "", split_flags("settings", cfg.settings))
    device = pick_device(cfg.device, training.precision)
    if device.type != "cuda":
        raise UserError(f"--device {cfg.device}: must be cuda, the only device with CUDA graphs")
    rows = []
    for batch in whole_numbers("batch_sizes", cfg.batch_sizes, at_least=1):
        for compiled in (False, True):
            of_batch = dataclasses.replace(training, batch_size=batch, compile=compiled)
            plain, whole = training_rates(of_batch, device, cfg.times)
            what = f"batch {batch}" + ", --compile" * compiled
            rows.append([what, plain, whole, whole / plain])
    header = ["training, images/s", "plain", "one graph", "ratio"]
    write_table("gpu_training", header, rows, device)
    model = load_trained(cfg.checkpoint, device)
    draw_timed(model, cfg.num_samples, cfg)  # warm-up: libraries choose their kernels
    _, rate, calls = draw_timed(model, cfg.num_samples, cfg)
    alone = forward_rate(model, cfg, cfg.times) / calls
    row = [f"{calls:.0f} calls", rate, alone, rate / alone]
    header = ["sampling, images/s", "whole", "the network alone", "share"]
    write_table("gpu_sampling", header, [row], device)


def training_rates(cfg: TrainConfig, device: torch.device, times: int) -> tuple[float, float]:
    """Images/s of plain steps, and of the steps that the trainer takes on this device."""
    torch.compiler.reset()  # it compiles a function for a limited number of networks only
    images = torch.randint(256, (2 * cfg.batch_size, 1, 28, 28), dtype=torch.uint8, device=device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    index = torch.randperm(len(images), device=device)[: cfg.batch_size]
    trainer = DenoisingTrainer(cfg, describe("mnist", images), device)

    def step() -> None:
        trainer.train_step(to_model_range(images[index]), labels[index], progress=0.5)

    whole = cfg.batch_size / seconds_each(step, device, times)
    trainer.optimization = Optimization(
        trainer.net,
        trainer.optimization.optimizers,
        grad_clip=cfg.grad_clip,
        ema_length=cfg.ema_length,
    )
    return cfg.batch_size / seconds_each(step, device, times), whole


def forward_rate(model: TrainedModel, sampling: SamplingConfig, times: int) -> float:
    """Images/s of a single network call on a batch, without anything else."""
    sampling, device = resolve(sampling, model), model.device
    x = torch.randn(sampling.batch_size, *model.data.shape, device=device)
    t = torch.full_like(x[:, 0, 0, 0], model.diffusion.schedule.timesteps / 2)
    y = labels_for(model, len(x), sampling.seed)
    y = None if y is None else y.to(device)
    call = Graphed(model.net)
    with torch.inference_mode(), autocast(device, sampling.precision):
        return len(x) / seconds_each(lambda: call(x, t, y), device, times)
