"""One interface to where images, models and results lie. A storage object pickles: tasks use it too.

Local paths and mounts (`/data/photos`, `file:///data/photos`, `/Volumes/...` and `dbfs:/...` on Databricks) are in
`helpers.storage.local`, ADLS Gen2 (`abfss://...`) in `helpers.storage.adls`, S3, GCS and web servers (`s3://...`,
`gs://...`, `https://...`) in `helpers.storage.objects`. A new kind of location is one class with the methods of
`Storage` and a line in `open_storage`.
"""

import contextlib
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from helpers.errors import StorageError
from helpers.options import StorageOptions
from helpers.storage.interface import Entry, Storage
from helpers.storage.local import LocalStorage

__all__ = ["Entry", "LocalStorage", "Storage", "StorageOptions", "lock", "open_storage"]

log = logging.getLogger(__name__)


def open_storage(uri: str, config: Any = None) -> Storage:
    """Return the storage that holds a location, with the `storage` section of a `Config` for how it is reached.

    The location is a plain path, `file:` URI, `dbfs:/` URI, `/Volumes/...` path, `s3://BUCKET/PATH`,
    `gs://BUCKET/PATH`, `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH` or `http(s)://HOST/PATH`; others raise
    StorageError.
    """
    if uri.startswith("dbfs:/"):
        return LocalStorage("/dbfs/" + uri.removeprefix("dbfs:").lstrip("/"))
    if uri.startswith("abfss:"):
        from helpers.storage.adls import AdlsStorage  # most runs need no Azure SDK

        return AdlsStorage(uri, config.storage if config else None)
    if re.match("(s3|gs|https?):", uri):
        from helpers.storage.objects import ObjectStorage  # nor obstore

        return ObjectStorage(uri, config.storage if config else None)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", uri)
    if scheme is None or Path(uri).exists():
        return LocalStorage(uri)
    if scheme[1] == "file":
        return LocalStorage(unquote(urlsplit(uri).path) if uri.startswith("file:/") else uri.removeprefix("file:"))
    raise StorageError(
        f"{uri}: {scheme[1]}: locations cannot be opened; use a path, or a URI that begins with file:, dbfs:/, "
        "abfss://, s3://, gs:// or https://"
    )


def lock(storage: Storage, path: str) -> contextlib.AbstractContextManager[None]:
    """Hold a lock on a local folder; object storage has none, and gets a warning.

    Raises:
        BlockingIOError: another process holds it.
        StorageError: the file system has no locks, or cannot be written.
    """
    if isinstance(storage, LocalStorage):
        return storage.lock(path)
    log.warning("%s: object storage has no locks, so nothing keeps another process out", storage.root)
    return contextlib.nullcontext()
