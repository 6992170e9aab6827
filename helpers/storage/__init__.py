"""One interface to where images, models and results lie. A storage object pickles: tasks use it too.

Local paths and mounts (`/data/photos`, `file:///data/photos`, `/Volumes/...` and `dbfs:/...` on Databricks) are in
`helpers.storage.local`, ADLS Gen2 (`abfss://...`) in `helpers.storage.adls`, S3, GCS and web servers (`s3://...`,
`gs://...`, `https://...`) in `helpers.storage.objects`. A new kind of location is one class with the methods of
`Storage` and a line in `open_storage`.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from helpers.errors import StorageError
from helpers.options import StorageOptions
from helpers.storage.interface import Entry, Storage
from helpers.storage.local import LocalStorage

__all__ = ["Entry", "LocalStorage", "Storage", "StorageOptions", "open_storage"]


def open_storage(uri: str, config: Any = None) -> Storage:
    """Return the storage that holds a location.

    Args:
        uri: a plain path, `file:` URI, `dbfs:/` URI, `/Volumes/...` path,
            `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH`, `s3://BUCKET/PATH`, `gs://BUCKET/PATH` or
            `http(s)://HOST/PATH`.
        config: a `Config`, whose `storage` section says how object storage is reached.

    Raises:
        StorageError: the scheme is not one of the above.
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
