"""The folder below the system's temporary one in which this user's processes leave things for one another.

Its name is public and the place is everybody's, so another user may have taken it first. Executors import this module.
"""

import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def user_folder() -> Path | None:
    """Return this user's temporary folder, which nobody else can read or write; make it where there is none.

    Returns:
        None where something else has its name: a link, another user's folder, or one that others may enter. Then
        nothing can be left for the next process.
    """
    folder = Path(tempfile.gettempdir(), f"spark-vision-{os.geteuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        log.warning("%s cannot be used, and nothing is kept there: %s", folder, error.strerror or error)
        return None
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
        return folder
    log.warning("%s is not this user's alone, and nothing is kept there: remove it", folder)
    return None
