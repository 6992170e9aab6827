"""The errors a user can mend: each message names the thing and the remedy, and the command line shows only it."""

from helpers.redaction import redact


class UserError(Exception):
    """Base of every error that is shown as one message, without a stack trace and without secrets."""

    def __init__(self, message: str = ""):
        super().__init__(redact(message))


def first_line(error: BaseException | str) -> str:
    """What an error of another library says first, without secrets; its type where it says nothing."""
    return redact(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or impossible."""


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
