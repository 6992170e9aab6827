"""Model cards: what a pipeline must know of a model, as YAML; `conf/cards/README.md` explains the entries.

What a file or a library says of its model comes in the same form (`entries`), and a user's card goes on top of it.
"""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from helpers.config import CONF, PROJECT
from helpers.errors import BundleError, first_line
from helpers.images.spec import COLORS, InputSpec
from helpers.tasks import DECODERS

if TYPE_CHECKING:
    import torch

CARDS = CONF / "cards"
HELP = "conf/cards/README.md explains the entries"
MANY = 50  # names that no message lists
LONGEST_SIDE = 2**14  # of an input; a float32 image of it still fits into memory
# Labels in TensorFlow's text format: items with an id and a name, of which the one for people to read is preferred.
ITEM = re.compile(r"\bitem\s*\{([^}]*)\}")
ITEM_ENTRY = re.compile(r"\b(id|name|display_name)\s*:\s*(?:(\d+)|\"([^\"]*)\"|'([^']*)')")
SYNSET = re.compile(r"n\d{8}\s+")

Entries = dict[str, Any]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class CardInput(InputSpec):
    """What the network takes, see `InputSpec`; height and width of 0 and no color are those of the model's file."""

    height: int = 0
    width: int = 0
    color: Literal["rgb", "bgr", "gray", ""] = ""  # type: ignore[assignment]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Literal["NCHW", "NHWC", ""] = ""

    def __post_init__(self) -> None:
        wanted = {COLORS[self.color]} if self.color else {1, 3}
        if not {len(self.mean), len(self.std)} - {0} <= wanted:
            raise ValueError(f"mean and std need {' or '.join(map(str, sorted(wanted)))} values, one per channel")
        if not all(value > 0 for value in self.std):
            raise ValueError("std needs values above 0")
        # A gray level's mean below 1 is black, and no network divides gray levels by less than 1.
        if 0 < max(self.std or self.mean, default=0) < 1:
            std = self.std or (1.0,) * len(self.mean)
            scaled = {"mean": [round(255 * value, 3) for value in self.mean], "std": [round(255 * s, 3) for s in std]}
            entries = ", ".join(f"{name}: {values}" for name, values in scaled.items() if values)
            raise ValueError(f"mean and std are of pixels from 0 to 1, and a card's of gray levels: write {entries}")
        if min(self.height, self.width, self.resize_size) < 0 or not 0 <= self.padding <= 255:
            raise ValueError("height, width and resize_size are 0 or more, and padding is a gray level, 0 to 255")
        if max(self.height, self.width, self.resize_size) > LONGEST_SIDE:
            raise ValueError(f"height, width and resize_size are {LONGEST_SIDE} at most")
        self.to_spec()

    def to_spec(self, shape: tuple[int, int, int] = (0, 0, 0)) -> InputSpec:
        """The input as a bundle's manifest has it; `shape`, height, width and channels, is the model's own.

        Raises ValueError if mean or std are of another number of channels, or more is cut than there is.
        """
        entries = {name: value for name, value in asdict(self).items() if name != "layout"}
        color = self.color or ("gray" if shape[2] == 1 else "rgb")
        sides = {"height": self.height or shape[0], "width": self.width or shape[1]}
        scales = {"mean": self.mean or (0.0,), "std": self.std or (1.0,)}
        for name, values in scales.items():
            if len(set(values)) == 1:
                scales[name] = values[:1] * COLORS[color]
            elif len(values) != COLORS[color]:
                raise ValueError(f"{name} has {len(values)} values, and images of color {color} need {COLORS[color]}")
        if self.resize == "crop" and 0 < self.resize_size < min(sides.values()):
            raise ValueError(f"resize_size is {self.resize_size}, and {min(sides.values())} pixels are cut out of that")
        return InputSpec(**{**entries, **sides, **scales, "color": color})


