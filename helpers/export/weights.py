"""A checkpoint's weights: read without running code that may be in the file, and compared with a network's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from helpers.errors import BundleError, first_line
from helpers.export.architectures import Architecture

log = logging.getLogger(__name__)


def read_weights(architecture: Architecture, checkpoint: Path | BinaryIO, name: str) -> dict[str, Any]:
    """Read a state dictionary for networks of an architecture, without what these never load.

    Raises BundleError, which has the checkpoint's name, if the file is missing or damaged, or holds something else.
    """
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BundleError(f"{name}: no such checkpoint; notebook 01 makes one, or name your own") from None
    except Exception as error:  # for bytes that are no checkpoint, torch raises whatever its parsers come across
        raise BundleError(f"{name} is no PyTorch checkpoint or is damaged: {first_line(error)}") from None
    if not isinstance(weights, dict):
        raise BundleError(f"{name} holds a {type(weights).__name__}, not a state dictionary")
    return architecture.adapt_state_dict(weights)


def take_by_order(expected: Mapping[str, Any], weights: dict[str, Any], name: str) -> dict[str, Any]:
    """Give weights the names that a network expects where nothing but the names differs.

    Ports of a network often name its layers anew, and keep their order. Weights of another number, or with another
    shape, are returned as they are.
    """
    shapes, own = ([_shape(value) for value in values.values()] for values in (expected, weights))
    if expected.keys() == weights.keys() or shapes != own:
        return weights
    log.warning("%s has other names for its weights; they are taken in the network's order", name)
    return dict(zip(expected, weights.values(), strict=True))


def find_difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> str | None:
    """Describe the first key or shape in which one state dictionary is not as another; None where there is none."""
    for key in [*expected, *actual]:
        have = _shape(actual[key]) if key in actual else "missing"
        want = _shape(expected[key]) if key in expected else "unknown"
        if have != want:
            return f"{key} is {have}, expected {want}"
    return None


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else f"a {type(value).__name__}"
