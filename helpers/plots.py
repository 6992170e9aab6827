"""Pictures for the notebooks: partition plans, formats side by side, images in and out of a stage."""

from collections.abc import Sequence

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.images import Image
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


def plot_images(images: Sequence[Image], titles: Sequence[str], columns: int = 8) -> Figure:
    """A grid of BGR or grey images, each under its title."""
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
