"""Figures of the notebooks: plans, formats side by side, where time goes, how trainings went."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Image as Picture
from matplotlib.figure import Figure

from figures import new_figure
from helpers.partitioning import PartitionPlan
from helpers.pipeline.task import STAGES
from helpers.tracking.tensorboard import read_scalars

SMOOTHING_STEPS = 25  # of a moving mean, for curves measured at every step


def plot_plan(plan: PartitionPlan) -> Figure:
    """Images and bytes of each partition: even bars mean that tasks end together."""
    figure = new_figure(2.6)
    axes = figure.subplots(1, 2)
    for axis, values, unit in zip(axes, (plan.files, plan.bytes / 2**20), ("images", "MiB"), strict=True):
        axis.bar(range(plan.partitions), values)
        axis.set(xlabel="partition", ylabel=unit, title=f"{unit} per partition, {plan.slots} at a time")
    return figure


def plot_formats(table: pd.DataFrame) -> Figure:
    """Throughput, latency and file size of each format; the table is that of `benchmark.compare`."""
    columns = {"throughput, images/s": "more is better", "latency, ms": "less is better", "size, KiB": "less is better"}
    figure = new_figure(2.8)
    axes = figure.subplots(1, len(columns), sharey=True)
    for axis, (column, remark) in zip(axes, columns.items(), strict=True):
        axis.barh(table["format"], table[column])
        axis.set(xlabel=column, title=remark)
    axes[0].invert_yaxis()
    return figure


def plot_overlaps(table: pd.DataFrame, reference: str) -> Figure:
    """Boundary IoU against the width of the boundary, and how far each format is from the reference.

    The table is that of `evaluation.overlap_table`.
    """
    curves = table.drop(columns="mask IoU")
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    for number, (name, values) in enumerate(curves.iterrows()):
        style = {"color": f"C{number}", "linewidth": 0.8 * (len(curves) - number) + 0.4}  # all of them stay visible
        left.plot(100 * curves.columns.astype(float), values, label=name, **style)
        if name != reference:
            difference = 1000 * (values - curves.loc[reference])
            right.plot(100 * curves.columns.astype(float), difference, color=style["color"], label=name)
    right.axhline(0, color="0.6", linewidth=0.8)
    unit = "width of the boundary, % of the image's diagonal"
    left.set(xlabel=unit, ylabel="boundary IoU with the truth", title="all formats draw the same outlines")
    right.set(xlabel=unit, ylabel="boundary IoU, thousandths", title=f"what they differ by from {reference}")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def plot_ratios(tables: Mapping[str, pd.DataFrame], published: tuple[float, float]) -> Figure:
    """Time per frame as a share of the first format's, one chart per network; the tables are those of `time_frames`."""
    figure = new_figure(3.0)
    axes = figure.subplots(1, len(tables), sharey=True, sharex=True)
    for axis, (network, table) in zip(np.ravel(axes), tables.items(), strict=True):
        ratios = table.iloc[:, -1]
        bars = axis.barh(ratios.index, ratios)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvspan(*published, color="0.85", zorder=0, label="published")
        axis.set(xlabel=f"time per frame, share of {ratios.index[0]}'s", title=network)
        axis.set_xlim(0, max(1.15, 1.15 * ratios.max()))
    np.ravel(axes)[0].invert_yaxis()
    np.ravel(axes)[-1].legend(fontsize=8, loc="lower right")
    return figure


def as_jpeg(figure: Figure, quality: int = 60) -> Picture:
    """A figure with photographs in a tenth of the bytes, for a notebook that must stay small."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs={"quality": quality})
    return Picture(file.getvalue(), format="jpeg")


def plot_outputs(outputs: np.ndarray, labels: Sequence[str], names: Sequence[str]) -> Figure:
    """Raw outputs as a heat map: float32 `[images, classes]`."""
    figure = new_figure(0.3 * len(names) + 1.2)
    axis = figure.subplots()
    picture = axis.imshow(outputs, aspect="auto", cmap="coolwarm")
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title("the largest logit of a row is the predicted class")
    figure.colorbar(picture, label="logit")
    return figure


def plot_stage_seconds(records: pd.DataFrame) -> Figure:
    """Where a run's time went, summed over its tasks; the records are those of `RunSummary.records`."""
    seconds = records[[f"{stage}_seconds" for stage in STAGES]].sum()
    figure = new_figure(2.2)
    axis = figure.subplots()
    axis.barh([name.removesuffix("_seconds") for name in seconds.index], seconds)
    axis.invert_yaxis()
    axis.set(xlabel="seconds, all tasks together", title="where the time goes")
    return figure


