"""Pictures for the notebooks: partition plans, formats side by side, images in and out of a stage."""

import io
from collections.abc import Mapping, Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Image as Picture
from matplotlib.figure import Figure

from helpers.images.decoding import Image
from helpers.partitioning import PartitionPlan

WIDTH = 9.0  # inches


def plot_plan(plan: PartitionPlan) -> Figure:
    """Images and bytes of each partition: even bars mean that tasks end together."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6), layout="constrained")
    for axis, values, unit in zip(axes, (plan.files, plan.bytes / 2**20), ("images", "MiB"), strict=True):
        axis.bar(range(plan.partitions), values)
        axis.set(xlabel="partition", ylabel=unit, title=f"{unit} a partition, {plan.slots} at a time")
    plt.close(figure)
    return figure


def plot_formats(table: pd.DataFrame) -> Figure:
    """Throughput, latency and file size of each format; the table is that of `benchmark.compare`."""
    columns = {"throughput, images/s": "more is better", "latency, ms": "less is better", "size, KiB": "less is better"}
    figure, axes = plt.subplots(1, len(columns), figsize=(WIDTH, 2.8), layout="constrained", sharey=True)
    for axis, (column, remark) in zip(axes, columns.items(), strict=True):
        axis.barh(table["format"], table[column])
        axis.set(xlabel=column, title=remark)
    axes[0].invert_yaxis()
    plt.close(figure)
    return figure


def plot_overlaps(table: pd.DataFrame, reference: str) -> Figure:
    """Boundary IoU against the width of the boundary, and how far each format is from the reference.

    The table is that of `evaluation.overlap_table`.
    """
    curves = table.drop(columns="mask IoU")
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
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
    plt.close(figure)
    return figure


def plot_ratios(tables: Mapping[str, pd.DataFrame], published: tuple[float, float]) -> Figure:
    """Time a frame as a share of the first format's, one chart a network; tables of `benchmark.time_frames`."""
    figure, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 3.0), layout="constrained", sharey=True, sharex=True)
    for axis, (network, table) in zip(np.ravel(axes), tables.items(), strict=True):
        ratios = table.iloc[:, -1]
        bars = axis.barh(ratios.index, ratios)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvspan(*published, color="0.85", zorder=0, label="published")
        axis.set(xlabel=f"time a frame, share of {ratios.index[0]}'s", title=network)
        axis.set_xlim(0, max(1.15, 1.15 * ratios.max()))
    np.ravel(axes)[0].invert_yaxis()
    np.ravel(axes)[-1].legend(fontsize=8, loc="lower right")
    plt.close(figure)
    return figure


def as_jpeg(figure: Figure, quality: int = 60) -> Picture:
    """A figure with photographs in a tenth of the bytes, for a notebook that must stay small."""
    file = io.BytesIO()
    figure.savefig(file, format="jpeg", pil_kwargs={"quality": quality})
    return Picture(file.getvalue(), format="jpeg")


def plot_images(images: Sequence[Image], titles: Sequence[str], columns: int = 8) -> Figure:
    """A grid of BGR or gray images, each under its title."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, WIDTH / columns * 1.25 * rows), layout="constrained")
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, image, title in zip(np.ravel(axes), images, titles, strict=False):
        axis.imshow(image if image.ndim == 2 or image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB), "gray")
        axis.set_title(title, fontsize=7)
    plt.close(figure)
    return figure


def plot_outputs(outputs: np.ndarray, labels: Sequence[str], names: Sequence[str]) -> Figure:
    """Raw outputs as a heat map: float32 `[images, classes]`."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.3 * len(names) + 1.2), layout="constrained")
    picture = axis.imshow(outputs, aspect="auto", cmap="coolwarm")
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_title("the largest logit of a row is the predicted class")
    figure.colorbar(picture, label="logit")
    plt.close(figure)
    return figure


def plot_stage_seconds(records: pd.DataFrame) -> Figure:
    """Where a run's time went, summed over its tasks; the records are those of `RunSummary.records`."""
    seconds = records.filter(regex="_seconds$").sum()
    figure, axis = plt.subplots(figsize=(WIDTH, 2.2), layout="constrained")
    axis.barh([name.removesuffix("_seconds") for name in seconds.index], seconds)
    axis.invert_yaxis()
    axis.set(xlabel="seconds, all tasks together", title="where the time goes")
    plt.close(figure)
    return figure
