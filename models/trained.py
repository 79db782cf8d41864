"""A trained model: everything that a checkpoint contains, ready to use."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from config import DATA_DIR, TrainConfig, UserError
from models import build_diffusion, build_model
from models.diffusion import Diffusion
from utils.checkpoint import load_checkpoint, load_weights
from utils.data_loader import Dataset, DatasetInfo, load_dataset


@dataclass(frozen=True)
class TrainedModel:
    """Everything that sampling needs.

    Attributes:
        config: what was trained, and how.
        data: what it was trained on.
        diffusion: the diffusion process.
        net: the averaged network, in eval mode.
        sampling: the fields of `SamplingConfig` that suit this network best; may be empty.
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
        """True for a distilled network: it draws images in one or two calls, with its own sampler.

        It is not a denoiser: it has no flow to run backwards, and no level at which to guide it.
        """
        return self.config.teacher is not None

    @property
    def needs_label(self) -> bool:
        """True if it has classes and never learned to draw without being given one."""
        return self.net.num_classes > 0 and (self.few_step or not self.config.label_dropout)

    @property
    def can_be_guided(self) -> bool:
        """Guidance needs predictions with and without a label."""
        return self.net.num_classes > 0 and not self.needs_label

    def dataset(self, split: str, data_dir: str | None, test_dir: str | None, **options) -> Dataset:
        """A split of the data that it was trained on; for `options` see `load_dataset`.

        It is read from `data_dir` and `test_dir`, or if these are None, from where it was then.
        Raises UserError if it cannot be read, or now has other images or classes.
        """
        data_dir = data_dir or self.config.data_dir or DATA_DIR
        test_dir = test_dir or self.config.test_dir
        found = load_dataset(self.config.dataset, data_dir, split, test_dir, **options)
        found.info.check_same(self.data, f"--data_dir {data_dir}", "the network")
        return found


def load_trained(
    path: str | Path, device, flag: str = "--checkpoint", held_out: bool = False
) -> TrainedModel:
    """The model in a checkpoint. Raises UserError, naming `flag`, if it cannot be loaded.

    With `held_out`, it must not have been trained on the images held out for choosing settings.
    """
    checkpoint = load_checkpoint(Path(path), flag)
    cfg, data = checkpoint["config"], checkpoint["data"]
    if held_out and not cfg.held_out:
        raise UserError(
            f"--held_out: {path} was trained on the held-out images; train it with --held_out"
        )
    with torch.device("meta"):  # takes no memory, whatever network size the file claims
        net = build_model(cfg, data)
    load_weights(net, checkpoint["ema"], f"{flag} {path}", assign=True)
    net = net.float().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return TrainedModel(cfg, data, build_diffusion(cfg, device), net, checkpoint["sampling"])
