"""ADLS Gen2 as a `Storage`: `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH`.

Needs no Hadoop connector. Files are read at the account's Blob endpoint as objects of other stores are, which takes a
fraction of the SDK's processor time (`helpers.storage.objects`). All else is asked of the DFS endpoint with the SDK,
azure-storage-file-datalake: it lists folders, and renames in one step where the account has a hierarchical namespace,
which results need. Paths are whole URIs, as Spark shows them, names as they are (not percent-encoded). Both clients
repeat what fails for a while; what then still fails is a `StorageError`, so that a run stops and can be resumed,
instead of writing error rows for images that are all right. Executors import this module.
"""

import contextlib
import errno
import functools
import itertools
import logging
import os
import posixpath
import re
import threading
import uuid
from collections.abc import Collection, Iterator
from datetime import UTC
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceExistsError, ResourceNotFoundError
from azure.storage.filedatalake import (
    DataLakeFileClient,
    DataLakeServiceClient,
    ExponentialRetry,
    FileSystemClient,
    PathProperties,
)

from helpers.errors import StorageError, first_line
from helpers.options import StorageOptions
from helpers.redaction import Redacting
from helpers.storage import objects
from helpers.storage.credentials import resolve
from helpers.storage.interface import Entry
from helpers.storage.prefetch import chain_ahead

URI = re.compile(r"abfss://([^@/?#]+)@([^@/?#]+)(/.*)?", re.DOTALL)
# The hosts that may get a credential: of the public and the sovereign clouds, and of accounts with DNS zones.
AZURE = re.compile(
    r"[a-z0-9-]+(\.[a-z0-9-]+)*\.(dfs\.core\.(windows\.net|chinacloudapi\.cn|usgovcloudapi\.net|cloudapi\.de)|"
    r"z\d+\.dfs\.storage\.azure\.net)",
    re.IGNORECASE | re.ASCII,
)
PAGE = 5000  # paths of a listing's page, the most there can be
CHUNK_BYTES = 8 * 2**20  # of a file written
WRITER = "writer"  # metadata that says which write made a file
# For about a minute in all, 1 to 3 s before the first try after the first.
RETRY: dict[str, Any] = {"initial_backoff": 0, "increment_base": 2, "random_jitter_range": 1}
RETRY |= {f"retry_{kind}": objects.TRIES for kind in ("total", "connect", "read", "status")}
TIMEOUTS: dict[str, Any] = {"connection_timeout": 10, "read_timeout": 60}  # seconds

_opening = threading.Lock()  # threads that read ahead would otherwise open a client each

logging.getLogger("urllib3.connectionpool").addFilter(Redacting())  # it logs URLs, and a SAS token is part of them


