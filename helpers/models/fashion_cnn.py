"""The small convolutional network that notebook 01 trains, for 28x28 grey images."""

import numpy as np
import torch
from torch import nn

# Of the 60,000 training images, pixels from 0 to 255; the input is (pixel - MEAN) / STD.
MEAN = 72.9404
STD = 90.0212
EVALUATION_BATCH = 1000  # images at once, which bounds the memory of an evaluation


class FashionCNN(nn.Module):
    """Two blocks of 5x5 convolution, batch norm, ReLU and 2x2 max-pool, then one fully connected layer."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        first, second = width, 2 * width
        self.features = nn.Sequential(_block(1, first), _block(first, second))
        # Two halvings leave 7x7 positions of a 28x28 image.
        self.classifier = nn.Linear(7 * 7 * second, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised float32 images `[B, 1, 28, 28]` to logits `[B, classes]`."""
        return self.classifier(self.features(images).flatten(1))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images `[B, 28, 28]` into the network's input, float32 `[B, 1, 28, 28]`, channels last."""
    return images.unsqueeze(1).float().sub_(MEAN).div_(STD).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def compute_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Evaluate the network on uint8 images `[N, 28, 28]` in full precision: float32 logits `[N, classes]`."""
    model.eval()
    return torch.cat([model(normalise(batch)) for batch in images.split(EVALUATION_BATCH)])


def predict(model: nn.Module, images: torch.Tensor | np.ndarray) -> np.ndarray:
    """Classify uint8 images `[N, 28, 28]`: probabilities, float32 `[N, classes]`."""
    return compute_logits(model, torch.as_tensor(images)).softmax(dim=1).cpu().numpy()


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=5, padding=2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