# YAML reads a label of 0 and an output of 90 as numbers.
@dataclass(frozen=True, config=ConfigDict(extra="forbid", coerce_numbers_to_str=True))
class Card:
    """The entries of a card, checked."""

    task: str
    decoder: str = ""  # how the outputs are read; empty for the first that they fit
    network: str = ""  # FILE.py:CLASS of a PyTorch network
    labels: tuple[str, ...] = ()
    priors: str = ""  # file of anchors, float [A, 4]: center and size, relative to the input
    input: CardInput = field(default_factory=CardInput)
    postprocess: Mapping[str, Any] = field(default_factory=dict)
    # Role -> name in the file, or names of each stride's; or in the order of a network.
    outputs: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)  # name of an input other than the image -> its constant

    def __post_init__(self) -> None:
        if self.task not in DECODERS:
            raise ValueError(f"task is {self.task!r}{nearest(self.task, DECODERS)}")
        if self.decoder and self.decoder not in DECODERS[self.task]:
            raise ValueError(f"decoder is {self.decoder!r}{nearest(self.decoder, DECODERS[self.task])}")


def find_cards() -> list[str]:
    """The names of the project's own cards that name a network; the others are of models' files."""
    return sorted(path.stem for path in CARDS.glob("*.yaml") if "\nnetwork:" in path.read_text(encoding="utf-8"))


def read_entries(path: Path, model: Path | None = None) -> Entries:
    """The entries of a card's file, its labels read from the file that it names.

    Raises BundleError if the card or its labels are missing, or it is no YAML.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"there is no model card {path} ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict):
        raise BundleError(f"{path} holds no entries: {HELP}")
    if isinstance(entries.get("labels"), str):
        entries["labels"] = read_labels(_find(entries["labels"], path, "labels", model))
    elif isinstance(entries.get("labels"), dict):
        entries["labels"] = _order_labels(entries["labels"], path)
    for name in ("input", "postprocess"):
        if not isinstance(entries.get(name) or {}, dict):
            raise BundleError(f"{path}: {name} is {entries[name]!r}, and has entries of its own: {HELP}")
    if isinstance(entries.get("priors"), str):
        entries["priors"] = str(_find(entries["priors"], path, "priors", model))
    return entries


def read_arrays(card: Card) -> dict[str, np.ndarray]:
    """What a bundle has beside its graph, by file name; raises BundleError if anchors are not four numbers each."""
    if not card.priors:
        return {}
    try:
        priors = np.load(card.priors, allow_pickle=False).astype(np.float32)
    except Exception as error:  # numpy raises whatever a header leads to
        raise BundleError(f"{card.priors} is no array ({type(error).__name__}); write it with numpy.save") from None
    if priors.ndim != 2 or priors.shape[1] != 4:
        raise BundleError(f"{card.priors} is {priors.shape}, and anchors are [A, 4]: center x, y, width, height")
    return {"priors.npy": priors}


def read_labels(path: Path) -> list[str]:
    """Labels of a file: one per line, with or without ImageNet's numbers before them, or a map of TensorFlow's.

    In JSON and YAML they are a list or a map from each class's number, perhaps below `names` or `id2label`. Raises
    BundleError if the file holds no text, or no labels.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} holds no labels: {first_line(error)}; name a text with one per line") from None
    if path.suffix not in (".json", ".yaml", ".yml"):
        return parse_labels(text, path)
    try:
        labels = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BundleError(f"{path} holds no labels: {first_line(error)}") from None
    if isinstance(labels, dict):
        labels = next((labels[name] for name in ("names", "id2label") if name in labels), labels)
    return [str(label) for label in labels] if isinstance(labels, list) else _order_labels(labels, path)


