"""Train a diffusion model: `python main.py`. Running the same command again resumes.

Writes checkpoints/<experiment>/, outputs/<experiment>/ (loss curve, sample grids, run.json) and
runs/<experiment>/ (`tensorboard --logdir runs`). `torchrun --nproc_per_node N main.py` trains with
N processes, on as many GPUs where there are.
"""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from config import NUM_CLASSES, TrainConfig, UserError, parse, run
from models import build_diffusion, build_model
from models.samplers import sample_images
from utils import distributed
from utils.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)
from utils.data_loader import epoch_batches, load_dataset, to_model_range
from utils.device import DTYPES, arithmetic, autocast, environment, pick_device
from utils.ema import EMA
from utils.files import writable_folder, write_atomically
from utils.guard import StopSignals, locked
from utils.muon import Muon
from utils.tensorboard_logger import TensorBoardLogger
from utils.visualization import make_grid, plot_loss, plot_schedule, save_figure, save_png

LOG_EVERY = 50  # optimizer steps
BAD_STEPS = 3  # in a row, that end a run
MAY_CHANGE = {"data_dir", "device", "save_every", "keep", "sample_every", "epochs", "max_minutes"}
MAY_CHANGE |= {"deterministic"}


def learning_rate(peak: float, progress: float) -> float:
    """Warm up over the first 2 % of the run, hold, fall linearly to 0 over the last 60 %."""
    return peak * min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / 0.6)


