"""A model bundle: a folder with an OpenVINO model and a manifest that says all a pipeline needs to run it.

    manifest.json   task, input, outputs, labels, post-processing, precision, source checkpoint, file hashes
    model.xml       the graph; takes uint8 images and normalizes them itself
    model.bin       the weights
    priors.npy      anchors, where the task needs them

Executors import this module, so it needs the standard library only.
"""

import errno
import hashlib
import json
import math
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args, get_origin

from helpers.errors import BundleError
from helpers.images.spec import COLORS, InputSpec
from helpers.storage import Storage

FORMAT = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 * 2**20  # at most; a million labels fit
TENSOR_BYTES = 2**30  # of one image's input or output, at most
OPEN = -1  # a side of an output that differs from image to image
DEPTH = 8  # of what is free in form
LATER = {"decoder", "batch", "interpolation", "antialias", "resize_size", "padding", "position"}  # entries added since
MESSAGE = 200  # characters of a message that repeats names of the manifest's own
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class OutputSpec:
    """One float32 output of the graph: its name, and its shape for one image; -1 for a side that is open."""

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
    arithmetic: Literal["f32", "bf16", "f16"]  # of the multiplications, as accuracy was checked with: f32, bf16 or f16
    flops: int  # floating-point operations for one image: two for each multiplication with its addition
    checkpoint: dict[str, str]  # file name and sha256 of what was exported
    quantization: dict[str, Any] = field(default_factory=dict)  # of int8: what it lost, as `quantization.Record` says
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

    Raises BundleError if there is none, or it lacks something, or it has a value this version cannot run.
    """
    path = storage.join(MANIFEST)
    try:
        values = json.loads(storage.read(MANIFEST, MANIFEST_BYTES))
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise BundleError(
                f"{path} is longer than a manifest can be, {MANIFEST_BYTES} bytes; export the bundle again"
            ) from None
        raise BundleError(
            f"no model bundle at {storage.root}: {MANIFEST} cannot be read ({error.strerror or error}); "
            "make one with `python -m helpers export`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}); export the bundle again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{path} has not format {FORMAT}; export the bundle again with this version")
    try:
        manifest = _parse(Manifest, values, "")
        _check(manifest)
    except ValueError as error:
        raise BundleError(f"{path} is incomplete or wrong: {error}; export the bundle again") from None
    return Bundle(storage, manifest)


def _parse(kind: Any, value: Any, name: str) -> Any:
    """What JSON gave as a dataclass, tuple, dictionary or plain value of the annotated type; raises ValueError."""
    if is_dataclass(kind) and isinstance(kind, type):
        _expect(isinstance(value, dict), name or "the whole", value, "an object")
        known = {field.name: field for field in fields(kind)}
        required = {key for key, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        wrong = [f"no {_below(name, key)}" for key in sorted(required - set(value))]
        wrong += [f"an unknown {_below(name, key)}" for key in sorted(set(value) - set(known))]
        if wrong:
            raise ValueError(f"there is {wrong[0]}"[:MESSAGE])
        return kind(**{key: _parse(known[key].type, item, _below(name, key)) for key, item in value.items()})
    if get_origin(kind) is tuple:
        _expect(isinstance(value, list), name, value, "a list")
        return tuple(_parse(get_args(kind)[0], item, f"{name}[{position}]") for position, item in enumerate(value))
    if get_origin(kind) is dict:
        _expect(isinstance(value, dict), name, value, "an object")
        return {
            _plain(str, key, name): _parse(get_args(kind)[1], item, _below(name, key)) for key, item in value.items()
        }
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {str(value)[:40]!r}, not one of {', '.join(get_args(kind))}")
        return value
    return _free(value, name) if kind is Any else _plain(kind, value, name)


def _plain(kind: type, value: Any, name: str) -> Any:
    if kind is str:
        # Unpaired surrogates can be in no file and no table.
        _expect(isinstance(value, str) and not SURROGATES.search(value), name, value, "text")
    elif kind is bool:
        _expect(type(value) is bool, name, value, "true or false")
    elif kind is int:
        _expect(type(value) is int and abs(value) < 2**63, name, value, "a whole number of 64 bits")
    else:
        _expect(type(value) in (int, float) and abs(value) < 2**63, name, value, "a number")
    return value


def _free(value: Any, name: str, depth: int = 0) -> Any:
    """A value of any form, without what cannot be written again: endless numbers, and nesting without end."""
    if isinstance(value, dict | list):
        _expect(depth < DEPTH, name, value, f"nested {DEPTH} levels at most")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _free(item, name, depth + 1)
    elif value is not None and not isinstance(value, bool):
        _plain(str if isinstance(value, str) else float, value, name)
    return value


def _expect(is_so: bool, name: str, value: Any, expectation: str) -> None:
    if not is_so:
        shown = type(value).__name__ if isinstance(value, dict | list | str) else value
        raise ValueError(f"{name} is {shown}, not {expectation}"[:MESSAGE])


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
    _expect(manifest.flops >= 0, "flops", manifest.flops, "0 or more")
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
    if len(shape) > DEPTH or min(sides, default=1) < 1 or math.prod(sides) * item_bytes > TENSOR_BYTES:
        raise ValueError(f"{name} has the shape {str(shape)[:60]}, not one of 1 to {TENSOR_BYTES} bytes")


def _below(name: str, key: str) -> str:
    shown = ascii(key)[1:-1]  # it may be of any characters, and messages are of one line
    return f"{name}.{shown}" if name else shown
