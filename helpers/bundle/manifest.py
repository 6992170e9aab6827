"""A model bundle: a folder with an OpenVINO model and a manifest that says all a pipeline needs to run it.

    manifest.json   task, input, outputs, labels, post-processing, precision, source checkpoint, file hashes
    model.xml       the graph; takes uint8 images and normalizes them itself
    model.bin       the weights
    priors.npy      anchors, where the task needs them

Executors import this module, so importing it needs the standard library only.
"""

import errno
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

from helpers.errors import BundleError
from helpers.images.spec import COLORS, STRICT, InputSpec
from helpers.storage import Storage

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 * 2**20  # at most; a million labels fit
TENSOR_BYTES = 2**30  # of one image's input or output, at most
OPEN = -1  # a side of an output that differs from image to image
DIMENSIONS = 8  # of an output, at most
LATER = {"decoder", "batch", "interpolation", "antialias", "resize_size", "padding", "position"}  # entries added since
Setting = bool | int | float | str | None | list[bool | int | float | str]  # of post-processing
MESSAGE = 200  # characters of a message that repeats names of the manifest's own


@dataclass(frozen=True)
class OutputSpec:
    """One float32 output of the graph: its name, and its shape for one image; -1 for a side that is open."""

    __pydantic_config__ = STRICT

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    __pydantic_config__ = STRICT

    name: str
    architecture: str
    task: str
    input: InputSpec
    outputs: tuple[OutputSpec, ...]
    labels: tuple[str, ...]
    postprocess: dict[str, Setting]
    precision: str  # of the weights in the file: fp32, fp16 or int8; bf16 is fp16 for bf16 arithmetic
    arithmetic: Literal["f32", "bf16", "f16"]  # of the multiplications, as accuracy was checked with
    flops: int  # floating-point operations for one image: two for each multiplication with its addition
    checkpoint: dict[str, str]  # file name and sha256 of what was exported
    quantization: dict[str, Setting] = field(default_factory=dict)  # what int8 lost, as `quantization.Record` says
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256
    format: int = FORMAT
    decoder: str = ""  # how the task reads the outputs; empty for the task's first
    batch: int = 0  # images that the graph takes at a time, 1 or any number (0)

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that change when anything in the bundle does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def model(self) -> str:
        """Name and digest, for logs and caches; results have `pipeline.model_identity`, which a run changes too."""
        return f"{self.name}@{self.digest}"

    def to_json(self) -> str:
        """The text of `manifest.json`; entries that older bundles lack are left out where they say nothing."""
        values = asdict(self)
        for entries, kind in ((values, Manifest), (values["input"], InputSpec)):
            for f in fields(kind):
                if f.name in LATER and entries[f.name] == f.default:
                    del entries[f.name]
        return json.dumps(values, indent=2) + "\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle's location and its manifest; the weights stay where they are until `read` is called."""

    storage: Storage
    manifest: Manifest
    registered: str = ""  # name/version, of one that comes from a registry of models

    def read(self, name: str) -> bytes:
        """Return one of the bundle's files; raises BundleError unless it is there, and the one that was exported."""
        path = self.storage.join(name)
        try:
            content = self.storage.read(name)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}; copy the bundle again") from None
        if hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
            why = f"({len(content)} bytes): its hash is not the manifest's"
            raise BundleError(f"{path} is damaged or truncated {why}; copy or export the bundle again")
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

    Raises BundleError if there is none, or it lacks something, or it has a value this version cannot run.
    """
    path = storage.join(MANIFEST)
    try:
        content = storage.read(MANIFEST, MANIFEST_BYTES)
        values = json.loads(content)
    except OSError as error:
        if error.errno == errno.EFBIG:
            why = f"is longer than a manifest can be, {MANIFEST_BYTES} bytes"
            raise BundleError(f"{path} {why}; export the bundle again") from None
        why = f"no model bundle at {storage.root}: {MANIFEST} cannot be read ({error.strerror or error})"
        raise BundleError(f"{why}; make one with `python -m helpers export`") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path} has not format {FORMAT}; export the bundle again with this version")
    try:
        manifest = _parse(content)
        _check(manifest)
    except ValueError as error:
        raise BundleError(f"{path} is incomplete or wrong: {error}; export the bundle again") from None
    return Bundle(storage, manifest)


def _parse(content: bytes) -> Manifest:
    """A manifest of the annotated types; raises ValueError, which says what is wrong first."""
    from pydantic import TypeAdapter, ValidationError  # no task of a run reads a manifest

    try:
        return TypeAdapter(Manifest).validate_json(content, strict=True)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
    name = ascii(".".join(map(str, problem["loc"])))[1:-1]  # it may be of any characters, and messages are of one line
    told = {"missing": f"there is no {name}", "unexpected_keyword_argument": f"there is an unknown {name}"}
    raise ValueError(told.get(problem["type"], f"{name}: {problem['msg']}")[:MESSAGE])


def _expect(is_so: bool, name: str, value: Any, expectation: str) -> None:
    if not is_so:
        raise ValueError(f"{name} is {value}, not {expectation}"[:MESSAGE])


def _check(manifest: Manifest) -> None:
    """What the types do not say; raises ValueError."""
    spec = manifest.input
    for name, values in (("input.mean", spec.mean), ("input.std", spec.std)):
        if len(values) != COLORS[spec.color]:
            raise ValueError(f"{name} needs one value per channel, {COLORS[spec.color]}")
    _expect(all(value > 0 for value in spec.std), "input.std", min(spec.std), "above 0")
    _expect(0 <= spec.scaled_decoding <= 1000, "input.scaled_decoding", spec.scaled_decoding, "from 0 to 1000")
    _expect(0 <= spec.resize_size <= 65535, "input.resize_size", spec.resize_size, "from 0 to 65535")
    _expect(0 <= spec.padding <= 255, "input.padding", spec.padding, "from 0 to 255")
    _expect(manifest.batch in (0, 1), "batch", manifest.batch, "0 or 1")
    _expect(0 <= manifest.flops < 2**63, "flops", manifest.flops, "a number of 0 or more and 64 bits")
    _check_size("input", spec.shape, 1)
    for output in manifest.outputs:
        _check_size(f"outputs: {output.name[:40]!r}", output.shape, 4, may_be_open=manifest.batch == 1)
    names = [output.name for output in manifest.outputs]
    if not names or len(set(names)) < len(names):
        raise ValueError("outputs are none, or two have the same name")
    for name in manifest.files:
        if not re.fullmatch(r"[^/\\\0]+", name) or name in (".", "..", MANIFEST):
            raise ValueError(f"files names {name[:40]!r}, which is no file of the bundle's own folder")


def _check_size(name: str, shape: tuple[int, ...], item_bytes: int, may_be_open: bool = False) -> None:
    sides = [side for side in shape if side != OPEN or not may_be_open]
    if len(shape) > DIMENSIONS or min(sides, default=1) < 1 or math.prod(sides) * item_bytes > TENSOR_BYTES:
        raise ValueError(f"{name} has the shape {str(shape)[:60]}, not one of 1 to {TENSOR_BYTES} bytes")
