"""What a training run shows: its TensorBoard events, and the same figures for a notebook.

Figures are plain `matplotlib.figure.Figure` objects, so that a training process needs no display.
"""

import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.data.fashion_mnist import CLASSES
from helpers.errors import DataError
from helpers.images.pictures import draw

if TYPE_CHECKING:
    from torch import nn

EVENT_FILES = "events.out.tfevents.*"
WHOLE_FILES_ONLY = ("/Volumes/", "/dbfs/")  # Databricks' object storage: nothing can be appended to a file there
RANKS = r"throughput/rank_\d+"  # each process alone
DPI = 80  # keeps executed notebooks small
GRID = 32  # images in a grid of predictions
SMOOTHING_STEPS = 25  # of a moving mean, for curves measured at every step


class Dashboard:
    """The TensorBoard events of one run: one directory, one run, tags named group/name."""

    charts: dict[str, dict[str, list]] = {}

    def __init__(self, run_dir: str, steps: int = 0):
        """Start the run, or go on with it.

        Args:
            run_dir: events that an earlier run left there are deleted, or curves would mix.
            steps: after how many the run goes on; its events up to there stay.
        """
        from torch.utils.tensorboard import SummaryWriter

        for old in [] if steps else Path(run_dir).glob(EVENT_FILES):
            old.unlink()
        self.run_dir = Path(run_dir)
        self.staging = tempfile.TemporaryDirectory() if run_dir.startswith(WHOLE_FILES_ONLY) else None
        folder = self.staging.name if self.staging else run_dir
        self.writer = SummaryWriter(folder, purge_step=steps + 1 if steps else None)
        self.writer.add_custom_scalars(self.charts)

    def log_step(self, step: int, measures: Mapping[str, float]) -> None:
        """Write what one iteration gave, as `train/NAME`."""
        for name, value in measures.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def log_epoch(self, step: int, measures: Mapping[str, float]) -> None:
        """Write an evaluation, at the step it followed: `test_NAME` becomes `test/NAME`, `val_NAME` `val/NAME`."""
        for name, value in measures.items():
            self.writer.add_scalar(name.replace("_", "/", 1), value, step)
        self.publish()

    def log_ranks(self, step: int, ranks: Sequence[tuple[float, float]]) -> None:
        """Write how each process did: one that holds the others up has a low throughput and does not wait.

        `ranks` has, of each, images/s of the time that it worked, and the share of its time that it waited for the
        gradients of the others.
        """
        for rank, (throughput, waiting) in enumerate(ranks):
            self.writer.add_scalar(f"throughput/rank_{rank}", throughput, step)
            self.writer.add_scalar(f"waiting/rank_{rank}", waiting, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()
        self.publish()

    def publish(self) -> None:
        """Let readers see everything so far."""
        self.writer.flush()
        if self.staging:
            shutil.copytree(self.staging.name, self.run_dir, copy_function=shutil.copyfile, dirs_exist_ok=True)


class TrainingDashboard(Dashboard):
    """What the training of a classifier shows."""

    charts = {
        "Training": {
            "loss": ["Multiline", ["train/loss", "val/loss", "test/loss"]],
            "accuracy": ["Multiline", ["train/accuracy", "val/accuracy", "test/accuracy"]],
            "throughput": ["Multiline", ["train/images_per_second", RANKS]],
        }
    }

    def log_final(
        self,
        model: "nn.Module",
        images: np.ndarray,
        labels: np.ndarray,
        probabilities: np.ndarray,
        hyperparameters: Mapping[str, float | str],
        kind: str,
    ) -> None:
        """Write what is known at the end: pictures, a PR curve a class, the graph, the hyper-parameters.

        Args:
            model: the trained network.
            images: uint8 `[N, 28, 28]`.
            labels: int64 `[N]`.
            probabilities: float32 `[N, classes]`.
            hyperparameters: numbers and text; beside them stands `final/KIND_accuracy`.
            kind: `test`, or `val` for held-out images.
        """
        predictions = probabilities.argmax(axis=1)
        self.writer.add_figure("predictions/first", plot_predictions(images, labels, predictions))
        wrong = np.flatnonzero(predictions != labels)
        if len(wrong):
            mistakes = plot_predictions(images[wrong], labels[wrong], predictions[wrong])
            self.writer.add_figure("predictions/mistakes", mistakes)
        self.writer.add_figure("confusion/matrix", plot_confusion_matrix(labels, predictions))
        for index, name in enumerate(CLASSES):
            self.writer.add_pr_curve(f"precision_recall/{name}", labels == index, probabilities[:, index])
        self._log_graph(model)
        # Without a run_name this would make a second run, named after the clock.
        accuracy = {f"final/{kind}_accuracy": float((predictions == labels).mean())}
        self.writer.add_hparams(dict(hyperparameters), accuracy, run_name=".")

    def _log_graph(self, model: "nn.Module") -> None:
        import torch

        example = torch.zeros(1, 1, 28, 28, device=next(model.parameters()).device)
        with warnings.catch_warnings():
            # TensorBoard draws the traced graph, and tracing is deprecated in favour of what it cannot draw.
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
            self.writer.add_graph(model, example)


class SegmentationDashboard(Dashboard):
    """What the training of an instance segmentation shows."""

    charts = {
        "Training": {
            "losses": ["Multiline", [f"train/{name}loss" for name in ("", "class_", "box_", "mask_", "semantic_")]],
            "average precision": ["Multiline", ["val/AP", "val/AP50", "val/AP75"]],
            "throughput": ["Multiline", ["train/scenes_per_second", RANKS]],
        }
    }

    def log_pictures(
        self, step: int, images: Sequence[np.ndarray], predictions: Sequence[list[dict[str, Any]]]
    ) -> None:
        """Write images with what was found in them drawn on; the arguments are those of `plot_instances`."""
        self.writer.add_figure("predictions/validation", plot_instances(images, predictions), step)


def read_scalars(run_dir: str) -> dict[str, pd.DataFrame]:
    """Read a run's scalars back from its event files.

    Returns:
        For each tag a table of `step`, `wall_time` (seconds since 1970) and `value`, a row a measurement.

    Raises:
        DataError: the directory holds no events.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not any(Path(run_dir).glob(EVENT_FILES)):
        raise DataError(f"no TensorBoard events in {run_dir}: train first")
    # 0 keeps every event; the default keeps a sample.
    events = EventAccumulator(run_dir, size_guidance={SCALARS: 0}).Reload()
    columns = ["wall_time", "step", "value"]
    return {tag: pd.DataFrame(events.Scalars(tag), columns=columns) for tag in events.Tags()["scalars"]}


def plot_training(runs: Mapping[str, str]) -> Figure:
    """Draw loss, accuracy and throughput against the training step.

    Args:
        runs: a name for the legend and the run directory, for each run to compare.
    """
    figure = Figure(figsize=(12, 3.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 3)
    for index, (name, run_dir) in enumerate(runs.items()):
        scalars, colour = read_scalars(run_dir), f"C{index}"
        for panel, measure in zip(panels, ("loss", "accuracy", "images_per_second"), strict=True):
            steps = scalars[f"train/{measure}"]
            smooth = steps["value"].rolling(SMOOTHING_STEPS, min_periods=1).mean()
            panel.plot(steps["step"], smooth, color=colour, linewidth=1, alpha=0.7, label=f"{name}, train")
            if f"test/{measure}" in scalars:
                test = scalars[f"test/{measure}"]
                panel.plot(test["step"], test["value"], "o--", color=colour, markersize=4, label=f"{name}, test")
            panel.set(title=measure.replace("_", " "), xlabel="step")
            panel.grid(alpha=0.3)
    panels[1].set_ylim(0.7, 1.0)
    panels[2].set_ylim(bottom=0)
    panels[0].legend(fontsize="small")
    return figure


def plot_losses(run_dir: str) -> Figure:
    """Draw each term of the loss, and the learning rate, against the training step."""
    scalars = read_scalars(run_dir)
    figure = Figure(figsize=(12, 2.8), dpi=DPI, layout="constrained")
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
    figure = Figure(figsize=(12, 3.2), dpi=DPI, layout="constrained")
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


def plot_confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str] = CLASSES) -> Figure:
    """Draw how often each true class (row) was taken for each class (column).

    Args:
        labels: true class indices, `[N]`.
        predictions: predicted class indices, `[N]`.
        classes: the name of each index.
    """
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    figure = Figure(figsize=(6.4, 5.6), dpi=DPI, layout="constrained")
    matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
    display = ConfusionMatrixDisplay(matrix, display_labels=classes)
    display.plot(ax=figure.subplots(), cmap="Blues", xticks_rotation=45, values_format="d", colorbar=False)
    return figure


def plot_predictions(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str] = CLASSES,
    count: int = GRID,
) -> Figure:
    """Draw the first images with what they were taken for; a mistake is red and names the true class too.

    Args:
        images: uint8 `[N, 28, 28]`.
        labels: true class indices, `[N]`.
        predictions: predicted class indices, `[N]`.
        classes: the name of each index.
        count: how many images at most.
    """
    count, columns = min(count, len(images)), 8
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * 1.3, rows * 1.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, image, label, prediction in zip(panels, images[:count], labels, predictions, strict=False):
        panel.imshow(image, cmap="gray")
        title = classes[prediction] if prediction == label else f"{classes[prediction]}\nis {classes[label]}"
        panel.set_title(title, fontsize=7, color="black" if prediction == label else "crimson")
    return figure


def plot_instances(
    images: Sequence[np.ndarray], predictions: Sequence[list[dict[str, Any]]], columns: int = 4
) -> Figure:
    """Draw images with masks, boxes, classes and scores, in colours that stay with the class.

    Args:
        images: uint8 `[height, width, 3]`, red, green, blue.
        predictions: of each image, as the pipeline's results hold them.
        columns: images beside each other.
    """
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(columns * 2.6, rows * 2.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, image, found in zip(panels, images, predictions, strict=False):
        panel.imshow(draw(image[..., ::-1], found)[..., ::-1])
    return figure
