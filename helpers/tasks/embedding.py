"""The numbers that stand for an image in a space where similar images are near each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helpers.bundle.manifest import Manifest
from helpers.tasks.interface import Arrays, DecoderParameters, Sizes
from helpers.tasks.roles import Decoder, Role


@dataclass(frozen=True)
class Parameters(DecoderParameters):
    """What an embedding is."""

    normalize: bool = False  # divide it by its Euclidean length, so that a product of two is the cosine of their angle


def _average(values: np.ndarray) -> np.ndarray:
    """The mean of tokens `[B, T, D]`, or of maps over their cells, whose channels are first unless the others agree."""
    if values.ndim == 4:
        return values.mean(axis=(1, 2) if values.shape[1] == values.shape[2] != values.shape[3] else (2, 3))
    return values.mean(axis=1)


def _decoder(pool: Callable[[np.ndarray], np.ndarray], *shapes: str) -> Decoder:
    """The decoder of one output, which a function makes one vector per image of, float32 `[B, D]`."""

    def embed(
        outputs: Arrays, sizes: Sizes, manifest: Manifest, settings: Mapping[str, Any], arrays: Arrays
    ) -> list[np.ndarray]:
        (values,) = outputs.values()
        vectors = pool(values)
        if Parameters(**settings).normalize:
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)  # zeros stay zeros
        return list(vectors)

    return Decoder(embed, Parameters, [[Role("embedding", shapes)]])


DECODERS = {
    "vector": _decoder(lambda values: values.reshape(len(values), -1), "D", "D 1 1", "1 1 D"),
    "first": _decoder(lambda tokens: tokens[:, 0], "T D"),  # which vision transformers have for the whole image
    "mean": _decoder(_average, "D H W", "T D"),
}
