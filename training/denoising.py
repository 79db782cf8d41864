"""The trainer of a noise predictor: its network, loss and optimizers. `training.loop` runs it."""

import os

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig
from models import build_diffusion, build_model
from models.trained import TrainedModel
from training.graphed import GraphedOptimization
from training.optimization import Optimization, build_optimizers, learning_rate
from utils import distributed
from utils.data_loader import DatasetInfo
from utils.device import autocast, check_compile
from utils.random import Stream, generator


def prepare(cfg: TrainConfig) -> None:
    """Turn on determinism if asked to, and seed the weights of networks that are built next."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_rng_state(generator(Stream.WEIGHTS, cfg.seed).get_state())


def restore(own: torch.Generator, state: dict, seed: int) -> None:
    """Restore a trainer's generator from a checkpoint's `state`."""
    saved = state["generator"].cpu()
    if state["device"] != own.device.type:  # its states do not fit: start a new stream
        saved = generator(Stream.NOISE, seed, int(state["step"]), device=own.device).get_state()
    own.set_state(saved)


class DenoisingTrainer:
    """Trains a network to predict noise with the loss of `Diffusion`; a `training.loop.Trainer`.

    Attributes:
        cfg, data, device: the arguments of the constructor.
        model: the averaged network, for samples and scores during training.
        optimization: the network, its optimizers and average, and the step counts.
    """

    def __init__(self, cfg: TrainConfig, data: DatasetInfo, device: torch.device):
        if cfg.compile:
            check_compile(device)
        prepare(cfg)
        self.cfg, self.data, self.device = cfg, data, device
        self.net = build_model(cfg, data).to(device, memory_format=torch.channels_last)
        self.diffusion = build_diffusion(cfg, device)
        self.generator = generator(Stream.NOISE, cfg.seed, device=device)
        optimizers = build_optimizers(self.net, cfg, device)
        options = {"grad_clip": cfg.grad_clip, "ema_length": cfg.ema_length}
        self.called = self.net
        if device.type == "cuda" and distributed.size() == 1:  # a whole step is one CUDA graph
            if cfg.compile:
                self.diffusion.loss_at = torch.compile(self.diffusion.loss_at, dynamic=False)
            options["generators"] = [self.generator]
            self.optimization = GraphedOptimization(self.net, optimizers, **options)
        else:
            if cfg.compile:
                self.called = torch.compile(self.net, mode="reduce-overhead")
            if distributed.size() > 1:  # averages the gradients
                self.called = DistributedDataParallel(self.called)
            self.optimization = Optimization(self.net, optimizers, **options)
        self.model = TrainedModel(cfg, data, self.diffusion, self.optimization.ema.model)

    def train_step(self, x0: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Take a step on x0 (B, C, H, W) in [-1, 1] and labels y (B,), the batch of all processes.

        `progress` is the fraction of the run that is done. Returns the loss and the gradient norm,
        scalars that are still on the device.
        """
        return self.optimization.step(self.loss, x0, y, lr=learning_rate(self.cfg.lr, progress))

    def loss(self, x0: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch, of which this process computes its part."""
        y = self.hide_labels(y) if self.net.num_classes else None
        with autocast(self.device, self.cfg.precision):
            part = distributed.part(len(x0))
            return self.diffusion.loss(self.called, x0, y, self.generator, part)

    def hide_labels(self, y: Tensor) -> Tensor:
        """Replace labels at random with the null label (Ho & Salimans 2022, algorithm 1)."""
        hidden = torch.rand(y.shape, generator=self.generator, device=self.device)
        return y.masked_fill(hidden < self.cfg.label_dropout, self.net.num_classes)

    def state(self) -> dict:
        """What a checkpoint needs in order to resume from here, and to sample."""
        return {
            **self.optimization.state(),
            "generator": self.generator.get_state(),
            "device": self.device.type,
        }

    def load_state(self, state: dict) -> None:
        """Resume from `state`. A bad one raises KeyError, TypeError, ValueError or RuntimeError."""
        self.optimization.load_state(state)
        restore(self.generator, state, self.cfg.seed)
