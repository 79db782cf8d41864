"""The training loop, for any trainer: budget, checkpoints, resume, signals, processes and logs."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from config import SamplingConfig, TrainConfig, UserError
from models.trained import TrainedModel
from sampling.draw import sample_images
from training.guard import StopSignals, locked
from training.optimization import Optimization
from utils import distributed
from utils.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from utils.data_loader import Dataset, DatasetInfo, epoch_batches, to_model_range
from utils.files import writable_folder, write_atomically
from utils.provenance import provenance
from utils.tensorboard_logger import TensorBoardLogger
from utils.visualization import make_grid, plot_loss, plot_schedule, save_figure, save_png

LOG_EVERY = 50  # optimizer steps
SHOW_EVERY = 1.0  # seconds between reads of the loss, which wait for the device
MAY_CHANGE = {"data_dir", "device", "save_every", "keep", "sample_every", "epochs", "max_minutes"}
MAY_CHANGE |= {"deterministic"}


class Trainer(Protocol):
    """What the loop needs from a trainer; `training.denoising` has one."""

    cfg: TrainConfig
    data: DatasetInfo
    device: torch.device
    model: TrainedModel
    optimization: Optimization

    def train_step(self, x0: Tensor, y: Tensor, progress: float) -> tuple[Tensor, Tensor]: ...

    def state(self) -> dict: ...

    def load_state(self, state: dict) -> None: ...


class Run:
    """The progress of a trainer, and everything else that a checkpoint stores about its run.

    Attributes:
        count: the number of training images.
        step: the number of steps taken, over all epochs.
        minutes: the time spent training, without samples and scores.
        stopped: the number of the signal that ends the run, or 0.
        saved: when the last checkpoint was written, by time.monotonic().
        history: the reported values of `step` and `loss`.
        changes: settings that were changed on resuming, one line each.
        environments: what ran it and from which step; each resume adds one.
    """

    def __init__(self, trainer: Trainer, count: int, folder: Path):
        """For `count` training images; checkpoints go to `folder`."""
        self.trainer, self.cfg, self.folder, self.count = trainer, trainer.cfg, folder, count
        self.batch_size = min(self.cfg.batch_size, count)
        if self.batch_size % distributed.size():
            raise UserError(
                f"--batch_size {self.batch_size}: must be a multiple of {distributed.size()},"
                " the number of processes that share it"
            )
        self.steps_per_epoch = count // self.batch_size
        self.step, self.minutes, self.stopped = 0, 0.0, 0
        self.saved = time.monotonic()
        self.environments, self.changes = [{"from_step": 0, **provenance(trainer.device)}], []
        self.history: dict[str, list] = {"step": [], "loss": []}

    @property
    def progress(self) -> float:
        """The fraction of the run that is done, in steps or in minutes, whichever is larger."""
        by_steps = self.step / (self.cfg.epochs * self.steps_per_epoch)
        return max(by_steps, self.minutes / self.cfg.max_minutes if self.cfg.max_minutes else 0.0)

    @property
    def epoch(self) -> int:
        """The epoch that the last step belongs to, counted from 0."""
        return (self.step - 1) // self.steps_per_epoch

    @property
    def save_is_due(self) -> bool:
        """True if more than `save_every` minutes have passed since the last checkpoint."""
        return time.monotonic() - self.saved > 60 * self.cfg.save_every

    def save(self) -> Path:
        """Write the checkpoint of the current epoch; returns its path."""
        path = self.folder / f"model_epoch_{self.epoch}.pth"
        if distributed.is_first():
            save_checkpoint(path, self.state())
            prune_checkpoints(self.folder, self.cfg.keep)
        self.saved = time.monotonic()
        return path

    def state(self) -> dict:
        own = ("step", "epoch", "count", "minutes", "history", "environments", "changes")
        return {
            "config": dataclasses.asdict(self.cfg),
            "data": dataclasses.asdict(self.trainer.data),
            "sampling": self.trainer.model.sampling,
            **self.trainer.state(),
            **{name: getattr(self, name) for name in own},
        }

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint. Raises UserError if it is damaged or belongs to another run."""
        checkpoint = load_checkpoint(path, flag="checkpoint", device=self.trainer.device)
        try:
            self.changes = list(checkpoint.get("changes", []))
            self.changes += self.changed_settings(checkpoint, path)
            self.trainer.load_state(checkpoint)
            self.step, self.minutes = int(checkpoint["step"]), float(checkpoint["minutes"])
            self.history = {key: list(checkpoint["history"][key]) for key in self.history}
            self.environments[-1]["from_step"] = self.step
            self.environments[:0] = checkpoint.get("environments", [])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"checkpoint {path}: damaged: {error}") from None

    def changed_settings(self, checkpoint: dict, path: Path) -> list[str]:
        """The changed settings, one line each. Raises UserError for one that must not change."""
        changes, old = [], checkpoint["config"]
        for f in dataclasses.fields(TrainConfig):
            was, now = getattr(old, f.name), getattr(self.cfg, f.name)
            if was != now and f.name not in MAY_CHANGE:
                raise UserError(
                    f"--{f.name} {now}: {path} was trained with {was};"
                    " use the same value, or another --experiment_name"
                )
            if was != now:
                changes.append(f"--{f.name} {was} -> {now} at step {checkpoint['step']}")
        source = f"--data_dir {self.cfg.data_dir}"
        self.trainer.data.check_same(checkpoint["data"], source, str(path))
        count = checkpoint.get("count", self.count)  # it decides where an epoch ends
        if count != self.count:
            raise UserError(
                f"{source}: has {self.count} training images; {path} was trained on {count};"
                " use the same images, or another --experiment_name"
            )
        return changes

    def summary(self) -> str:
        """What was trained, for how long and how fast."""
        parameters = sum(p.numel() for p in self.trainer.model.net.parameters())
        epochs = self.step / self.steps_per_epoch
        rate = self.step * self.batch_size / max(60 * self.minutes, 1e-9)
        return (
            f"{parameters / 1e6:.2f} M parameters, {self.step} steps, {epochs:.1f} epochs"
            f" in {self.minutes:.1f} minutes: {rate:.0f} images/s"
        )


