"""The networks this project can export, and what their bundles' manifests say of input, labels and post-processing."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.errors import BundleError
from helpers.export import cards
from helpers.images.spec import InputSpec
from helpers.yolact.configurations import CONFIGURATIONS, get_configuration

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import openvino as ov
    import torch

    from helpers.export.checks import Trial

LIBRARIES = ("torchvision", "timm")
STALE = re.compile(r"backbone\.layer(?!s)|fpn\.downsample_layers\.(?![01]\.)\d+\.")


def unchanged(value: Any) -> Any:
    """What an architecture without peculiarities needs done to its weights and its network: nothing."""
    return value


def no_network() -> "torch.nn.Module":
    """What a model's file builds."""
    raise BundleError("a model that was read from a file has no PyTorch network")


def no_weights() -> "torch.nn.Module":
    """What an architecture gives whose weights are in no library."""
    raise BundleError("this network needs weights: name a PyTorch state dictionary with --checkpoint")


@dataclass(frozen=True)
class Architecture:
    """What a model is for, and of a PyTorch network how to build it."""

    name: str
    task: str
    input: InputSpec
    outputs: tuple[str, ...]  # names of the exported outputs, in order; they are the roles of the task's decoder
    labels: tuple[str, ...]
    postprocess: dict[str, Any]
    decoder: str = ""  # how the outputs are read; empty for the task's first
    # Returns the `torch.nn.Module`, which takes normalized float32 `[B, channels, height, width]`.
    build: Callable[..., "torch.nn.Module"] = no_network
    # Returns the network with the weights of the library that it is from.
    build_pretrained: Callable[[], "torch.nn.Module"] = no_weights
    weights: str = ""  # their name
    # Takes a checkpoint's state dictionary and returns the one that the network must load whole.
    adapt_state_dict: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    # Takes the network and returns the module to export, the one that has `outputs`.
    export_module: Callable[["torch.nn.Module"], "torch.nn.Module"] = unchanged
    # Returns what post-processing needs beside the outputs, by the name of its `.npy` file in the bundle.
    arrays: Callable[[], dict[str, "np.ndarray"]] = dict
    trial: "Trial | None" = None  # of the graph of a file, which was tried when it was read

    @classmethod
    def of_card(cls, name: str, card: cards.Card, outputs: Iterable[str], **others: Any) -> "Architecture":
        """What a card says; the others are attributes that it says nothing of, or something else."""
        spec = others.pop("input", None) or card.input.to_spec()
        return cls(name, card.task, spec, tuple(outputs), card.labels, dict(card.postprocess), card.decoder, **others)


@dataclass(frozen=True)
class Converted:
    """A model on its way to a bundle."""

    model: "ov.Model"  # takes uint8 images, and its outputs are named for their roles
    architecture: Architecture  # what it is
    file: Path | None  # it is from; None for a library's own weights
    # Takes normalized float32 `[B, C, H, W]`, and has the same outputs; None where there is no such graph.
    onnx: "onnx.ModelProto | None"


def get_architecture(name: str, labels: Sequence[str] = (), card: Path | None = None) -> Architecture:
    """Look an architecture up by name; torch is imported here, not with this module.

    The name is of a card in `conf/cards`, the path of a card, a YOLACT network (`helpers.yolact.configurations`), or
    one of a library: `torchvision:NAME` or `timm:NAME`. Labels take the place of its own, for a YOLACT that was trained
    on other data, and the card changes what a library says of its network. Raises BundleError if there is none of that
    name, its card or what that names cannot be used, or its classes are fixed.
    """
    library, colon, _ = name.partition(":")
    if colon and library in LIBRARIES:
        from helpers.export.library import describe

        return describe(name, card)
    if card:
        raise BundleError(f"{name} is described already: --card is for model files, torchvision:NAME and timm:NAME")
    if name in CONFIGURATIONS:
        return _yolact(name, labels)
    if labels:
        raise BundleError(f"{name} has fixed classes; only YOLACT architectures take those of a data set")
    if name.endswith((".yaml", ".yml")):
        return _from_card(Path(name))
    if name in cards.find_cards():
        return _from_card(cards.CARDS / f"{name}.yaml")
    known = ", ".join([*cards.find_cards(), *CONFIGURATIONS, "torchvision:NAME and timm:NAME"])
    raise BundleError(f"no architecture {name!r}; there are {known}; or name a model card's .yaml")


def drop_stale_keys(weights: dict[str, Any]) -> dict[str, Any]:
    """Return an official YOLACT checkpoint's state dictionary without the weights that no network has today.

    The published files hold second copies of the backbone's stages, under torchvision's names (`backbone.layerN...`),
    and layers of a pyramid above P7 that were built and never used (`fpn.downsample_layers.N...` from 2 on). The
    official loader drops both too. Nothing is renamed, and everything else must be there.
    """
    return {key: value for key, value in weights.items() if not STALE.match(str(key))}


def _from_card(path: Path) -> Architecture:
    card = cards.parse_card(cards.read_entries(path), path)
    for entry in ("network", "labels", "input.height", "input.width", "input.color", "input.mean", "input.std"):
        if not attrgetter(entry)(card) and (entry, card.task) != ("labels", "embedding"):
            raise BundleError(f"{path}: {entry} is missing: a PyTorch network does not say it; {cards.HELP}")
    outputs, arrays = card.outputs or ("logits",), partial(cards.read_arrays, card)
    return Architecture.of_card(path.stem, card, outputs, build=cards.load_network_class(card, path), arrays=arrays)


def _yolact(name: str, labels: Sequence[str] = ()) -> Architecture:
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
        adapt_state_dict=drop_stale_keys,
        export_module=RawHeads,
        arrays=lambda: {"priors.npy": make_priors(configuration)},
    )
