"""The process's client of a container in ADLS Gen2: its credential, its retries and its time limits."""

import functools
import logging
import socket
import threading
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from azure.storage.filedatalake import DataLakeServiceClient, ExponentialRetry, FileSystemClient

from helpers.errors import StorageError
from helpers.redaction import Redacting
from helpers.storage.credentials import resolve

TRIES = 5  # after the first: for about a minute in all, 1 to 3 s before the first of them
RETRY: dict[str, Any] = {"initial_backoff": 0, "increment_base": 2, "random_jitter_range": 1}
RETRY |= {f"retry_{kind}": TRIES for kind in ("total", "connect", "read", "status")}
TIMEOUTS: dict[str, Any] = {"connection_timeout": 10, "read_timeout": 60}  # seconds

_opening = threading.Lock()  # threads that read ahead would otherwise open a client each

logging.getLogger("urllib3.connectionpool").addFilter(Redacting())  # it logs URLs, and a SAS token is part of them


def get_client(
    endpoint: str, account: str, container: str, reference: str, value: int, range_bytes: int
) -> FileSystemClient:
    """Return the one client of a process and credential, whose connections and tokens its tasks share.

    Args:
        endpoint: the service's address.
        account: the storage account's name.
        container: the container's.
        reference: to the credential, as `storage.credential` has it.
        value: a hash of what the reference leads to; another value is another client.
        range_bytes: larger files are read in ranges of this size.

    Raises:
        StorageError: the credential cannot be found, or there is no such host.
    """
    with _opening:
        return _open(endpoint, account, container, reference, value, range_bytes)


def forget_clients() -> None:
    """Open new ones from now on: a reference may lead to another credential by then."""
    _open.cache_clear()


@functools.cache
def _open(
    endpoint: str, account: str, container: str, reference: str, value: int, range_bytes: int
) -> FileSystemClient:
    _check_host(endpoint)
    service = DataLakeServiceClient(
        endpoint,
        credential=resolve(reference, account),
        retry_policy=ExponentialRetry(**RETRY),
        max_single_get_size=range_bytes,
        max_chunk_get_size=range_bytes,
        **TIMEOUTS,
    )
    return service.get_file_system_client(container)


def _check_host(endpoint: str) -> None:
    """Say at once what the SDK would find out in a minute of tries: that an account of this name does not exist."""
    host = urlsplit(endpoint).hostname
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        # Other failures may pass, and behind a proxy it is the proxy that knows names.
        if error.errno == socket.EAI_NONAME and not getproxies():
            raise StorageError(
                f"{host}: there is no such host; check the account's name in the location, and storage.endpoint"
            ) from None
