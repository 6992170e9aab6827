"""The networks this project can export, and what their bundles' manifests say of input, labels and post-processing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.bundle import InputSpec
from helpers.errors import BundleError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Architecture:
    """How to build a network and what it is for.

    Attributes:
        build: returns the `torch.nn.Module`, which takes normalised float32 `[B, channels, height, width]`.
        outputs: names of its outputs, in order.
    """

    name: str
    task: str
    build: Callable[[], "torch.nn.Module"]
    input: InputSpec
    outputs: tuple[str, ...]
    labels: tuple[str, ...]
    postprocess: dict[str, Any]


def get_architecture(name: str) -> Architecture:
    """Look an architecture up by name; torch is imported here, not with this module.

    Raises:
        BundleError: there is none of that name.
    """
    if name not in _ARCHITECTURES:
        raise BundleError(f"no architecture {name!r}; there are {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[name]()


def _fashion_cnn() -> Architecture:
    from helpers.fashion_cnn import MEAN, STD, FashionCNN
    from helpers.fashion_mnist import CLASSES

    return Architecture(
        name="fashion_cnn",
        task="classification",
        build=FashionCNN,
        input=InputSpec(height=28, width=28, color="gray", mean=(MEAN,), std=(STD,)),
        outputs=("logits",),
        labels=tuple(CLASSES),
        postprocess={"top_k": 3},
    )


_ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"fashion_cnn": _fashion_cnn}
