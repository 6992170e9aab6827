"""TensorBoard's projector: what a network makes of images, as points that carry the images themselves."""

import shutil
from pathlib import Path

import numpy as np
import torch

from helpers.data.fashion_mnist import CLASSES
from helpers.models.fashion_cnn import normalise
from helpers.models.fashion_resnet import FashionResNet
from helpers.training.dashboards import Dashboard

POINTS = 1000  # of 28x28 pixels, 32 a row: the sprite stays far below the 8192 pixels a side that the projector takes


def log_embedding(
    dashboard: Dashboard, model: FashionResNet, images: np.ndarray, labels: np.ndarray, count: int = POINTS
) -> np.ndarray:
    """Write the last hidden layer of the first images to a dashboard, with their classes and a sprite of them.

    Args:
        dashboard: of the run; an earlier embedding in it is replaced.
        model: the network.
        images: uint8 `[N, 28, 28]`.
        labels: int64 `[N]`, indices into `CLASSES`.
        count: how many points at most.

    Returns:
        The points, float32 `[count, channels]`.
    """
    images, labels = images[:count], labels[:count]
    points = embed(model, images)
    writer = dashboard.writer
    # Which folder an embedding goes to is told by its step and tag: 0 and "default".
    shutil.rmtree(Path(writer.get_logdir(), "00000"), ignore_errors=True)
    pictures = torch.as_tensor(images).unsqueeze(1).float() / 255
    writer.add_embedding(points, [CLASSES[label] for label in labels], pictures, global_step=0, tag="default")
    return points


@torch.inference_mode()
def embed(model: FashionResNet, images: np.ndarray) -> np.ndarray:
    """The last hidden layer for uint8 images `[N, 28, 28]`: float32 `[N, channels]`."""
    model.eval()
    device = next(model.parameters()).device
    return model.embed(normalise(torch.as_tensor(images).to(device))).float().cpu().numpy()
