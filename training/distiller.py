"""The trainer that distils a teacher into a few-step network. `training.loop` runs it."""

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

# One call is the default: it takes half the time of two, and its images score just as well.
SAMPLING = {"sampler": FEW_STEP_SAMPLER, "steps": 1, "spacing": "fewstep", "guidance": 1.0}
TUNING = 0.4  # share of the run for consistency tuning: matching needs a student that draws digits

INHERITED = ("model_type", "width", "class_conditional", "timesteps", "schedule", "prediction")
INHERITED += ("t_mean", "t_std", "t_even", "dataset", "held_out", "fourier")
# No guidance, so no label dropout. The weights are good already: a low rate keeps what they know.
DEFAULTS = {"label_dropout": 0.0, "lr": 1e-3, "weight_decay": 0.0, "ema_length": 0.1}


def inherited(path: str) -> dict:
    """Settings for distilling the checkpoint `path`: the teacher's, and defaults that work best."""
    teacher = load_checkpoint(Path(path), "--teacher")["config"]
    return {name: getattr(teacher, name) for name in INHERITED} | DEFAULTS


def load_teacher(cfg: TrainConfig, data: DatasetInfo, device: torch.device) -> TrainedModel:
    """Load the network to distil. Raises UserError if it does not fit the settings or the data."""
    teacher, flag = load_trained(cfg.teacher, device, "--teacher"), f"--teacher {cfg.teacher}"
    if teacher.few_step:
        raise UserError(f"{flag}: was distilled itself; must be an undistilled network")
    if teacher.config.prediction == "eps":
        raise UserError(f"{flag}: predicts eps, useless in pure noise; must predict v or x0")
    for name in INHERITED:
        was, now = getattr(teacher.config, name), getattr(cfg, name)
        if was != now:
            raise UserError(f"--{name} {now}: the teacher has {was}, and the student must match it")
    if cfg.label_dropout:
        raise UserError(f"--label_dropout {cfg.label_dropout:g}: must be 0 with --teacher")
    if cfg.compile:
        raise UserError("--compile: cannot be used with --teacher")
    data.check_same(teacher.data, f"--data_dir {cfg.data_dir}", flag)
    return teacher


class DistillingTrainer:
    """Distils a teacher into a student that draws an image in one call, and improves it in another.

    The first part of a run is `Tuning`, the rest is `Matching`.

    Attributes:
        cfg, data, device: the arguments of the constructor.
        phase: the current phase of training.
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
        """The student with its optimizers and its average."""
        return self.phase.optimization

    @property
    def model(self) -> TrainedModel:
        """The student's average, for samples and scores during training."""
        average = self.optimization.ema.model
        return TrainedModel(self.cfg, self.data, self.teacher.diffusion, average, SAMPLING)

    def train_step(self, x0: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Take a step on x0 (B, C, H, W) in [-1, 1] and labels y (B,), the batch of all processes.

        `progress` is the fraction of the run that is done. Returns the loss and the gradient norm,
        scalars that are still on the device. The losses of tuning and matching are not comparable.
        """
        if progress >= TUNING:
            self.begin_matching()
        if isinstance(self.phase, Tuning):
            done = progress / TUNING
        else:  # may be below TUNING, in a run that was given more time
            done = max(0.0, progress - TUNING) / (1 - TUNING)
        labels = y if self.teacher.net.num_classes else None
        return self.phase.step(x0, labels, done)

    def begin_matching(self) -> None:
        """Switch to distribution matching, starting from the average of the tuned weights."""
        if isinstance(self.phase, Tuning):
            prepare(self.cfg)
            tuned = copy_of(self.optimization.ema.model)
            self.phase = Matching(self.cfg, self.teacher, tuned, self.generator)

    def state(self) -> dict:
        """What a checkpoint needs in order to resume from here, and to sample."""
        own = {"generator": self.generator.get_state(), "device": self.device.type}
        return {**self.phase.state(), **own}

    def load_state(self, state: dict) -> None:
        """Resume from `state`. A bad one raises KeyError, TypeError, ValueError or RuntimeError."""
        if "fake" in state:
            self.begin_matching()
        self.phase.load_state(state)
        restore(self.generator, state, self.cfg.seed)
