"""Which output of a network plays which role for a decoder: told by shapes and ranges, and checked by shapes.

A side of a role's shape is a number, a letter for any number that is the same wherever the letter stands (`N`), or a
sum of such terms (`4+C+3K`). `C` is the number of labels. Executors import this module.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from helpers.bundle.manifest import OPEN, Manifest
from helpers.images.geometry import place
from helpers.tasks.boxes import Detections
from helpers.tasks.interface import AmbiguityError, Arrays, OutputError, Outputs, Prediction, Shapes, Sizes

TERM = re.compile(r"(\d*)([A-Za-z]?)")
Sides = Mapping[str, int]


@dataclass(frozen=True)
class Role:
    """What an output is for a decoder."""

    name: str  # of the role
    shapes: Sequence[str]  # of one image's output, as alternatives, each a text of sides: `N 4`
    # Whether values of real images, float32 `[B, ...]`, can be those of the role.
    fits: Callable[[np.ndarray], bool] = lambda values: True
    optional: bool = False  # whether the decoder does without it
    values: str = ""  # what `fits` asks for, for a message
    word: str = ""  # what makers' names of such outputs have in them; the role's own name if empty

    def __str__(self) -> str:
        shapes = " or ".join(f"[{', '.join(shape.split())}]" for shape in self.shapes)
        return f"{self.name} {shapes}{f' ({self.values})' if self.values else ''}"


def are_shares(values: np.ndarray) -> bool:
    """Whether all numbers lie within 0 to 1, but for rounding."""
    return values.size == 0 or bool(values.min() >= -1e-4 and values.max() <= 1 + 1e-4)


def are_whole(values: np.ndarray) -> bool:
    """Whether all numbers are whole."""
    return bool((values == np.rint(values)).all())


def suggest_nothing(samples: Arrays, labels: int) -> dict[str, Any]:
    """Of a decoder whose parameters no outputs tell."""
    return {}


@dataclass(frozen=True)
class Decoder:
    """One way to read the outputs of networks for a task."""

    # Takes the outputs of a batch by role, the images' sizes, the manifest, the parameters and the bundle's arrays;
    # returns a list of predictions per image, or for an embedding a list of numbers per image.
    predict: Callable[[Arrays, Sizes, Manifest, Mapping[str, Any], Arrays], list[Any]]
    parameters: type  # a frozen dataclass, each with a default; raises ConfigError for an impossible value
    alternatives: Sequence[Sequence[Role]]  # the roles of the outputs, in one way or another
    # Takes outputs of real images by role, float32 `[B, ...]`, and the number of labels; returns the parameters that
    # these tell and that are not as by default.
    suggest_parameters: Callable[[Arrays, int], dict[str, Any]] = suggest_nothing

    def assign_roles(self, samples: Arrays, labels: int) -> dict[str, str]:
        """Tell which output plays which role; shapes and ranges decide, not names.

        Samples are outputs of real images by name, float32 `[B, ...]`, and labels how many there are; 0 if nobody has
        said. Returns the name of each role's output; outputs without a role are not among them. Raises OutputError if a
        role fits no output, or several outputs fit equally well.
        """
        problems: list[OutputError] = []
        for roles in self.alternatives:
            try:
                return _assign(roles, samples, labels)
            except OutputError as error:
                problems.append(error)
        if ambiguity := next((problem for problem in problems if isinstance(problem, AmbiguityError)), None):
            raise ambiguity
        remedy = "the card's `outputs: {ROLE: NAME}` can name the output of a role"
        shapes = ", ".join(f"{name} {list(values.shape[1:])}" for name, values in samples.items())
        raise OutputError(f"{', and '.join(map(str, problems))}; the model has {shapes}: {remedy}")

    def check_shapes(self, shapes: Shapes, labels: int) -> None:
        """Compare shapes of outputs, by role, with what the decoder takes.

        Raises:
            OutputError: an output is missing, unknown, or of another shape than the labels and the other outputs need.
        """
        problems = []
        # Those first that have most of the names, because their message says most.
        for roles in sorted(self.alternatives, key=lambda roles: -len({role.name for role in roles} & set(shapes))):
            try:
                return _check(roles, shapes, labels)
            except OutputError as error:
                problems.append(error)
        raise problems[0]


def make_decoder(
    decode: Callable[[Outputs, Any], Detections | list[Prediction]],
    parameters: type,
    *alternatives: Sequence[Role],
    suggest: Callable[[Arrays, int], dict[str, Any]] = suggest_nothing,
) -> Decoder:
    """Make a decoder of a function that takes the outputs of one image and an instance of `parameters`.

    The other arguments are those of `Decoder`.
    """

    def predict(
        outputs: Arrays, sizes: Sizes, manifest: Manifest, settings: Mapping[str, Any], arrays: Arrays
    ) -> list[list[Prediction]]:
        chosen, predictions = parameters(**settings), []
        for i, size in enumerate(sizes):
            values = {role: output[i] for role, output in outputs.items()}
            own = Outputs(values, place(manifest.input, size), manifest.labels, arrays, manifest.name)
            result = decode(own, chosen)
            predictions.append(result.to_predictions(manifest.labels) if isinstance(result, Detections) else result)
        return predictions

    return Decoder(predict, parameters, alternatives, suggest)


def _assign(roles: Sequence[Role], samples: Arrays, labels: int) -> dict[str, str]:
    shapes = {name: values.shape[1:] for name, values in samples.items()}
    candidates = [
        [name for name in samples if _match(role, shapes[name], _labels(labels)) and role.fits(samples[name])]
        for role in roles
    ]
    for role, names in zip(roles, candidates, strict=True):
        if not names and not role.optional:
            raise OutputError(f"no output is {role}{f' for {labels} labels' if labels else ''}")
    choices = [choice for choice in _choices(roles, candidates) if _agree(roles, choice, shapes, labels)]
    if not choices:
        raise OutputError(f"no outputs together are {', '.join(map(str, roles))}")
    ranks = [_rank(roles, choice) for choice in choices]
    best = [choice for choice, rank in zip(choices, ranks, strict=True) if rank == max(ranks)]
    if len(best) > 1:
        role = next(role for role in roles if len({choice.get(role.name) for choice in best}) > 1)
        names = sorted({choice[role.name] for choice in best if role.name in choice})
        remedy = f"name it in the card, `outputs: {{{role.name}: NAME}}`"
        raise AmbiguityError(f"outputs {' and '.join(names)} could each be {role}: {remedy}", names)
    return best[0]


def _check(roles: Sequence[Role], shapes: Shapes, labels: int) -> None:
    known = {role.name: role for role in roles}
    for name in shapes:
        if name not in known:
            raise OutputError(f"an output is {name}, and the decoder takes {', '.join(known)}")
    bindings = [_labels(labels)]
    for role in roles:
        if role.name in shapes:
            shape = tuple(shapes[role.name])
            bindings = [sides for binding in bindings for sides in _match(role, shape, binding)]
            if not bindings:
                raise OutputError(f"its output {role.name} is {list(shape)}, and {labels} labels need {role}")
        elif not role.optional:
            raise OutputError(f"it has no output {role}")


def _labels(labels: int) -> Sides:
    return {"C": labels} if labels else {}


def _match(role: Role, shape: Sequence[int], sides: Sides) -> list[Sides]:
    """What the letters stand for, for each alternative that a shape is."""
    matches = []
    for alternative in role.shapes:
        terms = alternative.split()
        if len(terms) == len(shape):
            bound: Sides | None = sides
            for term, side in zip(terms, shape, strict=True):
                bound = bound if bound is None or side == OPEN else _bind(term, side, bound)
            if bound is not None:
                matches.append(bound)
    return matches


def _bind(side: str, value: int, sides: Sides) -> Sides | None:
    """The letters' meanings with those of one more side; None where it is of another value."""
    rest, unknown = value, []
    for count, letter in (match.groups() for match in map(TERM.fullmatch, side.split("+")) if match):
        if letter and letter not in sides:
            unknown.append((int(count or 1), letter))
        else:
            rest -= int(count or 1) * (sides[letter] if letter else 1)
    if not unknown:
        return sides if rest == 0 else None
    if len(unknown) > 1:  # not to be told apart
        return sides if rest >= sum(count for count, _ in unknown) else None
    ((count, letter),) = unknown
    return {**sides, letter: rest // count} if rest >= count and rest % count == 0 else None


def _choices(roles: Sequence[Role], candidates: list[list[str]]) -> Iterator[dict[str, str]]:
    """Every way to give each role an output of its own, optional ones left out too."""
    options = [[*names, None] if role.optional else names for role, names in zip(roles, candidates, strict=True)]
    for names in product(*options):
        choice = {role.name: name for role, name in zip(roles, names, strict=True) if name is not None}
        if len(set(choice.values())) == len(choice):
            yield choice


def _agree(roles: Sequence[Role], choice: dict[str, str], shapes: Shapes, labels: int) -> bool:
    try:
        _check(roles, {role: shapes[name] for role, name in choice.items()}, labels)
    except OutputError:
        return False
    return True


def _rank(roles: Sequence[Role], choice: dict[str, str]) -> tuple[int, int]:
    """More roles are better; names decide only between choices that shapes and ranges cannot tell apart."""
    words = {role.name: role.word or role.name.rstrip("s") for role in roles}
    return len(choice), sum(words[role] in name.lower() for role, name in choice.items())
