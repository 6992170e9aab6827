"""A lock on a file of ADLS Gen2: a lease, which the server ends by itself soon after its holder has died."""

import contextlib
import errno
import logging
import os
import threading
import time

from azure.core.exceptions import AzureError, HttpResponseError
from azure.storage.filedatalake import DataLakeFileClient

from helpers.errors import StorageError

log = logging.getLogger(__name__)

LEASE_SECONDS = 30  # the server takes 15 to 60; renewed three times as often


class Lease:
    """A lease that is renewed until its block ends, or until this process does."""

    def __init__(self, file: DataLakeFileClient, location: str):
        self._location, self._ended = location, threading.Event()
        deadline = _now() + LEASE_SECONDS
        while True:
            self._until = _now() + LEASE_SECONDS
            try:
                self._lease = file.acquire_lease(LEASE_SECONDS)
                break
            except HttpResponseError as error:
                if code_of(error) != "LeaseAlreadyPresent":
                    raise
            if _now() >= deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), location)
            log.info("%s is held by another process, or was by one that has died; waiting", location)
            time.sleep(LEASE_SECONDS / 10)
        self._thread = threading.Thread(target=self._renew_until_ended, daemon=True, name="lease")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *details: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(AzureError):  # it then ends by itself
            self._lease.release(retry_total=0)

    def check(self) -> None:
        """Raise StorageError unless this process still is the one that holds the lease."""
        if _now() >= self._until:
            try:
                self._renew()
            except AzureError:
                raise StorageError(
                    f"{self._location}: the lock could not be renewed for {LEASE_SECONDS} s and may be another run's "
                    "now; run again, what is finished is kept"
                ) from None

    def _renew_until_ended(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 3):
            with contextlib.suppress(AzureError):  # `check` tells when it matters
                self._renew()

    def _renew(self) -> None:
        asked = _now()
        self._lease.renew(retry_total=0)
        self._until = asked + LEASE_SECONDS


def _now() -> float:
    """Seconds that the server counts too: where the system can tell, those in which this machine slept among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def code_of(error: AzureError) -> str:
    """The service's name for an error, empty where there is none."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code or ""))
