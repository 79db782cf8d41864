"""Pictures: grids of images and plots of a run."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from utils.files import write_atomically
from utils.noise_scheduler import NoiseSchedule

STRIP_ROWS, STRIP_COLUMNS = 8, 12


def make_grid(images: Tensor, columns: int | None = None, padding: int = 2) -> Tensor:
    """Tile uint8 images (N, C, H, W) row by row as one (C, H', W'), nearly square by default."""
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    cells = F.pad(images.cpu(), (padding, 0, padding, 0))  # left and top of each image
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, rows * columns - len(images)))
    _, channels, height, width = cells.shape
    cells = cells.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return F.pad(cells.reshape(channels, rows * height, columns * width), (0, padding, 0, padding))


def strip(frames: Tensor) -> Tensor:
    """A picture of how images form: x0_hat from the first call to the last, one row per image.

    frames: (network calls, images, 2, C, H, W) uint8, x_t and x0_hat.
    """
    last = len(frames) - 1
    picked = np.linspace(0, last, min(last + 1, STRIP_COLUMNS)).round().astype(int)
    shown = frames[picked, :STRIP_ROWS, 1].transpose(0, 1)  # (rows, columns, C, H, W)
    return make_grid(shown.flatten(0, 1), columns=len(picked))


def film(frames: Tensor, columns: int | None, padding: int) -> list[Tensor]:
    """One picture per call: the grid of x_t next to that of x0_hat; `frames` as in `strip`."""
    both = ([make_grid(half, columns, padding) for half in call.unbind(1)] for call in frames)
    return [torch.cat([F.pad(x_t, (0, 8)), x0_hat], dim=2) for x_t, x0_hat in both]


def enlarged(picture: Tensor, scale: int) -> Image.Image:
    """uint8 (C, H, W) -> the same picture, with each pixel `scale` x `scale`."""
    return Image.fromarray(pixels(picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)))


def pixels(picture: Tensor) -> np.ndarray:
    """uint8 (C, H, W) -> (H, W) for a grey picture, (H, W, 3) for an RGB one."""
    return picture[0].numpy() if len(picture) == 1 else picture.permute(1, 2, 0).numpy()


def save_png(path: Path, picture: Tensor, scale: int = 2) -> None:
    """Write a uint8 (C, H, W) picture, with each pixel `scale` x `scale`. May raise UserError."""
    buffer = io.BytesIO()
    enlarged(picture, scale).save(buffer, format="PNG")
    write_atomically(Path(path), buffer.getvalue())


def save_gif(path: Path, frames: list[Tensor], scale: int = 2, seconds: float = 0.1) -> None:
    """Write uint8 (C, H, W) pictures as a looping GIF that shows the last one for two seconds."""
    pictures = [enlarged(frame, scale) for frame in frames]
    durations = [1000 * seconds] * (len(frames) - 1) + [2000]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
    )
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
    """How much signal and noise there is at each timestep."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    axes.plot(schedule.alpha_bar.sqrt(), label=r"signal $\sqrt{\bar\alpha_t}$")
    axes.plot((1 - schedule.alpha_bar).sqrt(), label=r"noise $\sqrt{1 - \bar\alpha_t}$")
    axes.set(xlabel="timestep t", ylabel="factor")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def comparable_fid(rows: list[dict]) -> str:
    """The key of the FID to show beside the floor: see `scoring.yardstick.Yardstick`."""
    return "fid_matched" if any("fid_matched" in row for row in rows) else "fid"


