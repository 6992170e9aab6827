"""The errors a user can mend: each message names the thing and the remedy, and the command line shows only it."""

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from helpers.redaction import redact

log = logging.getLogger(__name__)

TRAIN_REMEDY = "run `make setup`, or `pip install '.[train]'` in the project's folder"
FULL = "the disk is full; make space and run again, what is finished is kept"
UNSUITABLE = (
    "this file system lacks what keeps two writers apart (links, locks, whole files); name a location on another one"
)
FORBIDDEN = "permission denied; grant this user access, or name another location"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: "the disk is read-only; name a location that can be written",
    errno.ENOTDIR: "a file is where a folder should be; move it away, or name another location",
    errno.EEXIST: "a file is where a folder should be; move it away, or name another location",
    errno.EISDIR: "a folder is where a file should be; move it away, or name another location",
    errno.EOPNOTSUPP: UNSUITABLE,
    errno.ENOSYS: UNSUITABLE,
    errno.ENOLCK: UNSUITABLE,
    errno.ENAMETOOLONG: "the name is too long; name a shorter location",
}


class UserError(Exception):
    """Base of every error that is shown as one message, without a stack trace and without secrets."""

    def __init__(self, message: str = ""):
        super().__init__(redact(message))


def first_line(error: BaseException | str) -> str:
    """What an error of another library says first, without secrets; its type where it says nothing."""
    return redact(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def explain(error: OSError, place: str) -> str:
    """What an error of the system means for a place, and its remedy."""
    message = error.strerror or first_line(error)
    return f"{place}: {REMEDIES.get(error.errno or 0, f'{message}; mend that, or name another location')}"


@contextlib.contextmanager
def only_warn(what: str, remedy: str = "") -> Iterator[None]:
    """Turn any failure of a block into a warning, where what the block makes is worth less than the run."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %s%s", what, first_line(error), f"; {remedy}" if remedy else "")


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or impossible."""


def check_parameters(parameters: Any, lowest: Mapping[str, float] | None = None) -> None:
    """Check the values of a dataclass of post-processing parameters by its annotations.

    A `float` is a number from 0 to 1, an `int` a whole number of 1 or more, a `bool` true or false, a `Literal` one of
    its values, and a `tuple` a list of what it names. `lowest` has the least values of numbers with another range, by
    name; such a number has no upper end.

    Raises:
        ConfigError: the first value that is none of these.
    """
    for field in fields(parameters):
        value, floor = getattr(parameters, field.name), (lowest or {}).get(field.name)
        if expectation := _expectation(field.type, value, floor):
            raise ConfigError(f"postprocess.{field.name} is not {expectation}")


def _expectation(kind: Any, value: Any, floor: float | None) -> str:
    """What a value should be and is not; empty where it is."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        is_one = any(type(value) is type(choice) and value == choice for choice in choices)
        return "" if is_one else f"one of {', '.join(map(str, choices))}"
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if get_origin(kind) is tuple:
        items, name = (int | float, "numbers") if float in get_args(kind) else (int | str, "texts or whole numbers")
        is_list = isinstance(value, list | tuple) and all(_is_a(items, item) for item in value)
        return "" if is_list else f"a list of {name}"
    if kind is int:
        floor = 1 if floor is None else floor
        return "" if _is_a(int, value) and value >= floor else f"a whole number of {floor} or more"
    if floor is not None:
        return "" if _is_a(int | float, value) and floor <= value < float("inf") else f"a number of {floor} or more"
    return "" if _is_a(int | float, value) and 0 <= value <= 1 else "a number from 0 to 1"


def _is_a(kind: Any, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


class HostError(UserError):
    """The host lacks something the project needs (Java, a device, a package)."""


class StorageError(UserError):
    """A location cannot be used: an unknown scheme, a missing folder, a refused credential."""


class DataError(UserError):
    """A data set is missing or damaged."""


class BundleError(UserError):
    """A model bundle or checkpoint is missing, damaged or does not fit the project."""


class TrainingError(UserError):
    """A training process failed; the message holds that process's own traceback."""


class RunError(UserError):
    """A pipeline run could not be completed."""
