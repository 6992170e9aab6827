"""Figures of notebook 09: how loss falls with different synchrony, and what a network makes of images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.data.fashion_mnist import CLASSES
from helpers.training.dashboards import DPI

SMOOTHING_STEPS = 10  # of a moving mean


def plot_synchrony(
    distributed: Mapping[str, Mapping[str, Any]], simulated: Mapping[str, Mapping[str, Any]], highest: float = 2.5
) -> Figure:
    """Draw the loss against time and epochs, and in a panel of its own what staleness does to it.

    Args:
        distributed: a name for the legend and the result of `synchrony.train`, of runs whose times compare.
        simulated: the same of runs that one process plays, whose times mean nothing.
        highest: loss at the upper edge; what diverges leaves the picture there.
    """
    figure = Figure(figsize=(12, 3.4), dpi=DPI, layout="constrained")
    time, epochs, stale = figure.subplots(1, 3, sharey=True)
    for name, result in distributed.items():
        time.plot(result["seconds"], _smooth(result["loss"]), label=name)
    for panel, results in ((epochs, distributed), (stale, simulated)):
        for name, result in results.items():
            per_epoch = len(result["loss"]) / len(result["test_loss"])
            panel.plot(np.arange(1, len(result["loss"]) + 1) / per_epoch, _smooth(result["loss"]), label=name)
    time.set(title="two processes, against time", xlabel="seconds", ylabel="training loss", ylim=(0, highest))
    epochs.set(title="two processes, against epochs", xlabel="epoch")
    stale.set(title="asynchronous, simulated", xlabel="epoch")
    for panel in (time, epochs, stale):
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    return figure


def plot_embedding(points: np.ndarray, labels: np.ndarray, classes: Sequence[str] = CLASSES) -> Figure:
    """Draw points, float `[N, channels]`, by their two principal components, coloured by class."""
    centred = points - points.mean(axis=0)
    # Right singular vectors are the principal axes, the most important first.
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure = Figure(figsize=(7.2, 4.8), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    for index, name in enumerate(classes):
        own = plane[labels == index]
        panel.scatter(own[:, 0], own[:, 1], s=8, color=f"C{index}", label=name)
    panel.set(xlabel="first principal component", ylabel="second")
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _smooth(losses: Sequence[float]) -> pd.Series:
    return pd.Series(losses).rolling(SMOOTHING_STEPS, min_periods=1).mean()