def plot_training(runs: Mapping[str, str]) -> Figure:
    """Draw loss, accuracy and throughput against the training step.

    Args:
        runs: a name for the legend and the run directory, for each run to compare.
    """
    figure = new_figure(3.4)
    panels = figure.subplots(1, 3)
    for index, (name, run_dir) in enumerate(runs.items()):
        scalars, color = read_scalars(run_dir), f"C{index}"
        for panel, measure in zip(panels, ("loss", "accuracy", "images_per_second"), strict=True):
            steps = scalars[f"train/{measure}"]
            panel.plot(
                steps["step"], _smooth(steps["value"]), color=color, linewidth=1, alpha=0.7, label=f"{name}, train"
            )
            if f"test/{measure}" in scalars:
                test = scalars[f"test/{measure}"]
                panel.plot(test["step"], test["value"], "o--", color=color, markersize=4, label=f"{name}, test")
            panel.set(title=measure.replace("_", " "), xlabel="step")
            panel.grid(alpha=0.3)
    panels[1].set_ylim(0.7, 1.0)
    panels[2].set_ylim(bottom=0)
    panels[0].legend(fontsize="small")
    return figure


def plot_losses(run_dir: str) -> Figure:
    """Draw each term of the loss, and the learning rate, against the training step."""
    scalars = read_scalars(run_dir)
    figure = new_figure(2.8)
    measures = [*(f"{name}_loss" for name in ("class", "box", "mask", "semantic")), "learning_rate"]
    for panel, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        steps = scalars[f"train/{measure}"]
        panel.plot(steps["step"], steps["value"], linewidth=1)
        panel.set(title=measure.replace("_", " "), xlabel="step")
        panel.grid(alpha=0.3)
    return figure


def plot_epochs(epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the loss's terms and the average precision on the validation scenes of each epoch of a `result.json`."""
    table = pd.DataFrame(epochs, index=range(1, len(epochs) + 1))
    figure = new_figure(3.2)
    losses, precision = figure.subplots(1, 2)
    for name in (column for column in table if column.endswith("_loss") and column != "train_loss"):
        losses.plot(table.index, table[name], label=name.removeprefix("train_").replace("_", " "))
    losses.set(title="training loss, its weighted terms", xlabel="epoch", ylim=(0, None))
    for name in ("AP50", "AP75", "AP"):
        precision.plot(table.index, table[f"val_{name}"], label=name)
    precision.set(title="mask average precision on validation scenes", xlabel="epoch", ylim=(0, 1))
    for panel in (losses, precision):
        panel.legend(fontsize="small")
        panel.grid(alpha=0.3)
    return figure


def plot_synchrony(
    distributed: Mapping[str, Mapping[str, Any]], simulated: Mapping[str, Mapping[str, Any]], highest: float = 2.5
) -> Figure:
    """Draw the loss against time and epochs, and in a separate panel against staleness.

    Args:
        distributed: a name for the legend and the result of `synchrony.train`, of runs whose times compare.
        simulated: the same of simulated runs, whose times mean nothing.
        highest: loss at the upper edge; what diverges leaves the picture there.
    """
    figure = new_figure(3.4)
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


def plot_embedding(points: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw points, float `[N, channels]`, by their two principal components, colored by class."""
    centered = points - points.mean(axis=0)
    # Right singular vectors are the principal axes, the most important first.
    plane = centered @ np.linalg.svd(centered, full_matrices=False)[2][:2].T
    figure = new_figure(4.8, width=7.2)
    panel = figure.subplots()
    for index, name in enumerate(classes):
        own = plane[labels == index]
        panel.scatter(own[:, 0], own[:, 1], s=8, color=f"C{index}", label=name)
    panel.set(xlabel="first principal component", ylabel="second")
    panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _smooth(values: Sequence[float] | pd.Series) -> pd.Series:
    return pd.Series(values).rolling(SMOOTHING_STEPS, min_periods=1).mean()
