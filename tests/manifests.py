"""Manifests for tests of post-processing, which reads no graph."""

from helpers.bundle.manifest import Manifest, OutputSpec
from helpers.images.spec import InputSpec

LABELS = ("cat", "dog", "cup")


def make_manifest(task: str, decoder: str = "", labels=LABELS, height=64, width=96, postprocess=None, **entries):
    """Say what a network of some task takes and gives; `entries` are the input's, and `outputs` shapes by role."""
    outputs = tuple(OutputSpec(*item) for item in entries.pop("outputs", {"x": (1,)}).items())
    zeros = (0.0, 0.0, 0.0)
    return Manifest(
        name="net",
        architecture="net",
        task=task,
        decoder=decoder,
        input=InputSpec(height=height, width=width, color="rgb", mean=zeros, std=(1.0, 1.0, 1.0), **entries),
        outputs=outputs,
        labels=tuple(labels),
        postprocess=postprocess or {},
        precision="fp32",
        arithmetic="f32",
        flops=1,
        checkpoint={},
    )
