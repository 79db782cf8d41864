"""Pictures: grids of images and plots of a run."""

import io
import math
from pathlib import Path

import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from utils.files import write_atomically
from utils.noise_scheduler import NoiseSchedule


def make_grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images (N, 1, H, W) uint8 -> one uint8 (H', W'), row by row, as square as it gets."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    return torchvision.utils.make_grid(images.cpu(), nrow=columns)[0]


def save_png(path: Path, picture: Tensor, scale: int = 2) -> None:
    """Write a uint8 (H, W) picture, every pixel `scale` x `scale`. Raises UserError if it can't."""
    picture = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG")
    write_atomically(Path(path), buffer.getvalue())


def save_figure(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    write_atomically(Path(path), buffer.getvalue())


def plot_loss(history: dict[str, list[float]]) -> Figure:
    """The training loss against the step, as logged."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(history["step"], history["loss"], linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3)
    return figure


def plot_schedule(schedule: NoiseSchedule) -> Figure:
    """How much signal and noise each timestep holds."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(schedule.alpha_bar.sqrt(), label=r"signal $\sqrt{\bar\alpha_t}$")
    axes.plot((1 - schedule.alpha_bar).sqrt(), label=r"noise $\sqrt{1 - \bar\alpha_t}$")
    axes.set(xlabel="timestep t", ylabel="factor")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
