"""Model cards: what a pipeline must know of a network that lies in a user's own program, as YAML.

`conf/cards` has the project's own; `fashion_cnn.yaml` explains the entries.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from helpers.bundle.manifest import COLORS
from helpers.config import PROJECT
from helpers.errors import BundleError, first_line
from helpers.images.spec import InputSpec

if TYPE_CHECKING:
    import torch

CARDS = PROJECT / "conf" / "cards"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CardInput(InputSpec):
    """What the network takes; see `bundle.InputSpec`."""

    color: Literal["rgb", "bgr", "gray"]
    resize: Literal["stretch", "letterbox", "crop"] = "stretch"

    def __post_init__(self) -> None:
        if {len(self.mean), len(self.std)} != {COLORS[self.color]}:
            raise ValueError(f"mean and std need {COLORS[self.color]} values, one per channel")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Card:
    """The entries of a card."""

    task: Literal["classification"]
    network: str  # FILE.py:CLASS
    labels: tuple[str, ...]
    input: CardInput
    postprocess: Mapping[str, Any]
    outputs: Mapping[str, str]  # the role of each output of the network, in order, and the name that it gets

    @property
    def spec(self) -> InputSpec:
        """The input as a bundle's manifest has it."""
        return InputSpec(**asdict(self.input))


def find_cards() -> list[str]:
    """The names of the project's own cards."""
    return sorted(path.stem for path in CARDS.glob("*.yaml"))


def read_card(path: Path) -> Card:
    """Read a card.

    Raises:
        BundleError: it is missing or no YAML, or lacks an entry or has a wrong one.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"there is no model card {path} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise BundleError(f"{path} holds no entries: conf/cards/fashion_cnn.yaml shows what a card looks like")
    if isinstance(entries.get("labels"), str):
        entries["labels"] = _find(entries["labels"], path, "labels").read_text(encoding="utf-8").splitlines()
    entries.setdefault("postprocess", {"top_k": 3})
    entries.setdefault("outputs", {"logits": "logits"})
    try:
        return TypeAdapter(Card).validate_python(entries)
    except ValidationError as error:
        problem = error.errors()[0]
        entry = ".".join(str(part) for part in problem["loc"])
        raise BundleError(
            f"{path}: {entry}: {problem['msg']}; conf/cards/fashion_cnn.yaml explains the entries"
        ) from None


def load_network_class(card: Card, path: Path) -> Callable[[], "torch.nn.Module"]:
    """Import the file that a card names, and return the class in it, which can be called without arguments.

    Raises:
        BundleError: the file or the class is missing, fails to import, or needs arguments.
    """
    file, colon, name = card.network.rpartition(":")
    if not colon:
        raise BundleError(f"{path}: network is {card.network!r}: write FILE.py:CLASS")
    source = _find(file, path, "network")
    try:
        network = getattr(_import(source), name, None)
    except Exception as error:  # a user's code may raise anything
        raise BundleError(f"{source} cannot be imported: {type(error).__name__}: {first_line(error)}") from None
    if not callable(network):
        raise BundleError(f"{source} has no class {name!r}, which {path} names")
    try:
        inspect.signature(network).bind()
    except TypeError as error:
        raise BundleError(f"{name} in {source} needs arguments ({error}): give all of them defaults") from None
    return network


def _find(file: str, card: Path, entry: str) -> Path:
    for folder in (card.parent, PROJECT):
        if (folder / file).is_file():
            return (folder / file).resolve()
    raise BundleError(f"{card}: {entry} names {file!r}, which is neither in {card.parent} nor in {PROJECT}")


@cache
def _import(source: Path) -> Any:
    """Import a file, which finds the modules beside it."""
    spec = importlib.util.spec_from_file_location(f"card_{source.stem}", source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(source.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(source.parent))
    return module
