"""ADLS Gen2 as a `Storage`: `abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH`, over azure-storage-file-datalake.

Needs no Hadoop connector: the driver lists, tasks read and write, all with the SDK. Renames are atomic where the
account has a hierarchical namespace, which results need. Paths are whole URIs, as Spark shows them, names as they are
(not percent-encoded). The SDK repeats what fails for a while (`client.RETRY`); what then still fails is a
`StorageError`, so that a run stops and can be resumed, instead of writing error rows for images that are all right.
Executors import this module.
"""

import contextlib
import errno
import io
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Collection, Iterator
from datetime import UTC
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from azure.core.credentials import AzureNamedKeyCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceExistsError, ResourceNotFoundError
from azure.storage.filedatalake import DataLakeFileClient, FileSystemClient, StorageStreamDownloader

from helpers.errors import StorageError, first_line
from helpers.options import StorageOptions
from helpers.storage import client
from helpers.storage.credentials import STORAGE_SCOPE, resolve
from helpers.storage.interface import Entry

URI = re.compile(r"abfss://([^@/?#]+)@([^@/?#]+)(/.*)?", re.DOTALL)
# The hosts that may get a credential: of the public and the sovereign clouds, and of accounts with DNS zones.
AZURE = re.compile(
    r"[a-z0-9-]+(\.[a-z0-9-]+)*\.(dfs\.core\.(windows\.net|chinacloudapi\.cn|usgovcloudapi\.net|cloudapi\.de)|"
    r"z\d+\.dfs\.storage\.azure\.net)",
    re.IGNORECASE | re.ASCII,
)
SIGNATURE = re.compile(r"[?&;]sig(=|%3d)", re.IGNORECASE)
PAGE = 5000  # paths of a listing's page, the most there can be
RANGE_BYTES = 16 * 2**20  # a larger file is read in ranges ...
RANGES = 4  # ... so many at once
CHUNK_BYTES = 8 * 2**20  # of a file written
SPOOL_BYTES = 16 * 2**20
WRITER = "writer"  # metadata that says which write made a file
IS_FOLDER = "hdi_isfolder"  # metadata that only folders have


