"""YOLACT (Bolya et al., ICCV 2019), compatible with the official version 1.0 checkpoints.

    configurations   the networks' numbers, and the classes they tell apart
    backbones        ResNet and DarkNet                                          torch
    network          FPN, prototypes, shared head                                torch
    priors           anchors                                                     numpy
    detection        from raw heads to instances: boxes, non-maximum suppression numpy
    masks            mask assembly and COCO run-length encoding                  numpy

Executors import `detection` and `masks`, so importing this package imports no torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.yolact.network import Yolact


def build(architecture: str, labels: Sequence[str] = ()) -> "Yolact":
    """Make a network with random weights, whose `state_dict` has the official checkpoint's keys and shapes.

    Args:
        architecture: `yolact_base`, `yolact_resnet50`, `yolact_darknet53`, `yolact_im700` or `yolact_scenes`.
        labels: foreground classes in the place of the architecture's own; there is an output for each.

    Raises:
        BundleError: there is none of that name.
    """
    from helpers.yolact.configurations import get_configuration
    from helpers.yolact.network import Yolact

    return Yolact(get_configuration(architecture, labels))
