"""The numbers that stand for an image in a space where similar images are near each other."""

from collections.abc import Mapping
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
    outputs: Arrays, sizes: Sizes, manifest: Manifest, settings: Mapping[str, Any], arrays: Arrays
) -> list[np.ndarray]:
    """Return the embedding of each image, float32 `[D]`.

    Args:
        outputs: one output `[B, D]`; sides of 1 do not count.
        sizes: not used.
        manifest: not used.
        settings: values of the parameters.
        arrays: not used.
    """
    (values,) = outputs.values()
    vectors = values.reshape(len(values), -1)
    if Parameters(**settings).normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)  # zeros stay zeros
    return list(vectors)


ROLES = [[Role("embedding", ("D", "D 1 1", "1 1 D"))]]

DECODERS = {"vector": Decoder(embed, Parameters, partial(assign_roles, ROLES), partial(check_shapes, ROLES))}