class AdlsStorage(objects.ObjectStorage):
    """A folder of a container; pickles as its address and the reference to its credential, nothing else."""

    def __init__(self, uri: str, options: StorageOptions | None = None):
        match = URI.fullmatch(uri)
        if match is None or ":" in match[1] or objects.SECRET.search(uri):
            raise StorageError(
                f"{uri} is not abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH (a SAS token is no part "
                "of it: put it into an environment variable and name that with storage.credential=env:NAME)"
            )
        self._place(f"abfss://{match[1]}@{match[2]}", match[3] or "", options)
        if not (self.options.endpoint or AZURE.fullmatch(match[2])):
            raise StorageError(
                f"{uri}: {match[2]} is no host of Azure Data Lake Storage, so it gets no credential; correct the "
                "location, or set storage.endpoint to the service's address"
            )
        self._container, self._host = match[1], match[2]

    def list(
        self, prefix: str = "", directories: bool = False, skip: Collection[str] = (), **tolerance: bool
    ) -> Iterator[Entry]:
        """List a page at a time, several folders at once; modification times are of whole seconds.

        Who may list one folder may list all, and there are no links. Raises StorageError if there is no such folder, or
        it cannot be listed.
        """
        start, ours = self._name(prefix), [folder for folder in skip if folder.startswith(f"{self._base}/")]
        skipped = tuple(f"{self._name(folder)}/" for folder in ours)
        try:
            with self._explained(self._uri(start)):
                if start and not _is_folder(properties := self._file(start).get_file_properties()):
                    yield Entry(self._uri(start), properties.size, properties.last_modified)
                    return
                for path in self._paths(start):
                    if (directories or not path.is_directory) and not f"{path.name}/".startswith(skipped):
                        modified = path.last_modified.replace(tzinfo=UTC)
                        yield Entry(self._uri(path.name), path.content_length or 0, modified, path.is_directory)
        except FileNotFoundError:
            raise StorageError(f"{self._uri(start)}: no such folder; check the location, or create it first") from None

    def _paths(self, start: str) -> Iterator[PathProperties]:
        """What is below a folder; where that is more than a page, the folders of one level are listed at once."""
        get_paths = functools.partial(self._files.get_paths, max_results=PAGE)

        def below(folder: PathProperties) -> Iterator[PathProperties]:
            yield folder
            with contextlib.suppress(ResourceNotFoundError):  # it is gone since its level was listed
                yield from get_paths(folder.name, recursive=True)

        pages = cast(Any, get_paths(start or None, recursive=True).by_page())
        first = list(next(pages, []))
        if not pages.continuation_token:
            yield from first
            return
        above = list[PathProperties]()
        level = list(itertools.islice(get_paths(start or None, recursive=False), PAGE))
        while [path.is_directory for path in level] == [True]:
            above += level
            level = list(itertools.islice(get_paths(above[-1].name, recursive=False), PAGE))
        if len(level) == PAGE or not 2 <= sum(path.is_directory for path in level) <= objects.MOST_FOLDERS:
            yield from first
            yield from itertools.chain.from_iterable(pages)
            return
        level.sort(key=lambda path: f"{path.name}/" if path.is_directory else path.name)
        yield from above
        streams = [functools.partial(below if path.is_directory else lambda file: [file], path) for path in level]
        yield from chain_ahead(streams, objects.LISTINGS)

    def read(self, path: str, limit: int | None = None) -> bytes:  # noqa: D102
        name = self._name(path)
        if name.isprintable():
            return super().read(path, limit)
        with self._explained(path):  # obstore takes no control characters, and this account may have them
            download = self._file(name).download_file()
            if limit is not None and download.size > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
            return download.readall()

    def rename(self, source: str, target: str) -> None:  # noqa: D102
        with self._explained(source):
            properties = self._file(self._name(source)).get_file_properties()
            self._move(self._name(source), self._name(target), properties.metadata.get(WRITER))

    def delete(self, path: str) -> None:  # noqa: D102
        name = self._name(path)
        with contextlib.suppress(FileNotFoundError), self._explained(path):
            if _is_folder(self._file(name).get_file_properties()):
                self._files.delete_directory(name)
            else:
                self._file(name).delete_file()

    def prune(self, path: str) -> None:  # noqa: D102
        with contextlib.suppress(FileNotFoundError), self._explained(path), contextlib.suppress(ResourceExistsError):
            self._file(self._name(path)).delete_file(recursive=False)

    def delta_table(self, path: str) -> tuple[str, dict[str, str]]:
        """As in `Storage`; with a token where the credential is an identity, so that this holds for one use."""
        _, options = super().delta_table(path)
        # The library knows abfss:// of the public cloud only.
        return f"az://{self._container}/{quote(self._name(path))}", options

    def exists(self, path: str) -> bool:  # noqa: D102
        name = self._name(path)
        with self._explained(path):
            if name:
                return self._file(name).exists()
            # A SAS token may list a container, and never ask for its properties.
            next(iter(self._files.get_paths(recursive=False, max_results=1)), None)
        return True

    @property
    def _files(self) -> FileSystemClient:
        """The one client of a process and credential, whose connections and tokens its tasks share."""
        reference, endpoint = self.options.credential, self.options.endpoint or f"https://{self._host}"
        with _opening:
            return _open(endpoint, self._host, self._container, reference, objects.credential_value(reference))

    def _file(self, name: str) -> DataLakeFileClient:
        return self._files.get_file_client(name)

    def _get(self, path: str, **conditions: Any) -> Any:
        answer = super()._get(path, **conditions)
        if objects.IS_FOLDER in answer.attributes:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return answer

    def _put(self, path: str, file: BinaryIO) -> None:
        """Write a temporary file and rename it, with calls that do no harm when they are repeated."""
        name, writer = self._name(path), uuid.uuid4().hex
        temporary = posixpath.join(posixpath.dirname(name), f".{writer}.tmp")
        target, length = self._file(temporary), 0
        with self._explained(path):
            try:
                target.create_file(metadata={WRITER: writer})
                while chunk := file.read(CHUNK_BYTES):
                    target.append_data(chunk, length, len(chunk))
                    length += len(chunk)
                if length:
                    target.flush_data(length)
                self._move(temporary, name, writer)
            except BaseException:
                with contextlib.suppress(AzureError):
                    target.delete_file(retry_total=0)
                raise

    def _move(self, source: str, target: str, writer: str | None) -> None:
        try:
            # The SDK decodes the source's name once, which a name with a percent sign would not survive.
            self._file(quote(source)).rename_file(f"{self._container}/{target}")
        except (ResourceNotFoundError, ResourceExistsError) as error:
            if _code_of(error) == "RenameDestinationParentPathNotFound":
                self._files.create_directory(posixpath.dirname(target))
                self._move(source, target, writer)
            # The answer to a rename that was done may be lost, and a repetition finds no source.
            elif not writer or self._writer_of(target) != writer:
                raise

    def _writer_of(self, name: str) -> str | None:
        try:
            return self._file(name).get_file_properties().metadata.get(WRITER)
        except ResourceNotFoundError:
            return None

    @contextlib.contextmanager
    def _explained(self, path: str, of_one_file: bool = False) -> Iterator[None]:
        """Turn the SDK's errors, which may show URLs with a SAS token, into ours."""
        with super()._explained(path, of_one_file):
            try:
                yield
            except AzureError as error:
                raise self._explain_sdk(error, path) from None

    def _forget(self) -> None:
        forget_clients()

    def _explain_sdk(self, error: AzureError, path: str) -> Exception:
        status, code = getattr(error, "status_code", None), _code_of(error)
        if code in objects.NO_CONTAINER:
            return self._missing()
        if status == 404:
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if status in (401, 403) or isinstance(error, ClientAuthenticationError):
            return self._refused(code or first_line(error))
        return self._unanswered(code or first_line(error))


def forget_clients() -> None:
    """Open new ones from now on, obstore's too: a reference may lead to another credential by then."""
    _open.cache_clear()
    objects.forget_stores()


@functools.cache
def _open(endpoint: str, host: str, container: str, reference: str, value: int) -> FileSystemClient:
    """The client for a service's address; `value` tells credentials of one reference apart.

    Raises StorageError if the reference leads nowhere, or there is no such host.
    """
    objects.check_host(endpoint)
    credential, retries = resolve(reference, host.partition(".")[0]), ExponentialRetry(**RETRY)
    service = DataLakeServiceClient(endpoint, credential=credential, retry_policy=retries, **TIMEOUTS)
    return service.get_file_system_client(container)


def _is_folder(properties: Any) -> bool:
    return objects.IS_FOLDER in properties.metadata


def _code_of(error: AzureError) -> str:
    """The service's name for an error, empty where there is none."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code or ""))
