"""Figures of images for a training: a grid, a grid with predictions, and the confusion of classes.

Figures are plain `matplotlib.figure.Figure` objects, so that a rank needs no display. Importing this imports no
matplotlib, as most ranks draw nothing.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.images.drawing import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, DPI = 12.0, 80  # inches, and pixels per inch, which keep executed notebooks small
FILLED, TITLE = 0.94, 0.17  # of a column's width: an image's longer side, and the room above it for two lines


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure, `height` and `width` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plot_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str] = (),
    colors: Sequence[str] = (),
    columns: int = 8,
    width: float = WIDTH,
) -> "Figure":
    """Draw images side by side.

    Args:
        images: uint8, `[height, width, 3]`, blue, green, red, or gray, `[height, width]` or `[height, width, 1]`.
        titles: of each; none by default.
        colors: of each title; black by default.
        columns: images per row.
        width: of the figure in inches.
    """
    rows, side = math.ceil(len(images) / columns), width / columns
    above = TITLE if titles else 0.0
    figure = new_figure(side * (1 + above) * rows, width)
    # One panel whose unit is a column: to lay out and draw a panel per image takes ten times as long.
    figure.set_layout_engine("none")
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_axis_off()
    panel.set(xlim=(0, columns), ylim=((1 + above) * rows, 0))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        scale = FILLED / max(image.shape[:2])
        right, down = image.shape[1] * scale / 2, image.shape[0] * scale / 2  # from the middle
        x, y = column + 0.5, row * (1 + above) + above + 0.5
        shown = image[..., ::-1] if image.shape[2:] == (3,) else image
        panel.imshow(shown, cmap="gray", aspect="auto", extent=(x - right, x + right, y + down, y - down))
        if number < len(titles):
            color = colors[number] if colors else "black"
            panel.text(x, y - down - 0.02, titles[number], fontsize=7, color=color, ha="center", va="bottom")
    return figure


def plot_predictions(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str], count: int = 32
) -> "Figure":
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
) -> "Figure":
    """Draw images with masks, boxes, classes and scores, in colors that stay with the class.

    Args:
        images: uint8 `[height, width, 3]`, red, green, blue.
        predictions: of each image, as the pipeline's results hold them.
        columns: images per row.
    """
    drawn = [draw(image[..., ::-1], instances) for image, instances in zip(images, predictions, strict=True)]
    return plot_grid(drawn, columns=columns, width=2.6 * columns)


def plot_confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Draw how often each true class (row) is predicted as each class (column); arguments as for `plot_predictions`."""
    count, figure = len(classes), new_figure(5.6, width=6.4)
    matrix = np.bincount(labels.astype(int) * count + predictions, minlength=count**2).reshape(count, count)
    panel = figure.subplots()
    panel.imshow(matrix, cmap="Blues")
    for (true, predicted), images in np.ndenumerate(matrix):
        color = "white" if images > matrix.max() / 2 else "black"
        panel.text(predicted, true, str(images), color=color, ha="center", va="center")
    panel.set(xlabel="Predicted label", ylabel="True label")
    panel.set_xticks(range(count), classes, rotation=45)
    panel.set_yticks(range(count), classes)
    return figure