def plot_scores(scores: dict, images: Tensor) -> Figure:
    """The first hundred samples; if the classifier can read them, also shares and FID by class."""
    rows = scores.get("classes")
    figure = Figure(figsize=(13 if rows else 5, 4.5))
    panels = figure.subplots(1, 3 if rows else 1, squeeze=False)[0]
    panels[0].imshow(pixels(make_grid(images[:100])), cmap="gray")
    fid = scores[comparable_fid([scores])]
    panels[0].set(title=f"fid {fid:.2f} (real {scores['fid_floor']:.2f})")
    panels[0].axis("off")
    if rows:
        pairs = [("share", "share_reference", "share of images")]
        pairs += [(comparable_fid(rows), "fid_floor", "FID within the class")]
        for axes, (own, real, title) in zip(panels[1:], pairs, strict=True):
            for key, shift, label in ((own, -0.2, "samples"), (real, 0.2, "real")):
                heights = [row.get(key) or 0 for row in rows]
                axes.bar([row["class"] + shift for row in rows], heights, 0.4, label=label)
            axes.set(title=title, xlabel="class", xticks=range(len(rows)))
            axes.margins(y=0.2)
            axes.legend(ncols=2)
    figure.tight_layout()
    return figure


def plot_nearness(
    spaces: dict[str, Any], images: Tensor, training: Tensor, labels: Tensor
) -> Figure:
    """For each space: samples nearest to training images, and distances of samples and test images.

    Each value of `spaces` is a `scoring.diagnosis.Nearness`.

    Shows the nearest pair of each class, by the label of the training image: the nearest pairs
    overall would all be ones.
    """
    figure = Figure(figsize=(13, 2.8 * len(spaces)))
    panels = figure.subplots(len(spaces), 2, squeeze=False, width_ratios=(2.2, 1))
    for (name, nearness), (left, right) in zip(spaces.items(), panels, strict=True):
        nearest_first = nearness.samples.argsort()
        found = labels[nearness.neighbours[nearest_first]]
        closest = torch.stack([nearest_first[found == digit][0] for digit in found.unique()])
        shown = torch.cat([images[closest], training[nearness.neighbours[closest]]])
        left.imshow(pixels(make_grid(shown, columns=len(closest))), cmap="gray")
        left.set(title=f"closest in {name}: sample (top), training image (bottom)")
        left.axis("off")
        for label, distances in (("samples", nearness.samples), ("test images", nearness.test)):
            right.hist(distances.numpy(), bins=60, density=True, histtype="step", label=label)
        right.set(xlabel=f"distance in {name} to the nearest training image", yticks=[])
        right.legend()
    figure.tight_layout()
    return figure


def plot_bits(found: dict) -> Figure:
    """A model's bits/dim by noise level, and those of the decoder below the lowest level."""
    rows = found["by_level"]
    figure = Figure(figsize=(8, 4))
    left, right = figure.subplots(1, 2, width_ratios=(1, 6), sharey=False)
    left.bar(["decoder"], [found["reconstruction"]], color="tab:orange")
    left.set(ylabel="bits/dim")
    edges = [row["from"] for row in rows] + [rows[-1]["to"]]
    octaves = [math.log2(row["to"] / row["from"]) for row in rows]
    rates = [row["bits_per_dim"] / octave for row, octave in zip(rows, octaves, strict=True)]
    right.stairs(rates, edges, fill=True)
    right.set(xscale="log", xlabel=r"noise level $\sigma$", ylabel="bits/dim per octave")
    right.set(title=f"{found['bits_per_dim']:.3f} bits/dim, of {found['n']} images")
    right.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def plot_curve(scores: list[dict]) -> Figure:
    """FID of every checkpoint of a run against its epoch, and the FID of real data."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    epochs, fid = [row["epoch"] for row in scores], comparable_fid(scores)
    spread = [row[f"{fid}_spread"] for row in scores]
    axes.errorbar(epochs, [row[fid] for row in scores], spread, marker="o", label="samples")
    floor, floor_spread = scores[0]["fid_floor"], scores[0]["fid_floor_spread"]
    axes.axhline(floor, color="gray", linestyle="--", label="real data")
    axes.axhspan(floor - floor_spread, floor + floor_spread, color="gray", alpha=0.2)
    axes.set(xlabel="epoch", ylabel=f"FID, {scores[0]['features']}, n = {scores[0]['n']}")
    axes.set(yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure
