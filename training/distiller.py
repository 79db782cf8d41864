"""The trainer of a few-step network, which a teacher is distilled into. `training.loop` runs it."""

from pathlib import Path

import torch
from torch import Tensor

from config import FEW_STEP_SAMPLER, TrainConfig, UserError
from models.trained import TrainedModel, load_trained
from training.denoising import prepare, restore
from training.matching import Matching
from training.optimization import Optimization
from training.tuning import Tuning, copy_of
from utils.checkpoint import load_checkpoint
from utils.data_loader import DatasetInfo
from utils.random import Stream, generator

# One call is the default: it takes half the time of two, and its images score as well.
SAMPLING = {"sampler": FEW_STEP_SAMPLER, "steps": 1, "spacing": "fewstep", "guidance": 1.0}
TUNING = 0.4  # share of the run for consistency tuning: matching needs a student that draws digits

INHERITED = ("model_type", "width", "class_conditional", "timesteps", "schedule", "prediction")
INHERITED += ("t_mean", "t_std", "t_even", "dataset", "held_out", "fourier")
# Nothing is guided, so no label is hidden. The weights are good: a small rate keeps what they know.
DEFAULTS = {"label_dropout": 0.0, "lr": 1e-3, "weight_decay": 0.0, "ema_length": 0.1}


def inherited(path: str) -> dict:
    """Settings to distil the checkpoint `path` with: the teacher's, and what does best here."""
    teacher = load_checkpoint(Path(path), "--teacher")["config"]
    return {name: getattr(teacher, name) for name in INHERITED} | DEFAULTS


def load_teacher(cfg: TrainConfig, data: DatasetInfo, device: torch.device) -> TrainedModel:
    """The network to distil. Raises UserError where it, the settings and the data do not fit."""
    teacher, flag = load_trained(cfg.teacher, device, "--teacher"), f"--teacher {cfg.teacher}"
    if teacher.few_step:
        raise UserError(f"{flag}: was distilled itself; must be a network that was not")
    if teacher.config.prediction == "eps":
        raise UserError(f"{flag}: predicts eps, which in pure noise tells nothing; must be v or x0")
    for name in INHERITED:
        was, now = getattr(teacher.config, name), getattr(cfg, name)
        if was != now:
            raise UserError(f"--{name} {now}: the teacher has {was}, and so has what it teaches")
    if cfg.label_dropout:
        raise UserError(f"--label_dropout {cfg.label_dropout:g}: must be 0 with --teacher")
    if cfg.compile:
        raise UserError("--compile: not with --teacher")
    old = teacher.data
    if (old.shape, old.class_names) != (data.shape, data.class_names):
        raise UserError(
            f"{flag}: was trained with images {old.shape} of {old.num_classes} classes; the data"
            f" holds images {data.shape} of {data.num_classes}"
        )
    return teacher


class DistillingTrainer:
    """Turns a teacher into a student that draws an image in one call, and mends it in another.

    For the first part of a run by `Tuning`, then by `Matching`.

    Attributes:
        cfg, data, device: what it was made with.
        phase: the present kind of training.
    """

    def __init__(self, cfg: TrainConfig, data: DatasetInfo, device: torch.device):
        prepare(cfg)
        self.cfg, self.data, self.device = cfg, data, device
        self.teacher = load_teacher(cfg, data, device)
        self.generator = generator(Stream.NOISE, cfg.seed, device=device)
        student = copy_of(self.teacher.net)
        self.phase: Tuning | Matching = Tuning(cfg, self.teacher, student, self.generator)

    @property
    def optimization(self) -> Optimization:
        """Of the student."""
        return self.phase.optimization

    @property
    def model(self) -> TrainedModel:
        """The student's average, for pictures and scores on the way."""
        average = self.optimization.ema.model
        return TrainedModel(self.cfg, self.data, self.teacher.diffusion, average, SAMPLING)

    def train_step(self, x0: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """One step on images x0 (B, C, H, W) in [-1, 1] with labels y (B,), of all processes.

        `progress` is the share of the run that is done. Returns loss and gradient norm, scalars
        that are still on the device. The loss of tuning is no measure of that of matching.
        """
        if progress >= TUNING:
            self.begin_matching()
        done = (progress - TUNING) / (1 - TUNING) if progress >= TUNING else progress / TUNING
        labels = y if self.teacher.net.num_classes else None
        return self.phase.step(x0, labels, done)

    def begin_matching(self) -> None:
        """Go on by distribution matching, from the average of the tuned weights."""
        if isinstance(self.phase, Tuning):
            prepare(self.cfg)
            tuned = copy_of(self.optimization.ema.model)
            self.phase = Matching(self.cfg, self.teacher, tuned, self.generator)

    def state(self) -> dict:
        """What a checkpoint must hold to go on from here, and to sample."""
        own = {"generator": self.generator.get_state(), "device": self.device.type}
        return {**self.phase.state(), **own}

    def load_state(self, state: dict) -> None:
        """Go on from `state`. Raises KeyError, TypeError, ValueError or RuntimeError on others."""
        if "fake" in state:
            self.begin_matching()
        self.phase.load_state(state)
        restore(self.generator, state, self.cfg.seed)
