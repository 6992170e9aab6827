"""The numbers that stand for an image in a space where similar images are near each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.errors import check_parameters
from helpers.tasks.interface import Arrays, Decoder, Sizes
from helpers.tasks.roles import Role, assign_roles, check_shapes


@dataclass(frozen=True)
class Parameters:
    """What an embedding is.

    Attributes:
        normalize: divide it by its Euclidean length, so that a product of two is the cosine of their angle.

    Raises:
        ConfigError: a value is of the wrong type.
    """

    normalize: bool = False

    def __post_init__(self) -> None:
        check_parameters(self)


def embed(
    pool: Callable[[np.ndarray], np.ndarray],
    outputs: Arrays,
    sizes: Sizes,
    manifest: Manifest,
    settings: Mapping[str, Any],
    arrays: Arrays,
) -> list[np.ndarray]:
    """Return the embedding of each image, float32 `[D]`.

    Args:
        pool: from the output to one vector per image, float32 `[B, D]`.
        outputs: one output.
        sizes: not used.
        manifest: not used.
        settings: values of the parameters.
        arrays: not used.
    """
    (values,) = outputs.values()
    vectors = pool(values)
    if Parameters(**settings).normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)  # zeros stay zeros
    return list(vectors)


def _flatten(values: np.ndarray) -> np.ndarray:
    """Vectors; sides of 1 do not count."""
    return values.reshape(len(values), -1)


def _take_first(tokens: np.ndarray) -> np.ndarray:
    """Of tokens `[B, T, D]` the first, which vision transformers have for the whole image."""
    return tokens[:, 0]


def _average(values: np.ndarray) -> np.ndarray:
    """The mean of tokens `[B, T, D]`, or of maps over their cells, whose channels are first unless the others agree."""
    if values.ndim == 4:
        return values.mean(axis=(1, 2) if values.shape[1] == values.shape[2] != values.shape[3] else (2, 3))
    return values.mean(axis=1)


def _decoder(pool: Callable[[np.ndarray], np.ndarray], *shapes: str) -> Decoder:
    roles = [[Role("embedding", shapes)]]
    return Decoder(partial(embed, pool), Parameters, partial(assign_roles, roles), partial(check_shapes, roles))


DECODERS = {
    "vector": _decoder(_flatten, "D", "D 1 1", "1 1 D"),
    "first": _decoder(_take_first, "T D"),
    "mean": _decoder(_average, "D H W", "T D"),
}
