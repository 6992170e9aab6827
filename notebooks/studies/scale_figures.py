"""Figures of measured and predicted runs, from the tables of `helpers.pipeline.records`.

Each has one message, which is its title and is computed from what it shows.
"""

import io
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from helpers.pipeline.task import STAGES

WIDTH, HEIGHT = 8.0, 3.4  # inches
# Large letters and thick lines: a figure is often shown at half its size.
STYLE: dict[Any, Any] = {
    "font.size": 13,
    "axes.titlesize": 14,
    "lines.linewidth": 2.5,
    "lines.markersize": 9,
    "legend.frameon": False,
}


def _drawn(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in this module's style, and close the figure, which a notebook would show twice."""

    @wraps(plot)
    def draw(*arguments, **named) -> Figure:
        with plt.rc_context(STYLE):
            figure = plot(*arguments, **named)
        plt.close(figure)
        return figure

    return draw


@_drawn
def plot_scaling(table: pd.DataFrame) -> Figure:
    """Time per image against cores and executors.

    Args:
        table: `kind` (one line each), `slots` and `milliseconds` per image, by the wall clock of the pass.
    """
    figure, axis = _axes()
    shares = []
    for kind, rows in table.groupby("kind", sort=False):
        rows = rows.sort_values("slots")
        axis.plot(rows["slots"], rows["milliseconds"], marker="o", label=kind)
        shares.append(rows["milliseconds"].iloc[0] / rows["milliseconds"].iloc[-1])
    one = table.loc[table["slots"].idxmin(), "milliseconds"] * table["slots"].min()
    slots = np.sort(table["slots"].unique())
    axis.plot(slots, one / slots, color="gray", linestyle=":", label="ideal")
    axis.set(xlabel="cores, or executors of one core", ylabel="ms an image", xticks=slots, ylim=(0, None))
    factors = f"{shares[0]:.2f}" if len(shares) == 1 else f"{min(shares):.2f} to {max(shares):.2f}"
    axis.set_title(f"From {slots[0]} to {slots[-1]} cores a run is {factors} times as fast")
    axis.legend()
    return figure


@_drawn
def plot_workers(tasks: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Average time per image on each worker.

    Args:
        tasks: `records.read_tasks`.
        titles: of the runs to show, by the location of their output.
    """
    figure, axis = _axes()
    names, values = [], []
    for output, title in titles.items():
        workers = _workers(tasks[tasks["output"] == output]).groupby("worker")[["seconds", "images"]].sum()
        names += [f"{title}\nworker {i + 1}" for i in range(len(workers))]
        values += (1000 * workers["seconds"] / workers["images"]).tolist()
    bars = axis.bar(names, values, color=[f"C{i}" for i, _ in enumerate(values)])
    axis.bar_label(bars, fmt="%.1f")
    axis.set(ylabel="ms an image", ylim=(0, 1.2 * max(values)))
    axis.set_title(f"The slowest worker takes {max(values) / min(values):.1f} times as long as the fastest")
    return figure


@_drawn
def plot_sizes(table: pd.DataFrame) -> Figure:
    """Time per image against its size: `workers` (one line each), `megapixels` of a mean image and `milliseconds`."""
    figure, axis = _axes()
    for workers, rows in table.groupby("workers"):
        rows = rows.sort_values("megapixels")
        axis.plot(rows["megapixels"], rows["milliseconds"], marker="o", label=f"{workers} worker{'s' * (workers > 1)}")
    one = table[table["workers"] == table["workers"].min()].sort_values("megapixels")
    times = one["megapixels"].iloc[-1] / one["megapixels"].iloc[0]
    longer = one["milliseconds"].iloc[-1] / one["milliseconds"].iloc[0]
    axis.set(xlabel="megapixels an image", ylabel="ms an image", xlim=(0, None), ylim=(0, None))
    axis.set_title(f"An image of {times:.0f} times as many pixels takes {longer:.1f} times as long")
    axis.legend()
    return figure


@_drawn
def plot_partitions(table: pd.DataFrame, predicted: pd.DataFrame | None = None) -> Figure:
    """Throughput against partitions, with images per partition above.

    Args:
        table: `partitions`, `images` and `images_per_second` of runs.
        predicted: the same columns of predictions.
    """
    figure, axis = _axes()
    rows = table.sort_values("partitions")
    axis.plot(rows["partitions"], rows["images_per_second"], marker="o", label="measured")
    if predicted is not None:
        axis.plot(
            predicted["partitions"], predicted["images_per_second"], color="gray", linestyle="--", label="predicted"
        )
        axis.legend()
    axis.set_xscale("log", base=2)
    ticks = rows["partitions"].to_numpy()
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set(xlabel="partitions", ylabel="images/s", ylim=(0, 1.1 * rows["images_per_second"].max()))
    above = axis.secondary_xaxis("top")
    above.set_xticks(ticks, [f"{images:.0f}" for images in rows["images"] / ticks])
    above.set_xlabel("images a partition")
    best = rows.loc[rows["images_per_second"].idxmax()]
    worst = rows["images_per_second"].min() / best["images_per_second"]
    axis.set_title(f"{best['partitions']:.0f} partitions are fastest; the wrong number costs up to {1 - worst:.0%}")
    return figure


@_drawn
def plot_timeline(tasks: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """The tasks of each worker over time, one panel per run: long bars at the end are stragglers, white is idle.

    Args:
        tasks: `records.read_tasks`.
        titles: of the runs to show, by the location of their output.
    """
    figure, axes = plt.subplots(
        len(titles), 1, figsize=(WIDTH, 0.7 + 1.5 * len(titles)), layout="constrained", sharex=True, squeeze=False
    )
    ends = []
    for axis, (output, title) in zip(axes[:, 0], titles.items(), strict=True):
        rows = _workers(tasks[tasks["output"] == output]).sort_values("begin")
        for i, row in enumerate(rows.itertuples()):
            axis.barh(row.worker, row.seconds, left=row.begin, color=f"C{i % 10}", edgecolor="white", height=0.8)
        workers = rows["worker"].nunique()
        axis.set_yticks(range(workers), [f"worker {i + 1}" for i in range(workers)])
        axis.invert_yaxis()
        axis.set_title(f"{title}: {rows['end'].max():.1f} s", loc="left")
        ends.append(rows["end"].max())
    axes[-1, 0].set(xlabel="seconds since the pass began", xlim=(0, None))
    longest, shortest = max(ends), min(ends)
    figure.suptitle(
        f"The same work took {longest / shortest:.1f} times as long" if len(ends) > 1 else "Tasks on workers"
    )
    return figure


@_drawn
def plot_stages(tasks: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Where the time of an image goes, one bar per run.

    Args:
        tasks: `records.read_tasks`.
        titles: of the runs to show, by the location of their output.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 1.8 + 0.55 * len(titles)), layout="constrained")
    columns = [f"{stage}_seconds" for stage in STAGES]
    sums = tasks.groupby("output")[[*columns, "images"]].sum().loc[list(titles)]
    milliseconds = sums[columns].div(sums["images"], axis=0) * 1000
    left = np.zeros(len(titles))
    for stage, column in zip(STAGES, columns, strict=True):
        axis.barh(list(titles.values()), milliseconds[column], left=left, label=stage)
        left += milliseconds[column].to_numpy()
    shares = milliseconds.sum() / milliseconds.to_numpy().sum()
    largest = shares.idxmax().removesuffix("_seconds")
    axis.invert_yaxis()
    axis.set(xlabel="ms an image, on one core")
    axis.set_title(f"{shares.max():.0%} of the tasks' time is the stage {largest!r}")
    axis.legend(ncols=len(STAGES), loc="upper center", bbox_to_anchor=(0.45, -0.3), columnspacing=1, handlelength=1)
    return figure


@_drawn
def plot_predictions(table: pd.DataFrame) -> Figure:
    """Predicted against measured seconds: `measured`, `predicted` and `fitted` (whether the model saw the run)."""
    figure, axis = plt.subplots(figsize=(0.75 * WIDTH, 1.4 * HEIGHT), layout="constrained")
    for fitted, rows in table.groupby("fitted"):
        axis.scatter(
            rows["measured"],
            rows["predicted"],
            s=70,
            marker="s" if fitted else "o",
            label="calibration" if fitted else "not seen before",
        )
    most = 1.1 * table[["measured", "predicted"]].to_numpy().max()
    line = np.array([0, most])
    axis.plot(line, line, color="gray", linestyle=":")
    axis.fill_between(line, 0.75 * line, 1.25 * line, color="gray", alpha=0.15, label="within 25 %")
    axis.set(xlabel="measured, s", ylabel="predicted, s", xlim=(0, most), ylim=(0, most))
    unseen = table[~table["fitted"]]
    errors = (unseen["predicted"] / unseen["measured"] - 1).abs()
    axis.set_title(f"{len(unseen)} predictions, off by {errors.median():.0%} (median) and {errors.max():.0%} (worst)")
    axis.legend()
    return figure


def compact(figure: Figure) -> Image.Image:
    """The figure in a few colors and a fourth of the bytes, because notebooks are committed with their pictures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB").quantize(64)


def _axes() -> tuple[Figure, plt.Axes]:
    return plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")


def _workers(tasks: pd.DataFrame) -> pd.DataFrame:
    """With the column `worker`: 0, 1, ... by host, executor and process."""
    return tasks.assign(worker=tasks.groupby(["host", "executor", "process"]).ngroup())