def train(trainer: Trainer, data: Dataset, watch: Callable[[Run], None] = lambda run: None) -> Path:
    """Train until the epochs or the minutes run out; returns the last checkpoint's path.

    `watch` is called after every report; the time it takes does not count towards `minutes`.
    Raises UserError if another run is using the folder, and SystemExit after a signal to stop.
    """
    name, device = trainer.cfg.experiment(), trainer.device
    checkpoints, outputs, runs = (
        writable_folder(Path(top) / name) for top in ("checkpoints", "outputs", "runs")
    )
    images, labels = data.images.to(device), data.labels.to(device)
    with contextlib.ExitStack() as stack:
        first = distributed.is_first()
        if first:
            stack.enter_context(locked(checkpoints))
            remove_leftovers(checkpoints)
        run = Run(trainer, len(images), checkpoints)
        path = next(iter(distributed.of_first(list_checkpoints(checkpoints)[-1:])), None)
        if path:
            run.restore(path)
        logger = start_logs(run, path, outputs, runs) if first else None
        stop = stack.enter_context(StopSignals())
        while run.progress < 1:
            train_epoch(run, images, labels, logger, watch, stop)
            path = run.save()
            if run.stopped:
                distributed.of_first(None)  # wait until it has written: if one ends, all end
                if first:
                    print(f"stopped: {path} is saved; run the same command again to resume")
                raise SystemExit(128 + int(run.stopped))
            if logger:
                draw_progress(run, outputs, logger)
            distributed.of_first(None)  # all wait, so drawing does not count as training time
        if logger:
            logger.close()
            print(run.summary())
    return path