def build_optimizers(
    net: nn.Module, cfg: TrainConfig, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon for the weights between layers; AdamW for biases, norms, first and last layer, labels.

    So Jordan et al. 2024 divide them: what Muon knows of a matrix's two sides holds only inside.
    """
    outer = ("stem", "head", "condition.label")
    named = list(net.named_parameters())
    inner = [p for name, p in named if p.ndim >= 2 and not name.startswith(outer)]
    others = [p for name, p in named if p.ndim < 2 or name.startswith(outer)]
    fused = device.type in ("cpu", "cuda")
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    return [
        torch.optim.AdamW(others, betas=(0.9, 0.99), fused=fused, **options),
        Muon(inner, **options, dtype=DTYPES[arithmetic(device, cfg.precision)]),
    ]


class Trainer:
    """Everything that changes while training, and so everything that a checkpoint holds."""

    def __init__(self, cfg: TrainConfig, labels: Tensor, device: torch.device, folder: Path):
        torch.manual_seed(cfg.seed)
        self.cfg, self.device, self.folder = cfg, device, folder
        self.net = build_model(cfg).to(device, memory_format=torch.channels_last)
        if cfg.class_conditional:
            counts = labels.bincount(minlength=NUM_CLASSES)
            self.net.condition.label_shares.copy_(counts / len(labels))
        # replayed as CUDA graphs: launching the kernels one by one takes longer than they do
        self.compiled = torch.compile(self.net, mode="reduce-overhead") if cfg.compile else self.net
        if distributed.size() > 1:  # averages the gradients
            self.compiled = DistributedDataParallel(self.compiled, broadcast_buffers=False)
        self.ema = EMA(self.net, cfg.ema_length)
        self.diffusion = build_diffusion(cfg, device)
        self.optimizers = build_optimizers(self.net, cfg, device)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        self.batch_size = min(cfg.batch_size, len(labels))
        if self.batch_size % distributed.size():
            raise UserError(
                f"--batch_size {self.batch_size}: must be a multiple of the {distributed.size()}"
                " processes that share it"
            )
        self.steps_per_epoch = len(labels) // self.batch_size
        self.step, self.minutes = 0, 0.0
        self.skipped, self.bad_in_a_row, self.stopped = 0, 0, 0
        self.environment, self.changes = environment(device), []
        self.history: dict[str, list] = {"step": [], "loss": []}

    @property
    def progress(self) -> float:
        """The share of the run that is done: of its steps or of its minutes, whichever is more."""
        by_steps = self.step / (self.cfg.epochs * self.steps_per_epoch)
        return max(by_steps, self.minutes / self.cfg.max_minutes if self.cfg.max_minutes else 0.0)

    def train_step(self, x0: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """One optimizer step; returns loss and gradient norm, still on the device.

        A step whose gradient is not finite changes nothing but the step count. Raises UserError at
        the third of them in a row.
        """
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(self.cfg.lr, self.progress)
        y = self.hide_labels(y) if self.cfg.class_conditional else None
        with autocast(self.device, self.cfg.precision):
            part = distributed.part(len(x0))
            loss = self.diffusion.loss(self.compiled, x0, y, self.generator, part)
        self.net.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.grad_clip)
        self.step += 1
        if norm.isfinite():
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.net, self.step - self.skipped)
            self.bad_in_a_row = 0
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row == BAD_STEPS:
                raise UserError(
                    f"step {self.step}: loss or gradient not finite, {BAD_STEPS} times in a row;"
                    f" try a lower --lr (it is {self.cfg.lr:g}), or --precision fp32"
                )
        return loss.detach(), norm

    def hide_labels(self, y: Tensor) -> Tensor:
        """Replace a share of the labels by the null label (Ho & Salimans 2022, algorithm 1)."""
        hidden = torch.rand(y.shape, generator=self.generator, device=self.device)
        return torch.where(hidden < self.cfg.label_dropout, self.net.num_classes, y)

    @property
    def epoch(self) -> int:
        """The number, from 0, of the epoch that the last step belongs to."""
        return (self.step - 1) // self.steps_per_epoch

    def save(self) -> Path:
        """Write the checkpoint of the current epoch; its path."""
        path = self.folder / f"model_epoch_{self.epoch}.pth"
        if distributed.is_first():
            save_checkpoint(path, self.state())
            prune_checkpoints(self.folder, self.cfg.keep)
        return path

    def sample_grid(self, count: int = 64) -> Tensor:
        """A grid of the averaged network's samples, always of the same noise."""
        labels = torch.arange(count) % NUM_CLASSES if self.cfg.class_conditional else None
        batches = sample_images(self.diffusion, self.ema.model, count, labels=labels)
        return make_grid(torch.cat(list(batches)))

    def summary(self) -> str:
        """What was trained, for how long and how fast."""
        parameters = sum(p.numel() for p in self.net.parameters())
        epochs = self.step / self.steps_per_epoch
        rate = self.step * self.batch_size / max(60 * self.minutes, 1e-9)
        return (
            f"{parameters / 1e6:.2f} M parameters, {self.step} steps, {epochs:.1f} epochs"
            f" in {self.minutes:.1f} minutes: {rate:.0f} images/s"
        )

    def state(self) -> dict:
        return {
            "config": dataclasses.asdict(self.cfg),
            "network": self.net.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "device": self.device.type,
            "step": self.step,
            "epoch": self.epoch,
            "minutes": self.minutes,
            "skipped": self.skipped,
            "history": self.history,
            "environment": self.environment,
            "changes": self.changes,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises UserError when it is damaged or of another run."""
        checkpoint = load_checkpoint(path, flag="checkpoint", device=self.device)
        old = checkpoint["config"]
        try:
            self.changes = list(checkpoint.get("changes", []))
            for f in dataclasses.fields(TrainConfig):
                was, now = getattr(old, f.name), getattr(self.cfg, f.name)
                if was != now and f.name not in MAY_CHANGE:
                    raise UserError(
                        f"--{f.name} {now}: {path} was trained with {was};"
                        " use the same value, or another --experiment_name"
                    )
                if was != now:
                    self.changes.append(f"--{f.name} {was} -> {now} at step {checkpoint['step']}")
            load_weights(self.net, checkpoint["network"], str(path))
            load_weights(self.ema.model, checkpoint["ema"], str(path))
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                for p, kept in optimizer.state.items():  # torch does not look at their shapes
                    if any(v.ndim and v.shape != p.shape for v in kept.values()):
                        raise ValueError("optimizer state of another shape")
            if checkpoint["device"] == self.device.type:
                self.generator.set_state(checkpoint["generator"].cpu())
            else:  # another kind of device has another kind of state: start a new stream
                self.generator.manual_seed(self.cfg.seed + int(checkpoint["step"]))
            self.step, self.minutes = int(checkpoint["step"]), float(checkpoint["minutes"])
            self.skipped = int(checkpoint.get("skipped", 0))
            self.history = {key: list(checkpoint["history"][key]) for key in self.history}
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"checkpoint {path}: damaged: {error}") from None


def clock(minutes: float) -> str:
    return f"{int(minutes)}:{int(minutes * 60) % 60:02d}"


def train(cfg: TrainConfig, watch: Callable[[Trainer], None] = lambda trainer: None) -> Path:
    """Train until the epochs or the minutes are over; returns the last checkpoint's path.

    `watch` is called after every report, on the run's time but not on its `minutes`.
    Raises UserError when another run holds the folder, and SystemExit after SIGINT or SIGTERM.
    """
    device, name = pick_device(cfg.device, cfg.precision), cfg.experiment()
    checkpoints, outputs, runs = (
        writable_folder(Path(top) / name) for top in ("checkpoints", "outputs", "runs")
    )
    images, labels = load_dataset(cfg.dataset, cfg.data_dir, "train")
    images, labels = images[: cfg.train_size].to(device), labels[: cfg.train_size].to(device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with contextlib.ExitStack() as stack:
        first = distributed.is_first()
        if first:
            stack.enter_context(locked(checkpoints))
            remove_leftovers(checkpoints)
        trainer = Trainer(cfg, labels, device, checkpoints)
        path = next(iter(distributed.of_first(list_checkpoints(checkpoints)[-1:])), None)
        if path:
            trainer.restore(path)
        logger = start_logs(trainer, path, outputs, runs) if first else None
        stop = stack.enter_context(StopSignals())
        while trainer.progress < 1:
            train_epoch(trainer, images, labels, logger, watch, stop)
            path = trainer.save()
            if trainer.stopped:
                if first:
                    print(f"stopped: {path} is saved, and the same command goes on from it")
                raise SystemExit(128 + trainer.stopped)
            if logger:
                draw_progress(trainer, outputs, logger)
        if logger:
            logger.close()
            print(trainer.summary())
    return path


def start_logs(
    trainer: Trainer, resumed: Path | None, outputs: Path, runs: Path
) -> TensorBoardLogger:
    """Say what goes on, and open the run's TensorBoard log; what runs it goes to run.json."""
    record = {"config": dataclasses.asdict(trainer.cfg), "environment": trainer.environment}
    record["changes"] = trainer.changes
    write_atomically(outputs / "run.json", (json.dumps(record, indent=2) + "\n").encode())
    logger = TensorBoardLogger(runs, first_step=trainer.step)
    if resumed:
        print(f"resuming {resumed}, step {trainer.step}", *trainer.changes, sep="\n")
    else:
        logger.hyperparameters(trainer.cfg)
        logger.figure(0, "noise_schedule", plot_schedule(trainer.diffusion.schedule))
    return logger


def draw_progress(trainer: Trainer, outputs: Path, logger: TensorBoardLogger) -> None:
    """At the end of every `sample_every`-th epoch: the loss curve and a grid of samples."""
    every = trainer.cfg.sample_every
    if trainer.progress >= 1 or (every and (trainer.epoch + 1) % every == 0):
        save_figure(outputs / "loss.png", plot_loss(trainer.history))
        grid = trainer.sample_grid()
        save_png(outputs / f"samples_epoch_{trainer.epoch}.png", grid)
        logger.grid(trainer.step, "samples", grid)


def train_epoch(
    trainer: Trainer,
    images: Tensor,
    labels: Tensor,
    logger: TensorBoardLogger | None,
    watch: Callable[[Trainer], None],
    stop: StopSignals,
) -> None:
    """What is left of one epoch, or of the time budget; saves every `save_every` minutes."""
    cfg, epoch = trainer.cfg, trainer.step // trainer.steps_per_epoch
    done = trainer.step - epoch * trainer.steps_per_epoch
    batches = list(epoch_batches(len(images), cfg.batch_size, cfg.seed, epoch))[done:]
    bar = tqdm(
        batches, desc=f"epoch {epoch}", unit="step", dynamic_ncols=True, disable=logger is None
    )
    start, minutes_before = time.monotonic(), trainer.minutes
    last_save = last_report = start
    recent = []  # (loss, gradient norm) on the device: reading them would wait for it
    for index in bar:
        index = index.to(trainer.device)
        recent.append(trainer.train_step(to_model_range(images[index]), labels[index]))
        minutes = minutes_before + (time.monotonic() - start) / 60
        # all processes must end at one step, whatever their clocks say and whom a signal reached
        trainer.minutes, trainer.stopped = distributed.of_first((minutes, stop.received))
        over = trainer.progress >= 1 or trainer.stopped
        if over or trainer.step % LOG_EVERY == 0 or trainer.step % trainer.steps_per_epoch == 0:
            pairs = distributed.mean(torch.stack([torch.stack(pair) for pair in recent]))
            loss, norm = pairs.nanmean(dim=0).tolist()
            now = time.monotonic()
            if logger:
                rate = len(recent) * len(index) / (now - last_report)
                report(trainer, logger, bar, loss, norm, rate)
                watch(trainer)
            last_report, recent = time.monotonic(), []
            start += last_report - now
            if over:
                break
            if distributed.of_first(now - last_save > cfg.save_every * 60):
                trainer.save()
                last_save = now


def report(
    trainer: Trainer, logger: TensorBoardLogger, bar: tqdm, loss: float, norm: float, rate: float
) -> None:
    """Tell history, TensorBoard and the progress bar about the last few steps."""
    trainer.history["step"].append(trainer.step)
    trainer.history["loss"].append(loss)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    logger.scalars(trainer.step, loss=loss, lr=lr, grad_norm=norm, images_per_second=rate)
    left = trainer.minutes * (1 / max(trainer.progress, 1e-9) - 1)
    skipped = f", {trainer.skipped} steps skipped" * (trainer.skipped > 0)
    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} img/s, {clock(left)} left{skipped}")


def main() -> None:
    cfg = parse(TrainConfig, "Train a diffusion model.")
    with distributed.joined(pick_device(cfg.device)):
        path = train(cfg)
        if distributed.is_first():
            print(f"trained: {path}\nsamples: python generate.py --checkpoint {path}")


if __name__ == "__main__":
    run(main)