def _order_labels(labels: Any, origin: Any) -> list[str]:
    """The labels of a map from each class's number, counted from 0, or to it, as Keras has them."""
    try:
        if not any(str(key).isdigit() for key in labels):
            labels = {number: label for label, number in labels.items()}
        numbered = {int(number): str(label) for number, label in labels.items()}
    except (AttributeError, ValueError):
        raise BundleError(f"{origin}: labels are a list, or a map from each class's number to its label") from None
    missing = next((number for number in range(len(numbered)) if number not in numbered), None)
    if missing is not None:
        raise BundleError(f"{origin}: labels lack class {missing}, and classes count from 0")
    return [numbered[number] for number in range(len(numbered))]


def parse_labels(text: str, origin: Any) -> list[str]:
    """The labels in a file's text, see `read_labels`."""
    items = [
        {name: number or one or other for name, number, one, other in ITEM_ENTRY.findall(match[1])}
        for match in ITEM.finditer(text)
    ]
    if items:
        # Numbers that the map leaves out stay classes, whose name is their number; the first is 1.
        names = {int(item.get("id", 0)): item.get("display_name") or item.get("name", "") for item in items}
        labels = [names.get(number, str(number)) for number in range(1, max(names, default=0) + 1)]
    else:
        labels = [SYNSET.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    if not labels:
        raise BundleError(f"{origin} holds no labels: write one per line")
    return labels


def merge(entries: Mapping[str, Any], others: Mapping[str, Any]) -> Entries:
    """Entries with others on top, those of `input` and `postprocess` one by one.

    The parameters of a decoder go with it.
    """
    merged = {**entries, **others}
    has_same_decoder = others.get("decoder", entries.get("decoder")) == entries.get("decoder")
    merged["input"] = {**entries.get("input", {}), **(others.get("input") or {})}
    own = entries.get("postprocess", {}) if has_same_decoder else {}
    merged["postprocess"] = {**own, **(others.get("postprocess") or {})}
    return merged


def parse_card(entries: Mapping[str, Any], origin: Any) -> Card:
    """Check a card's entries, perhaps on top of a model's own; raises BundleError, which names their origin."""
    given = entries.get("input")
    if given and isinstance(given, dict):  # one number as mean or std is that of each channel
        channels = COLORS.get(given.get("color") or "rgb", 3)
        numbers = {name: [given[name]] * channels for name in ("mean", "std") if type(given.get(name)) in (int, float)}
        entries = {**entries, "input": {**given, **numbers}}
    try:
        return TypeAdapter(Card).validate_python(entries)
    except ValidationError as error:
        problem = error.errors()[0]
        entry = "".join(f"{part}." if isinstance(part, str) else f"{part}: " for part in problem["loc"]).rstrip(".: ")
        message = problem["msg"].removeprefix("Value error, ")
        message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "entries, {NAME: VALUE}")
        if problem["type"] == "unexpected_keyword_argument":
            kind = CardInput if problem["loc"][0] == "input" else Card
            message = f"no such entry{nearest(str(problem['loc'][-1]), [known.name for known in fields(kind)])}"
        raise BundleError(f"{origin}: {f'{entry}: ' if entry else ''}{message}; {HELP}") from None


def load_network_class(card: Card, path: Path) -> Callable[[], "torch.nn.Module"]:
    """Import the file that a card names, and return the class in it, which can be called without arguments.

    Raises BundleError if the file or the class is missing, fails to import, or needs arguments.
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


def nearest(name: str, known: Collection[str], cutoff: float = 0.75) -> str:
    """The end of a sentence that says what a wrong name may have meant, or where they are few, what names there are."""
    near = get_close_matches(name, known, 1, cutoff)
    others = f"; there are {', '.join(known)}" if len(known) < MANY else ""
    return f"; did you mean {near[0]!r}?" if near else others


def _find(file: str, card: Path, entry: str, model: Path | None = None) -> Path:
    folders = [card.parent, *([model.parent] if model else []), PROJECT]
    for folder in folders:
        if (folder / file).is_file():
            return (folder / file).resolve()
    raise BundleError(f"{card}: {entry} names {file!r}, which is in none of {', '.join(map(str, folders))}")


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