def train_epoch(
    run: Run,
    images: Tensor,
    labels: Tensor,
    logger: TensorBoardLogger | None,
    watch: Callable[[Run], None],
    stop: StopSignals,
) -> None:
    """Train for the rest of an epoch or of the time budget; saves every `save_every` minutes."""
    cfg, trainer = run.cfg, run.trainer
    epoch, done = divmod(run.step, run.steps_per_epoch)
    batches = list(epoch_batches(len(images), cfg.batch_size, cfg.seed, epoch))[done:]
    batches = torch.stack(batches).to(trainer.device)  # one copy: each waits for all steps so far
    bar = tqdm(batches, f"epoch {epoch}", unit="step", dynamic_ncols=True, disable=logger is None)
    minutes_before, start = run.minutes, time.monotonic()
    shown = reported = start
    recent = []  # (loss, gradient norm) on the device: reading them would wait for it
    for index in bar:
        pair = trainer.train_step(to_model_range(images[index]), labels[index], run.progress)
        run.step += 1
        recent.append(torch.stack(pair))
        now = time.monotonic()
        minutes, show = minutes_before + (now - start) / 60, now - shown > SHOW_EVERY
        # all processes act alike at a step, whatever their clocks say and whichever got a signal
        run.minutes, run.stopped, show, save = distributed.largest(
            minutes, stop.received, show, run.save_is_due
        )
        over = run.progress >= 1 or run.stopped
        log = over or run.step % LOG_EVERY == 0 or run.step % run.steps_per_epoch == 0
        if log or show:
            trainer.optimization.check()
            loss, norm = distributed.mean(torch.stack(recent)).nanmean(dim=0).tolist()
            shown = time.monotonic()
            rate = len(recent) * len(index) / (shown - reported)
            show_progress(run, bar, loss, rate)
        if log:
            if logger:
                report(run, logger, loss, norm, rate)
                watch(run)
            reported, recent = time.monotonic(), []
            start += reported - shown
        if over:
            break
        if save:
            run.save()


def start_logs(run: Run, resumed: Path | None, outputs: Path, runs: Path) -> TensorBoardLogger:
    """Write run.json, open the run's TensorBoard log, and print what is resumed."""
    record = {"config": dataclasses.asdict(run.cfg), "environments": run.environments}
    record |= {"data": dataclasses.asdict(run.trainer.data), "changes": run.changes}
    write_atomically(outputs / "run.json", (json.dumps(record, indent=2) + "\n").encode())
    logger = TensorBoardLogger(runs, first_step=run.step)
    if resumed:
        print(f"resuming {resumed}, step {run.step}", *run.changes, sep="\n")
    else:
        logger.hyperparameters(run.cfg)
        logger.figure(0, "noise_schedule", plot_schedule(run.trainer.model.diffusion.schedule))
    return logger


def report(run: Run, logger: TensorBoardLogger, loss: float, norm: float, rate: float) -> None:
    """Log the last few steps to the history and to TensorBoard."""
    run.history["step"].append(run.step)
    run.history["loss"].append(loss)
    lr = run.trainer.optimization.optimizers[0].param_groups[0]["lr"]
    logger.scalars(run.step, loss=loss, lr=lr, grad_norm=norm, images_per_second=rate)


def show_progress(run: Run, bar: tqdm, loss: float, rate: float) -> None:
    """Set the text that the progress bar shows after the number of steps."""
    left = run.minutes * (1 / max(run.progress, 1e-9) - 1)
    skipped = run.trainer.optimization.skipped
    skipped = f", {skipped} steps skipped" * (skipped > 0)
    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s, {clock(left)} left{skipped}")


def clock(minutes: float) -> str:
    return f"{int(minutes)}:{int(minutes * 60) % 60:02d}"


def draw_progress(run: Run, outputs: Path, logger: TensorBoardLogger) -> None:
    """Every `sample_every` epochs and at the end, save the loss curve and a grid of samples."""
    every = run.cfg.sample_every
    if run.progress >= 1 or (every and (run.epoch + 1) % every == 0):
        save_figure(outputs / "loss.png", plot_loss(run.history))
        grid = sample_grid(run.trainer.model)
        save_png(outputs / f"samples_epoch_{run.epoch}.png", grid)
        logger.grid(run.step, "samples", grid)


def sample_grid(model: TrainedModel, count: int = 64) -> Tensor:
    """A grid (C, H', W') of the model's samples, always from the same noise, cycling classes."""
    classes = model.net.num_classes
    labels = torch.arange(count) % classes if classes else None
    return make_grid(torch.cat(list(sample_images(model, count, SamplingConfig(), labels=labels))))
