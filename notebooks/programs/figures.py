"""Figures of images for a training: a grid, a grid with predictions, and the confusion of classes.

Figures are plain `matplotlib.figure.Figure` objects, so that a rank needs no display.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from helpers.images.drawing import draw

WIDTH, DPI = 12.0, 80  # inches, and pixels per inch, which keep executed notebooks small


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, `height` and `width` in inches."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plot_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str] = (),
    colors: Sequence[str] = (),
    columns: int = 8,
    width: float = WIDTH,
) -> Figure:
    """Draw images side by side.

    Args:
        images: uint8, `[height, width, 3]`, blue, green, red, or gray, `[height, width]` or `[height, width, 1]`.
        titles: of each; none by default.
        colors: of each title; black by default.
        columns: images per row.
        width: of the figure in inches.
    """
    rows, side = math.ceil(len(images) / columns), width / columns
    figure = new_figure(side * (1.15 if titles else 1.0) * rows, width)
    # Ticks, and titles that look for a place above them, would be laid out too, though nobody sees them.
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []}).ravel()
    for panel in panels:
        panel.set_axis_off()
        panel.set_title("", y=1.0)
    for panel, image in zip(panels, images, strict=False):
        panel.imshow(image[..., ::-1] if image.shape[2:] == (3,) else image, cmap="gray")
    for number, (panel, title) in enumerate(zip(panels, titles, strict=False)):
        panel.set_title(title, fontsize=7, color=colors[number] if colors else "black", y=1.0)
    return figure


def plot_predictions(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], count: int = 32
) -> Figure:
    """Draw the first images with their predicted classes; a mistake is red and names the true class too.

    Args:
        images: uint8 `[N, height, width]`.
        labels: true class indices, `[N]`.
        predictions: predicted class indices, `[N]`.
        classes: the name of each index.
        count: how many images at most.
    """
    pairs = list(zip(labels[:count], predictions[:count], strict=True))
    titles = [classes[p] if p == true else f"{classes[p]}\nis {classes[true]}" for true, p in pairs]
    return plot_grid(images[:count], titles, ["black" if p == true else "crimson" for true, p in pairs])


def plot_instances(
    images: Sequence[np.ndarray], predictions: Sequence[list[dict[str, Any]]], columns: int = 4
) -> Figure:
    """Draw images with masks, boxes, classes and scores, in colors that stay with the class.

    Args:
        images: uint8 `[height, width, 3]`, red, green, blue.
        predictions: of each image, as the pipeline's results hold them.
        columns: images per row.
    """
    drawn = [draw(image[..., ::-1], instances) for image, instances in zip(images, predictions, strict=True)]
    return plot_grid(drawn, columns=columns, width=2.6 * columns)


def plot_confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw how often each true class (row) is predicted as each class (column); arguments as for `plot_predictions`."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    figure = new_figure(5.6, width=6.4)
    matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
    display = ConfusionMatrixDisplay(matrix, display_labels=classes)
    display.plot(ax=figure.subplots(), cmap="Blues", xticks_rotation=45, values_format="d", colorbar=False)
    return figure
