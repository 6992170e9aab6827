"""ResNet and DarkNet, with the official checkpoints' names of weights.

A backbone maps normalized images float32 `[B, 3, H, W]` to its last three stages' features C3, C4 and C5, at 1/8, 1/16
and 1/32 of the size (rounded up); `channels` says how many each has.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

USED_STAGES = 3


class ResNet(nn.Module):
    """Residual network of bottleneck blocks (He et al., 2016, section 4.1 and table 1), without its classifier."""

    def __init__(self, blocks: tuple[int, ...]):
        super().__init__()
        widths = [64 * 2**stage for stage in range(len(blocks))]
        inputs = [64, *(4 * width for width in widths)]
        self.layers = nn.ModuleList(
            _stage(Bottleneck, inputs[stage], width, blocks[stage], stride=1 if stage == 0 else 2)
            for stage, width in enumerate(widths)
        )
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.channels = inputs[-USED_STAGES:]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return C3, C4 and C5."""
        features = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), kernel_size=3, stride=2, padding=1)
        return _last_stages(self.layers, features)


class SmallResNet(nn.Module):
    """Residual network of two-convolution blocks (He et al., 2016, figure 5 left) that trains on a processor.

    The stem halves the image and each stage halves it again, so that C3 to C5 are the last three of four stages.
    """

    def __init__(self, widths: tuple[int, ...], blocks: tuple[int, ...]):
        super().__init__()
        inputs = [widths[0], *widths]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.layers = nn.ModuleList(
            _stage(BasicBlock, inputs[stage], width, count, stride=2)
            for stage, (width, count) in enumerate(zip(widths, blocks, strict=True))
        )
        self.channels = list(widths[-USED_STAGES:])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return C3, C4 and C5."""
        return _last_stages(self.layers, self.stem(images))


class DarkNet(nn.Module):
    """Residual network of YOLOv3 (Redmon and Farhadi, 2018, table 1), without its classifier."""

    def __init__(self, blocks: tuple[int, ...]):
        super().__init__()
        widths = [32 * 2**stage for stage in range(len(blocks))]
        self.layers = nn.ModuleList(
            nn.Sequential(
                _darknet_unit(width, 2 * width, kernel=3, stride=2), *(DarkNetBlock(width) for _ in range(count))
            )
            for width, count in zip(widths, blocks, strict=True)
        )
        self._preconv = _darknet_unit(3, 32, kernel=3)
        self.channels = [2 * width for width in widths[-USED_STAGES:]]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return C3, C4 and C5."""
        return _last_stages(self.layers, self._preconv(images))


class DarkNetBlock(nn.Module):
    """1x1 and 3x3 convolution with a shortcut; nothing follows the sum."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = _darknet_unit(2 * width, width, kernel=1)
        self.conv2 = _darknet_unit(width, 2 * width, kernel=3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map `[B, 2 width, H, W]` to the same shape."""
        return features + self.conv2(self.conv1(features))


BACKBONES: dict[str, Callable[[], ResNet | SmallResNet | DarkNet]] = {
    "resnet50": lambda: ResNet((3, 4, 6, 3)),
    "resnet101": lambda: ResNet((3, 4, 23, 3)),
    "resnet_small": lambda: SmallResNet((32, 64, 128, 128), (2, 3, 2, 1)),
    "darknet53": lambda: DarkNet((1, 2, 8, 8, 4)),
}


def _stage(block: type[BasicBlock | Bottleneck], inputs: int, width: int, count: int, stride: int) -> nn.Sequential:
    """Blocks of which the first carries the stride, and projects its shortcut where that changes the shape."""
    outputs, first = block.expansion * width, block(inputs, width, stride)
    if stride > 1 or inputs != outputs:  # He et al., 2016, option B
        projection = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
        first.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))
    return nn.Sequential(first, *(block(outputs, width) for _ in range(count - 1)))


def _darknet_unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1))


def _last_stages(stages: nn.ModuleList, features: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for stage in stages:
        features = stage(features)
        outputs.append(features)
    return outputs[-USED_STAGES:]
