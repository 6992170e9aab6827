"""The YOLACT network: feature pyramid, prototype branch and the head that all levels share.

Sections and equations are those of Bolya et al., "YOLACT: Real-time Instance Segmentation", ICCV 2019. The names and
shapes of the weights are the official checkpoints'.
"""

import torch
import torch.nn.functional as F
from torch import nn

from helpers.yolact.backbones import BACKBONES
from helpers.yolact.configurations import Configuration
from helpers.yolact.priors import level_sizes, make_priors

Features = list[torch.Tensor]
OUTPUTS = ("loc", "conf", "mask", "proto")  # what is exported; the anchors are constant, and go beside the graph


class Yolact(nn.Module):
    """Takes normalized RGB float32 `[B, 3, S, S]`; everything after the raw heads is in `detection` and `masks`."""

    priors: torch.Tensor

    def __init__(self, configuration: Configuration):
        super().__init__()
        self.configuration = configuration
        self.backbone = BACKBONES[configuration.backbone]()
        self.proto_net = _prototype_branch(configuration)
        self.fpn = FeaturePyramid(self.backbone.channels, configuration.features, len(configuration.scales))
        # A list of one, because the checkpoints number the heads, and four of their five share the first one's weights.
        self.prediction_layers = nn.ModuleList([PredictionHead(configuration)])
        self.semantic_seg_conv = nn.Conv2d(configuration.features, configuration.classes - 1, kernel_size=1)
        self.register_buffer("priors", torch.from_numpy(make_priors(configuration)), persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the raw heads.

        Returns:
            In evaluation mode `loc [B, A, 4]`, offsets to the anchors; `conf [B, A, classes]`, probabilities, the
            background first; `mask [B, A, prototypes]`, coefficients from -1 to 1; `priors [A, 4]`, the anchors;
            `proto [B, H, W, prototypes]`, not negative. All float32.
            In training mode `conf` is logits, and a sixth output is added: `[B, classes - 1, H, W]`, the semantic
            segmentation's logits on P3 (section 5), which exists for its loss only.
        """
        levels = self.fpn(self.backbone(images))
        proto = F.relu(self.proto_net(levels[0])).permute(0, 2, 3, 1)
        heads = zip(*(self.prediction_layers[0](level) for level in levels), strict=True)
        loc, conf, mask = (torch.cat(parts, dim=1) for parts in heads)
        priors = self._priors_of(levels)
        if self.training:
            return loc, conf, mask, priors, proto, self.semantic_seg_conv(levels[0])
        return loc, conf.softmax(dim=-1), mask, priors, proto

    def _priors_of(self, levels: Features) -> torch.Tensor:
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        if sizes == [(side, side) for side in level_sizes(self.configuration.size, len(levels))]:
            return self.priors
        return torch.from_numpy(make_priors(self.configuration, sizes)).to(self.priors.device)


class FeaturePyramid(nn.Module):
    """Feature pyramid without P2 and with levels above P5 (section 4; Lin et al., 2017).

    `lat_layers` and `pred_layers` go from the deepest level to the shallowest, as the checkpoints have them.
    """

    def __init__(self, channels: list[int], features: int, levels: int):
        super().__init__()
        self.lat_layers = nn.ModuleList(nn.Conv2d(count, features, kernel_size=1) for count in reversed(channels))
        self.pred_layers = nn.ModuleList(_convolution(features) for _ in channels)
        self.downsample_layers = nn.ModuleList(_convolution(features, stride=2) for _ in range(levels - len(channels)))

    def forward(self, stages: Features) -> Features:
        """Map C3, C4 and C5 to P3, P4, P5 and what is above, each `[B, features, height, width]`."""
        levels: Features = []
        total = None
        for lateral, predict, stage in zip(self.lat_layers, self.pred_layers, reversed(stages), strict=True):
            sideways = lateral(stage)
            if total is not None:
                # To this level's own size: the sides are not always twice those above (18, 35, 69).
                sideways = sideways + F.interpolate(total, sideways.shape[2:], mode="bilinear", align_corners=False)
            total = sideways
            levels.insert(0, F.relu(predict(total)))
        for downsample in self.downsample_layers:
            levels.append(downsample(levels[-1]))
        return levels


class PredictionHead(nn.Module):
    """Boxes, classes and mask coefficients of each anchor of a level (section 3.2, figure 4)."""

    def __init__(self, configuration: Configuration):
        super().__init__()
        features, anchors = configuration.features, len(configuration.ratios)
        self.classes, self.prototypes = configuration.classes, configuration.prototypes
        self.upfeature = nn.Sequential(_convolution(features), nn.ReLU())
        self.bbox_layer = _convolution(features, anchors * 4)
        self.conf_layer = _convolution(features, anchors * self.classes)
        self.mask_layer = _convolution(features, anchors * self.prototypes)

    def forward(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map `[B, features, H, W]` to loc `[B, H W anchors, 4]`, conf logits and mask coefficients likewise."""
        shared = self.upfeature(level)
        loc = _by_anchor(self.bbox_layer(shared), 4)
        conf = _by_anchor(self.conf_layer(shared), self.classes)
        # tanh, so that a prototype can be subtracted too.
        return loc, conf, _by_anchor(self.mask_layer(shared), self.prototypes).tanh()


class RawHeads(nn.Module):
    """What of a network in evaluation mode is exported: `OUTPUTS`, in order."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map normalized images `[B, 3, S, S]` to loc, conf, mask and proto."""
        loc, conf, mask, _, proto = self.network(images)
        return loc, conf, mask, proto


def _prototype_branch(configuration: Configuration) -> nn.Sequential:
    """From P3 to as many maps as there are prototypes, at twice its size (section 3.1, figure 3)."""
    features = configuration.features
    before = [layer for _ in range(3) for layer in (_convolution(features), nn.ReLU())]
    return nn.Sequential(
        *before,
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        nn.ReLU(),
        _convolution(features),
        nn.ReLU(),
        nn.Conv2d(features, configuration.prototypes, kernel_size=1),
    )


def _convolution(inputs: int, outputs: int | None = None, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs or inputs, kernel_size=3, stride=stride, padding=1)


def _by_anchor(maps: torch.Tensor, values: int) -> torch.Tensor:
    """`[B, anchors x values, H, W]` to `[B, H W anchors, values]`, by row, column and anchor."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, values)
