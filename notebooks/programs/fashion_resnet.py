"""A residual network for 28x28 gray images, better than `FashionCNN`; it too trains on a CPU in minutes."""

import torch
from torch import nn

WIDTH = 16  # channels at 28x28; 4, 8 and 16 times as many at 14x14, 7x7 and 3x3


class FashionResNet(nn.Module):
    """A 3x3 convolution at full resolution, three stages that halve it (14, 7, 3), mean, one linear layer.

    It follows the ResNet-9 of Page, "How to train your ResNet", part 4 (2018), where a stage pools before it
    normalizes. On a CPU with matrix units, elementwise work takes longer than convolution, and this order quarters it.
    The first convolution is narrow for the same reason. It keeps the resolution because 28x28 pixels have few details.
    """

    def __init__(self, width: int = WIDTH, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            Stage(width, 4 * width),
            Stage(4 * width, 8 * width),
            Stage(8 * width, 16 * width),
        )
        self.classifier = nn.Linear(16 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalized float32 images `[B, 1, 28, 28]` to logits `[B, classes]`.

        In evaluation they are the mean of those of an image and of its mirror image.
        """
        logits = self.classifier(self.embed(images))
        return logits if self.training else (logits + self.classifier(self.embed(images.flip(3)))) / 2

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer, `[B, 16 * width]`, of normalized images."""
        return self.features(images).mean((2, 3))


class Stage(nn.Module):
    """Convolution, 2x2 max-pool, batch norm and ReLU, plus a convolution of their output with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )
        self.residual = nn.Sequential(
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map `[B, inputs, height, width]` to `[B, outputs, height // 2, width // 2]`."""
        reduced = self.reduce(images)
        return reduced + self.residual(reduced)
