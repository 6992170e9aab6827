"""YOLACT (Bolya et al., ICCV 2019), compatible with the official version 1.0 checkpoints.

    configurations   the published networks' numbers, and the COCO classes
    backbones        ResNet and DarkNet                                          torch
    network          FPN, prototypes, shared head                                torch
    priors           anchors                                                     numpy
    detection        box decoding and non-maximum suppression                    numpy
    masks            mask assembly and COCO run-length encoding                  numpy

Executors import the last two, so importing this package imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helpers.yolact.network import Yolact


def build(architecture: str) -> "Yolact":
    """Make a network with random weights, whose `state_dict` has the official checkpoint's keys and shapes.

    Args:
        architecture: `yolact_base`, `yolact_resnet50`, `yolact_darknet53` or `yolact_im700`.

    Raises:
        BundleError: there is none of that name.
    """
    from helpers.yolact.configurations import get_configuration
    from helpers.yolact.network import Yolact

    return Yolact(get_configuration(architecture))