class AdlsStorage:
    """A folder of a container; pickles as its address and the reference to its credential, nothing else."""

    concurrent_reads = 8  # the storage is some milliseconds away

    def __init__(self, uri: str, options: StorageOptions | None = None):
        match = URI.fullmatch(uri)
        if match is None or ":" in match[1] or SIGNATURE.search(uri):
            raise StorageError(
                f"{uri} is not abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH (a SAS token is no part "
                "of it: put it into an environment variable and name that with storage.credential=env:NAME)"
            )
        self.options = options or StorageOptions()
        if not (self.options.endpoint or AZURE.fullmatch(match[2])):
            raise StorageError(
                f"{uri}: {match[2]} is no host of Azure Data Lake Storage, so it gets no credential; correct the "
                "location, or set storage.endpoint to the service's address"
            )
        self._container, self._host = match[1], match[2]
        self._base = f"abfss://{match[1]}@{match[2]}"
        self._folder = posixpath.normpath(f"/{match[3] or ''}").strip("/")
        self.root = f"{self._base}/{self._folder}".rstrip("/")

    def __repr__(self) -> str:
        return f"AdlsStorage({self.root!r})"

    def __reduce__(self) -> tuple:
        return AdlsStorage, (self.root, self.options)

    def join(self, *parts: str) -> str:  # noqa: D102
        return "/".join([self.root, *(part.strip("/") for part in parts if part)])

    def list(
        self,
        prefix: str = "",
        directories: bool = False,
        skip: Collection[str] = (),
        tolerant: bool = False,  # one request lists all folders, and there are no links
        outside_links: bool = True,
    ) -> Iterator[Entry]:
        """List a page at a time, in one pass; modification times are of whole seconds.

        Raises:
            StorageError: there is no such folder, or it cannot be listed.
        """
        start, ours = self._name(prefix), [folder for folder in skip if folder.startswith(f"{self._base}/")]
        skipped = tuple(f"{self._name(folder)}/" for folder in ours)
        try:
            with self._explained(self._uri(start)):
                if start and not _is_folder(properties := self._file(start).get_file_properties()):
                    yield Entry(self._uri(start), properties.size, properties.last_modified)
                    return
                for path in self._files.get_paths(start or None, recursive=True, max_results=PAGE):
                    if (directories or not path.is_directory) and not f"{path.name}/".startswith(skipped):
                        modified = path.last_modified.replace(tzinfo=UTC)
                        yield Entry(self._uri(path.name), path.content_length or 0, modified, path.is_directory)
        except FileNotFoundError:
            raise StorageError(f"{self._uri(start)}: no such folder; check the location, or create it first") from None

    def open(self, path: str) -> BinaryIO:
        """A temporary copy of a file, fetched a few ranges at a time, to read from any position.

        Raises:
            OSError: as for `read`.
            StorageError: likewise; or there is no space for temporary files.
        """
        try:
            with contextlib.ExitStack() as stack:
                copy = stack.enter_context(tempfile.TemporaryFile())
                with self._download(path) as download:
                    download.readinto(copy)
                copy.seek(0)
                stack.pop_all()
            return copy
        except OSError as error:
            if error.filename == path:
                raise
            raise StorageError(
                f"a video cannot be copied to this machine's disk ({error.strerror}); make space for temporary files, "
                "or set TMPDIR to a folder that has it, and run again"
            ) from None

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Read a file, a large one in several ranges at once.

        Raises:
            OSError: there is no such file, it is a folder, it is too long, or its access rights forbid it.
            StorageError: the storage does not answer, or refuses the credential.
        """
        with self._download(path) as download:
            if limit is not None and download.size > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
            return download.readall()

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """A file to write to, which appears whole when the block ends; missing folders are made."""
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            self._put(path, cast(BinaryIO, file))

    def write(self, path: str, data: bytes) -> None:  # noqa: D102
        self._put(path, io.BytesIO(data))

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
        """As in `Storage`; with a token where the credential is an identity, so that this holds for one use.

        Raises:
            StorageError: the credential cannot be found.
        """
        options = {
            "account_name": self._account,
            "endpoint": self.options.endpoint or f"https://{self._host.replace('.dfs.', '.blob.', 1)}",
            "allow_http": "true",  # of no matter unless `storage.endpoint` is such an address
            "max_retries": str(client.RETRY["retry_total"]),
            "retry_timeout": "60s",
            "connect_timeout": f"{client.TIMEOUTS['connection_timeout']}s",
            "timeout": f"{client.TIMEOUTS['read_timeout']}s",
        }
        credential = resolve(self.options.credential, self._account)
        if isinstance(credential, str):
            options["sas_key"] = credential
        elif isinstance(credential, AzureNamedKeyCredential):
            options["account_key"] = credential.named_key.key
        else:
            options["bearer_token"] = credential.get_token(STORAGE_SCOPE).token
        return f"az://{self._container}/{quote(self._name(path))}", options

    def refusal(self, code: str) -> StorageError:  # noqa: D102
        client.forget_clients()  # the reference may lead to a new credential by now
        return StorageError(
            f"{self.root}: the credential {self.options.credential} was refused ({code}); it is wrong, lacks a "
            "permission or has expired: renew it and run again, what is finished is kept"
        )

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
        reference = self.options.credential
        # A variable that was set anew is another credential.
        value = os.environ.get(reference.removeprefix("env:")) if reference.startswith("env:") else None
        address = self.options.endpoint or f"https://{self._host}"
        return client.get_client(address, self._account, self._container, reference, hash(value), RANGE_BYTES)

    @property
    def _account(self) -> str:
        return self._host.partition(".")[0]

    def _file(self, name: str) -> DataLakeFileClient:
        return self._files.get_file_client(name)

    def _uri(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")

    def _name(self, path: str) -> str:
        """A path in its container: of a URI as `list` gives it, or relative to the root."""
        if path == self._base or path.startswith(f"{self._base}/"):
            return path.removeprefix(self._base).strip("/")
        if URI.fullmatch(path):
            raise StorageError(f"{path} is not in {self._base}")
        return "/".join(part for part in (self._folder, path.strip("/")) if part)

    @contextlib.contextmanager
    def _download(self, path: str) -> Iterator[StorageStreamDownloader]:
        with self._explained(path, of_one_file=True):
            download = self._file(self._name(path)).download_file(max_concurrency=RANGES)
            if not download.size and IS_FOLDER in download.properties.metadata:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            yield download

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
        try:
            yield
        except AzureError as error:
            raise self._explain(error, path, of_one_file) from None

    def _explain(self, error: AzureError, path: str, of_one_file: bool) -> Exception:
        status, code = getattr(error, "status_code", None), _code_of(error)
        message = first_line(error)
        if code in ("FilesystemNotFound", "ContainerNotFound"):
            return StorageError(f"{self._base}: there is no such container; check the location, or create it first")
        if status == 404:
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if status == 403 and code == "AuthorizationPermissionMismatch" and of_one_file:
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if status in (401, 403) or isinstance(error, ClientAuthenticationError):
            return self.refusal(code or message)
        return StorageError(
            f"{self.root}: the storage does not answer as it should ({code or message}), after {client.TRIES} more "
            "tries where that may help; run again when it does, what is finished is kept"
        )


def _is_folder(properties: Any) -> bool:
    return IS_FOLDER in properties.metadata


def _code_of(error: AzureError) -> str:
    """The service's name for an error, empty where there is none."""
    code = getattr(error, "error_code", None)
    return str(getattr(code, "value", code or ""))
