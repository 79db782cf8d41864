"""The figures of the benchmarks."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from utils.visualization import make_grid, pixels


def plot_learning_curves(curves: list[list[dict]]) -> Figure:
    """`fid` against `minutes` of training, a line for each seed."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for seed, curve in enumerate(curves):
        minutes, scores = ([point[key] for point in curve] for key in ("minutes", "fid"))
        axes.plot(minutes, scores, marker="o", label=f"seed {seed}")
    axes.set(xlabel="minutes of training", ylabel="FID, mnist", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def plot_sampler_curves(spaces: dict[str, dict[str, dict[int, float]]]) -> Figure:
    """Scores against network calls: a panel for each score, a line for each sampler.

    spaces: {score: {sampler: {network calls: value}}}. A panel ends at 20 times its least value.
    """
    figure = Figure(figsize=(6 * len(spaces), 4.5))
    panels = figure.subplots(1, len(spaces), squeeze=False)[0]
    for axes, (score, curves) in zip(panels, spaces.items(), strict=True):
        for sampler, curve in curves.items():
            axes.plot(curve.keys(), curve.values(), marker="o", markersize=4, label=sampler)
        axes.set(xlabel="network calls per image", ylabel=score, xscale="log", yscale="log")
        calls = sorted({k for curve in curves.values() for k in curve})
        axes.set_xticks(calls, labels=map(str, calls))
        axes.set_xticks([], minor=True)
        least = min(value for curve in curves.values() for value in curve.values())
        axes.set_ylim(least / 1.5, 20 * least)
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.tight_layout()
    return figure


def plot_faults(found: dict[str, dict], sets: dict[str, Tensor]) -> Figure:
    """Some images of each set, and its FID and coverage in every feature space.

    found: {feature network: {set: {metric: (value, standard error)}}}.
    """
    names, shown = list(sets), 8
    figure = Figure(figsize=(11, 0.55 * len(names) + 0.8))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=(1.15, 1, 1))
    examples = make_grid(torch.cat([sets[name][:shown] for name in names]), columns=shown)
    rows = (0, 1, len(names) - 0.5, -0.5)  # puts each row of images beside its bars
    panels[0].imshow(pixels(examples), cmap="gray", aspect="auto", extent=rows)
    panels[0].set(xticks=[], yticks=range(len(names)), yticklabels=names)
    height, places = 0.8 / len(found), np.arange(len(names))
    for shift, (network, by_set) in enumerate(found.items()):
        for axes, metric in zip(panels[1:], ("fid", "coverage"), strict=True):
            values = [by_set[name][metric][0] for name in names]
            if metric == "fid":  # relative to untouched images
                values = [value / values[0] for value in values]
            offset = (shift - (len(found) - 1) / 2) * height
            axes.barh(places + offset, values, height, label=network)
    panels[1].set(xscale="log", xlabel="FID, relative to untouched images")
    panels[2].set(xlabel="coverage")
    panels[2].legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(found))
    figure.tight_layout()
    return figure
