"""Instances with box and mask."""

from helpers.bundle.manifest import Manifest
from helpers.errors import BundleError
from helpers.tasks.interface import Arrays, Prediction
from helpers.tasks.roles import Role, are_shares, make_decoder
from helpers.yolact.detection import Parameters, find_instances

YOLACT = [
    Role("loc", ("A 4",)),
    Role("conf", ("A 1+C",), are_shares, values="from 0 to 1"),
    Role("mask", ("A P",)),
    Role("proto", ("H W P",)),
]


def _decode_yolact(
    outputs: Arrays, size: tuple[int, int], manifest: Manifest, parameters: Parameters, arrays: Arrays
) -> list[Prediction]:
    if "priors.npy" not in arrays:
        raise BundleError(f"{manifest.name} has no priors.npy, the anchors of its boxes; export the bundle again")
    priors = arrays["priors.npy"]
    if priors.shape != outputs["loc"].shape:
        raise BundleError(f"{manifest.name}: priors.npy is {priors.shape}, and not as its output loc; export it again")
    heads = [outputs[role.name] for role in YOLACT]
    return find_instances(heads, priors, parameters, manifest.input.width, size, manifest.labels)


DECODERS = {"yolact": make_decoder(_decode_yolact, Parameters, YOLACT)}
