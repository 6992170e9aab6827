"""The networks this project can export, and what their bundles' manifests say of input, labels and post-processing."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from helpers.errors import BundleError
from helpers.models.bundle import InputSpec
from helpers.yolact.configurations import CONFIGURATIONS, get_configuration

if TYPE_CHECKING:
    import numpy as np
    import torch


def unchanged(value: Any) -> Any:
    """What an architecture without peculiarities needs done to its weights and its network: nothing."""
    return value


@dataclass(frozen=True)
class Architecture:
    """How to build a network and what it is for.

    Attributes:
        build: returns the `torch.nn.Module`, which takes normalised float32 `[B, channels, height, width]`. A
            classifier's takes `width`, the channels of its first convolution.
        outputs: names of the exported outputs, in order.
        mend: takes a checkpoint's state dictionary and returns what the network must load without exception.
        heads: takes the network and returns the module to export, the one that has `outputs`.
        arrays: returns what post-processing needs beside the outputs, by the name of its `.npy` file in the bundle.
    """

    name: str
    task: str
    build: Callable[..., "torch.nn.Module"]
    input: InputSpec
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    postprocess: dict[str, Any]
    mend: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    heads: Callable[["torch.nn.Module"], "torch.nn.Module"] = unchanged
    arrays: Callable[[], dict[str, "np.ndarray"]] = dict


def get_architecture(name: str, labels: Sequence[str] = ()) -> Architecture:
    """Look an architecture up by name; torch is imported here, not with this module.

    Args:
        name: of the architecture.
        labels: classes in the place of its own, for a YOLACT that was trained on other data.

    Raises:
        BundleError: there is none of that name, or its classes are fixed.
    """
    if name not in _ARCHITECTURES:
        raise BundleError(f"no architecture {name!r}; there are {', '.join(_ARCHITECTURES)}")
    if labels and name not in CONFIGURATIONS:
        raise BundleError(f"{name} has fixed classes; only YOLACT architectures take those of a data set")
    return _yolact(name, labels) if labels else _ARCHITECTURES[name]()


def _fashion_cnn() -> Architecture:
    from helpers.data.fashion_mnist import CLASSES
    from helpers.models.fashion_cnn import MEAN, STD, FashionCNN

    return Architecture(
        name="fashion_cnn",
        task="classification",
        build=FashionCNN,
        input=InputSpec(height=28, width=28, color="gray", mean=(MEAN,), std=(STD,)),
        outputs=("logits",),
        labels=tuple(CLASSES),
        postprocess={"top_k": 3},
    )


def _fashion_resnet() -> Architecture:
    from helpers.models.fashion_resnet import FashionResNet, MirrorAveraged

    return replace(_fashion_cnn(), name="fashion_resnet", build=FashionResNet, heads=MirrorAveraged)


def _yolact(name: str, labels: Sequence[str] = ()) -> Architecture:
    from helpers.yolact.checkpoint import drop_stale_keys
    from helpers.yolact.detection import Parameters
    from helpers.yolact.network import OUTPUTS, RawHeads, Yolact
    from helpers.yolact.priors import make_priors

    configuration = get_configuration(name, labels)
    return Architecture(
        name=name,
        task="instance_segmentation",
        build=partial(Yolact, configuration),
        input=InputSpec(configuration.size, configuration.size, "rgb", configuration.mean, configuration.std),
        outputs=OUTPUTS,
        labels=configuration.labels,
        postprocess=asdict(Parameters()),
        mend=drop_stale_keys,
        heads=RawHeads,
        arrays=lambda: {"priors.npy": make_priors(configuration)},
    )


_ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "fashion_cnn": _fashion_cnn,
    "fashion_resnet": _fashion_resnet,
    **{name: partial(_yolact, name) for name in CONFIGURATIONS},
}
