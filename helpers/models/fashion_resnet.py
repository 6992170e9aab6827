"""A residual network for 28x28 grey images, better than `fashion_cnn` and still trained on a CPU in minutes."""

import torch
from torch import nn

WIDTH = 16  # channels at 28x28; 4 times as many at 14x14, 8 times at 7x7


class FashionResNet(nn.Module):
    """A 3x3 stem at full resolution, then one residual block a resolution (28, 14, 7), mean, one linear layer.

    Blocks are those of He et al., arXiv:1512.03385, figure 5 left, with the shortcut that averages before its 1x1
    convolution (He et al., arXiv:1812.01187, section 4.2). The stem keeps the resolution, because
    details of 28x28 pixels are few; its width is small because at that resolution elementwise work takes longer than
    convolution on a CPU with matrix units.
    """

    def __init__(self, width: int = WIDTH, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 4 * width, stride=2),
            ResidualBlock(4 * width, 8 * width, stride=2),
        )
        self.classifier = nn.Linear(8 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised float32 images `[B, 1, 28, 28]` to logits `[B, classes]`."""
        return self.classifier(self.embed(images))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """The last hidden layer, `[B, 8 * width]`, of normalised images."""
        return self.features(images).mean((2, 3))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        project = [nn.Conv2d(inputs, outputs, 1, bias=False)] if inputs != outputs else []
        self.shortcut = nn.Sequential(*([nn.AvgPool2d(stride)] if stride > 1 else []), *project)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map `[B, inputs, height, width]` to `[B, outputs, height / stride, width / stride]`."""
        return nn.functional.relu(self.residual(images) + self.shortcut(images), inplace=True)


class MirrorAveraged(nn.Module):
    """The mean of a network's logits for an image and for its mirror image, which is what a bundle computes."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalised float32 images `[B, 1, 28, 28]` to logits `[B, classes]`."""
        return (self.network(images) + self.network(images.flip(3))) / 2
