"""A trained model: everything that a checkpoint says, ready to be called."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from config import TrainConfig, UserError
from models import build_diffusion, build_model
from models.diffusion import Diffusion
from utils.checkpoint import load_checkpoint, load_weights
from utils.data_loader import DatasetInfo


@dataclass(frozen=True)
class TrainedModel:
    """What sampling needs, in one value.

    Attributes:
        config: what was trained, and how.
        data: what it was trained on.
        diffusion: the process.
        net: the averaged network, in eval mode.
        sampling: fields of `SamplingConfig` that this network does best with; may be empty.
    """

    config: TrainConfig
    data: DatasetInfo
    diffusion: Diffusion
    net: nn.Module
    sampling: dict = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def few_step(self) -> bool:
        """True for a distilled network: it draws images in a call or two, by a sampler of its own.

        What it gives is no denoiser: it has no flow to run backwards, and no level to be guided at.
        """
        return self.config.teacher is not None

    @property
    def can_be_guided(self) -> bool:
        """False for a network without labels, and for one that never had its labels hidden."""
        hidden = self.config.label_dropout > 0
        return self.net.num_classes > 0 and hidden and not self.few_step


def load_trained(
    path: str | Path, device, flag: str = "--checkpoint", held_out: bool = False
) -> TrainedModel:
    """The model in a checkpoint. Raises UserError, naming `flag`, where it cannot be had.

    With `held_out` it must not have been trained on the images that are held out to choose by.
    """
    checkpoint = load_checkpoint(Path(path), flag)
    cfg, data = checkpoint["config"], checkpoint["data"]
    if held_out and not cfg.held_out:
        raise UserError(
            f"--held_out: {path} was trained on the images held out; train it with --held_out"
        )
    with torch.device("meta"):  # takes no memory, whatever size the file says the network has
        net = build_model(cfg, data)
    load_weights(net, checkpoint["ema"], f"{flag} {path}", assign=True)
    net = net.float().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return TrainedModel(cfg, data, build_diffusion(cfg, device), net, checkpoint["sampling"])
