"""The process's client of a container in ADLS Gen2: its credential, its retries and its time limits."""

import functools
import logging
import threading
from typing import Any

from azure.storage.filedatalake import DataLakeServiceClient, ExponentialRetry, FileSystemClient

from helpers.redaction import Redacting
from helpers.storage.credentials import resolve
from helpers.storage.objects import TRIES, check_host, forget_stores

# For about a minute in all, 1 to 3 s before the first try after the first.
RETRY: dict[str, Any] = {"initial_backoff": 0, "increment_base": 2, "random_jitter_range": 1}
RETRY |= {f"retry_{kind}": TRIES for kind in ("total", "connect", "read", "status")}
TIMEOUTS: dict[str, Any] = {"connection_timeout": 10, "read_timeout": 60}  # seconds

_opening = threading.Lock()  # threads that read ahead would otherwise open a client each

logging.getLogger("urllib3.connectionpool").addFilter(Redacting())  # it logs URLs, and a SAS token is part of them


def get_client(endpoint: str, account: str, container: str, reference: str, value: int) -> FileSystemClient:
    """Return the one client of a process and credential, whose connections and tokens its tasks share.

    The endpoint is the service's address, the reference as `storage.credential` has it, and the value a hash of what it
    leads to; another value is another client. Raises StorageError if it leads nowhere, or there is no such host.
    """
    with _opening:
        return _open(endpoint, account, container, reference, value)


def forget_clients() -> None:
    """Open new ones from now on, obstore's too: a reference may lead to another credential by then."""
    _open.cache_clear()
    forget_stores()


@functools.cache
def _open(endpoint: str, account: str, container: str, reference: str, value: int) -> FileSystemClient:
    check_host(endpoint)
    service = DataLakeServiceClient(
        endpoint,
        credential=resolve(reference, account),
        retry_policy=ExponentialRetry(**RETRY),
        **TIMEOUTS,
    )
    return service.get_file_system_client(container)
