"""The boundary of an image: whatever goes wrong with one image becomes its own error. Executors import this module."""

import errno
from collections.abc import Callable
from typing import TypeVar

from helpers.errors import UserError
from helpers.redaction import redact

R = TypeVar("R")

MORE_THAN_LEFT = "more than inference.memory_megabytes leaves"
MAX_CHARACTERS = 300  # of an error: other libraries' may repeat what they were given
READ_ERRORS = {
    errno.ENOENT: "the file is gone: it was moved or deleted after it was listed, or its link leads nowhere",
    errno.EACCES: "the file cannot be read: permission denied",
    errno.EPERM: "the file cannot be read: permission denied",
    errno.EISDIR: "this is a directory, not an image file",
    errno.ELOOP: "the link leads back to itself",
    errno.EFBIG: "the file is longer than ingest.max_bytes allows, or much longer than when it was listed",
}
# How errors begin that last until there is another file; what has any other error is worked on again by the next run.
LASTING = (
    "the file is empty",
    "the file is not an image",
    "the image is damaged",
    "the image cannot be decoded",
    "the file is not a video",
    "the file has no video",
    "no frame of the video can be decoded",
    "the frame cannot be decoded",
    "this is a directory",
    "the file cannot be read: it is a pipe",
    "the file is not an archive",
    "the archive is",
    "the member is",
)


class UnreadableImageError(ValueError):
    """The bytes are no image that can be used; the message says why, for the row's `error`."""


def attempt(function: Callable[..., R], *arguments: object) -> tuple[R | None, str | None]:
    """Do one thing with one image or video: the result and None, or None and why there is none.

    This package and the libraries below it may raise anything for bytes that nobody has thought of. What must be mended
    before any image can be worked on is raised: UserError, and ModuleNotFoundError where this host lacks a package.
    """
    try:
        return function(*arguments), None
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:
        return None, reason(error)


def too_long(length: int, max_bytes: int) -> str | None:
    """Why a file or a member of an archive is not read, where it has too many bytes for an image."""
    limits = f"the {max_bytes} that ingest.max_bytes and inference.memory_megabytes allow"
    return f"the file has {length} bytes, more than {limits}" if length > max_bytes else None


def reason(error: Exception) -> str:
    """Why something could not be done with an image, for the row's `error`: one line, with words in it."""
    if isinstance(error, MemoryError):
        text = f"there is not enough memory for it: it takes {MORE_THAN_LEFT}"
    elif isinstance(error, OSError):
        text = READ_ERRORS.get(error.errno or 0, f"the file cannot be read: {error.strerror or error}")
    elif isinstance(error, UnreadableImageError):
        text = str(error)
    else:
        text = f"it cannot be processed: {type(error).__name__}: {error}"
    # Arrow takes no half characters.
    line = " ".join(redact(text).split()).encode("utf-8", "replace").decode() or type(error).__name__
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 3]}..."
