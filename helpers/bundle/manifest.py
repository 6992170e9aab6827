"""A model bundle: a folder with an OpenVINO model and a manifest that says all a pipeline needs to run it.

    manifest.json   task, input, outputs, labels, post-processing, precision, source checkpoint, file hashes
    model.xml       the graph; takes uint8 images and normalises them itself
    model.bin       the weights
    priors.npy      anchors, where the task needs them

Executors import this module, so it needs the standard library only.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from helpers.errors import BundleError
from helpers.images.spec import COLORS, RESIZE_RULES, InputSpec
from helpers.storage import Storage

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class OutputSpec:
    """One float32 output of the graph: its name, and its shape for one image."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    name: str
    architecture: str
    task: str
    input: InputSpec
    outputs: tuple[OutputSpec, ...]
    labels: tuple[str, ...]
    postprocess: dict[str, Any]
    precision: str  # of the weights in the file: fp32, fp16 or int8; bf16 is fp16 for bf16 arithmetic
    arithmetic: str  # of the multiplications, as accuracy was checked with: f32, bf16 or f16
    flops: int  # floating-point operations for one image: two for each multiplication with its addition
    checkpoint: dict[str, str]  # file name and sha256 of what was exported
    quantization: dict[str, Any] = field(default_factory=dict)  # of int8: what it lost, as `quantization.Record` says
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when anything in the bundle does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def model(self) -> str:
        """Name and digest, for logs and caches; results have `pipeline.model_identity`, which a run changes too."""
        return f"{self.name}@{self.digest}"

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle's location and its manifest; the weights stay where they are until `read` is called."""

    storage: Storage
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """Return one of the bundle's files, checked against the manifest.

        Raises:
            BundleError: the file is missing, unreadable or not the one that was exported.
        """
        path = self.storage.join(name)
        try:
            content = self.storage.read(name)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}; copy the bundle again") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
            size = len(content)
            raise BundleError(
                f"{path} is damaged or truncated ({size} bytes): its hash is not the manifest's; "
                "copy or export the bundle again"
            )
        return content


def save_bundle(storage: Storage, manifest: Manifest, files: dict[str, bytes]) -> Bundle:
    """Write a bundle; the manifest last, so that a folder with a manifest is complete."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = replace(manifest, files=digests)
    storage.delete(MANIFEST)
    for name, content in files.items():
        storage.write(name, content)
    storage.write(MANIFEST, manifest.to_json().encode())
    return Bundle(storage, manifest)


def load_bundle(storage: Storage) -> Bundle:
    """Read and check a bundle's manifest.

    Raises:
        BundleError: there is no manifest, or it lacks something, or it has a value this version cannot run.
    """
    path = storage.join(MANIFEST)
    try:
        values = json.loads(storage.read(MANIFEST))
    except OSError as error:
        raise BundleError(
            f"no model bundle at {storage.root}: {MANIFEST} cannot be read ({error.strerror or error}); "
            "make one with `python -m helpers export`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path} has not format {FORMAT}; export the bundle again with this version")
    try:
        _check_types(values)
        manifest = Manifest(
            **{
                **values,
                "input": InputSpec(**_tuples(values["input"])),
                "outputs": tuple(OutputSpec(**_tuples(o)) for o in values["outputs"]),
                "labels": tuple(values["labels"]),
            }
        )
        _check(manifest, path)
    except (TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path} is incomplete or has unknown entries: {error}; export the bundle again") from None
    return Bundle(storage, manifest)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_types(values: dict[str, Any]) -> None:
    kinds = {"input": dict, "outputs": list, "labels": list, "postprocess": dict, "files": dict, "flops": int}
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is a {type(values[name]).__name__}, not a {kind.__name__}")
    sizes = [values["input"]["height"], values["input"]["width"]]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise TypeError(f"input.height and input.width are {sizes}, not positive whole numbers")


def _check(manifest: Manifest, path: str) -> None:
    spec = manifest.input
    if spec.color not in COLORS:
        raise BundleError(f"{path}: input.color is {spec.color!r}, not one of {', '.join(COLORS)}")
    if spec.resize not in RESIZE_RULES:
        raise BundleError(f"{path}: input.resize is {spec.resize!r}, not one of {', '.join(RESIZE_RULES)}")
    values = [spec.mean, spec.std]
    if not all(isinstance(v, tuple) and len(v) == COLORS[spec.color] for v in values):
        raise BundleError(f"{path}: input.mean and input.std need one value a channel, {COLORS[spec.color]}")
