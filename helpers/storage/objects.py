"""Object stores as a `Storage`, over obstore: `s3://BUCKET/PATH`, `gs://BUCKET/PATH` and `http(s)://HOST/PATH`.

Paths are whole URIs. Names in S3 and GCS stand as they are, those of a web server percent-encoded, as they were given.
An object appears whole or not at all, but these stores do not rename in one step: `rename` copies and then deletes.
Results bear that: a commit of their table is one object, which can be created once. Folders are parts of names, so
there is no empty one. A web server lists nothing and takes nothing: a location is one file, or a folder whose files are
read by their names, as those of a bundle are.

obstore takes no name with a control character, an empty part or a part of dots alone (`a//b`, `./a`). Where a listing
is tolerant, a folder that holds one is an entry with an error, and all others are listed.

ADLS Gen2 is read through here too (`helpers.storage.adls`), at its Blob endpoint. Executors import this module.
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import operator
import os
import posixpath
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies

import obstore
from obstore.exceptions import BaseError, InvalidPathError, NotSupportedError, PreconditionError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from helpers.errors import StorageError, first_line
from helpers.options import StorageOptions
from helpers.redaction import remember
from helpers.storage.credentials import STORAGE_SCOPE, fetch, forget_identity, resolve
from helpers.storage.interface import Entry
from helpers.storage.local import NO_TIME
from helpers.storage.prefetch import chain_ahead

URI = re.compile(r"((?:s3|gs)://[a-z0-9][\w.-]+|https?://[\w.-]+(?::\d+)?)(/.*)?", re.DOTALL | re.ASCII)
SECRET = re.compile(r"[?&;](sig|x-(amz|goog)-signature)(=|%3d)", re.IGNORECASE)
TRIES = 5  # after the first
BACKOFF = {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=15), "base": 2}
RETRY_TIME = timedelta(minutes=2)  # in which all tries begin
TIMEOUTS = {name: timedelta(seconds=s) for name, s in (("connect_timeout", 10), ("read_timeout", 60))}
TIMEOUTS["timeout"] = timedelta(hours=1)  # of a whole answer, which may be long; one that stands still ends sooner
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # as Azure's SDK looks for them
PAGE = 1000  # objects of a listing at once
LISTINGS = 8  # of folders, under way at once ...
MOST_FOLDERS = 256  # ... where there are no more than so many: each costs a request, and may be small
FIRST_BYTES = 256 * 2**10  # of a file that is opened, and after a jump in it ...
MOST_BYTES = 8 * 2**20  # ... and, twice as many each time, in one request while it is read on
CHUNK_BYTES = 8 * 2**20  # of a file written; a longer one is sent in parts, and appears when all are there
SPOOL_BYTES = 16 * 2**20
IS_FOLDER = "hdi_isfolder"  # metadata that folders have in ADLS Gen2
CODE = re.compile(r"(?:<Code>|\"code\": ?\")(\w+)")
STATUS = re.compile(r"status code: (\d+)[^:]*")
REFUSED = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthenticationFailed"}
OF_ONE_FILE = {"AccessDenied", "AuthorizationPermissionMismatch"}
NO_CONTAINER = {"NoSuchBucket", "ContainerNotFound", "FilesystemNotFound"}
BEHIND_END = re.compile(r"status code: 416|Wanted range starting at")
NO_IDENTITY = re.compile(r"/latest/api/token|/computeMetadata/")  # where AWS and GCP say who a machine is
OTHER_REGION = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}

Streams = list[Callable[[], Iterable[Entry]]]

_opening = threading.Lock()  # threads that read ahead would otherwise open a store each


def object_store_options(uri: str, options: StorageOptions) -> dict[str, str]:
    """Say in the words of the Rust crate `object_store` how a location is reached, as `deltalake` takes them.

    They hold the credential itself, so they are for the process that asks and go no further. Where the reference is
    `default`, S3 and GCS find the host's identity by themselves; for Azure they hold a token, which lasts for an hour
    or so. Raises StorageError if the credential cannot be found, or is of another form than the service's.
    """
    reference, names = options.credential, _address(uri, options)
    if uri.startswith("abfss:"):
        credential = _azure_credential(resolve(reference, names["account_name"]))
        words = {"access_key": "account_key", "sas_token": "sas_key", "token": "token"}
        names |= {words[name]: value for name, value in credential.items() if name in words}
    elif reference != "default":
        names |= _s3_credential(reference) if uri.startswith("s3:") else _gcs_credential(reference)
    return names


def check_host(address: str) -> None:
    """Say at once what a client would find out in a minute of tries: that there is no host of this name.

    Raises StorageError if there is none.
    """
    host = urlsplit(address).hostname
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        # Other failures may pass, and behind a proxy it is the proxy that knows names.
        if error.errno == socket.EAI_NONAME and not getproxies():
            remedy = "check the host's or account's name in the location, and storage.endpoint"
            raise StorageError(f"{host or address}: there is no such host; {remedy}") from None


def forget_stores() -> None:
    """Open new ones from now on: a reference may lead to another credential by then."""
    _open.cache_clear()
    forget_identity()


def credential_value(reference: str) -> int:
    """A hash of what a reference leads to, where that can change: a variable that was set anew."""
    return hash(os.environ.get(reference.removeprefix("env:")) if reference.startswith("env:") else None)


class ObjectStorage:
    """A folder of a bucket or a web server; pickles as its address and the reference to its credential only."""

    concurrent_reads = 8  # the storage is some milliseconds away

    def __init__(self, uri: str, options: StorageOptions | None = None):
        match = URI.fullmatch(uri)
        is_web = uri.startswith("http")
        if match is None or SECRET.search(uri) or (is_web and re.search(r"[?#]", uri)):
            raise StorageError(
                f"{uri} is none of s3://BUCKET/PATH, gs://BUCKET/PATH, abfss://CONTAINER@ACCOUNT.dfs.core.windows.net "
                "and http(s)://HOST/PATH (no key, token, user or query is part of it: a credential goes into an "
                "environment variable, named with storage.credential=env:NAME)"
            )
        self._place(match[1], match[2] or "", options)

    def _place(self, base: str, path: str, options: StorageOptions | None) -> None:
        self.options = options or StorageOptions()
        self._base = base
        self._folder = posixpath.normpath(f"/{path}").strip("/")
        self.root = self._uri(self._folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"

    def __reduce__(self) -> tuple:
        return type(self), (self.root, self.options)

    def join(self, *parts: str) -> str:  # noqa: D102
        return "/".join([self.root, *(part.strip("/") for part in parts if part)])

    def list(
        self, prefix: str = "", directories: bool = False, skip: Collection[str] = (), **tolerance: bool
    ) -> Iterator[Entry]:
        """List a page at a time, in the order of names; modification times are of whole seconds in most stores.

        There are no links. Raises StorageError if there is nothing of this name, or it cannot be listed; a folder below
        it neither, unless `tolerant`.
        """
        start, tolerant = self._name(prefix), tolerance.get("tolerant", False)
        left_out = tuple(f"{self._name(folder)}/" for folder in skip if folder.startswith(f"{self._base}/"))
        is_empty, previous = True, ""
        with self._explained(self._uri(start)):
            for entry in _without_markers(self._objects_at_once(start, tolerant)):
                is_empty = False
                if f"{self._name(entry.path)}/".startswith(left_out):
                    continue
                if directories:
                    yield from (Entry(path, 0, NO_TIME, True) for path in self._folders(start, previous, entry.path))
                yield entry
                previous = entry.path
            if is_empty:
                yield self._single(start)

    def open(self, path: str) -> BinaryIO:
        """One file, fetched as it is read; an error of that is one of `read`, or that it has changed meanwhile.

        Raises as `read` does, and StorageError if a web server has no ranges of files.
        """
        try:
            meta, first = self._fetch(path, 0, FIRST_BYTES)
        except EOFError:
            return io.BytesIO(self.read(path))

        version = {"if_match": meta["e_tag"]} if meta["e_tag"] else {}  # a web server may have none

        def fetch(start: int, end: int) -> Any:
            return self._fetch(path, start, end, **version)[1]

        return cast(BinaryIO, io.BufferedReader(_Ranges(fetch, meta["size"], first)))

    def read(self, path: str, limit: int | None = None) -> bytes:
        """Read a file in one request.

        Raises OSError if there is no such file, it is a folder, it is too long, or its access rights forbid it, and
        StorageError if the storage does not answer, or refuses the credential.
        """
        with self._explained(path, of_one_file=True):
            answer = self._get(path)
            if limit is not None and answer.meta["size"] > limit:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
            return answer.bytes().to_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Read a part of a file in one request; raises as `open` does."""
        try:
            return self._fetch(path, start, start + length)[1].to_bytes()
        except EOFError:
            return b""

    def stat(self, path: str) -> Entry:
        """What `list` says of one file; raises as `read` does."""
        with self._explained(path, of_one_file=True):
            return self._head(self._name(path))

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """A file to write to, which appears whole when the block ends.

        Of a writer that is killed while it sends a long one, the parts sent stay in the bucket unseen: a lifecycle rule
        for incomplete uploads removes them.
        """
        with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            self._put(path, cast(BinaryIO, file))

    def write(self, path: str, data: bytes) -> None:  # noqa: D102
        self._put(path, io.BytesIO(data))

    def rename(self, source: str, target: str) -> None:
        """Copy one file, and then delete it: whoever is killed between the two leaves both, whole."""
        with self._explained(source):
            store = self._writable(source)
            obstore.copy(store, self._name(source), self._name(target))
            obstore.delete(store, self._name(source))

    def delete(self, path: str) -> None:
        """Remove an object and all whose names continue its own after a slash."""
        name = self._name(path)
        with self._explained(path):
            store = self._writable(path)
            for page in obstore.list(store, name or None, chunk_size=PAGE):
                obstore.delete(store, [item["path"] for item in page])
            with contextlib.suppress(FileNotFoundError):
                if name:
                    obstore.delete(store, name)

    def exists(self, path: str) -> bool:  # noqa: D102
        name = self._name(path)
        with self._explained(path):
            with contextlib.suppress(FileNotFoundError):
                if name:
                    self._head(name)
                    return True
            return not self._is_web and (not name or self._is_folder(name))

    def prune(self, path: str) -> None:
        """Do nothing: a folder is a part of names, and goes with the last of them."""

    def delta_table(self, path: str) -> tuple[str, dict[str, str]]:
        """As in `Storage`.

        Raises StorageError if a web server holds no table, there is no such host, or the credential cannot be found.
        """
        self._writable(path)
        if (file := _authorities()) and not os.environ.get(CERTIFICATES[-1]):
            os.environ[CERTIFICATES[-1]] = str(file)  # the library knows no other setting
        retries = {"max_retries": TRIES, "retry_timeout": RETRY_TIME}
        retries |= {f"backoff_config.{name}": value for name, value in BACKOFF.items()}
        limits = {
            name: f"{value // timedelta(milliseconds=1)}ms" if isinstance(value, timedelta) else str(value)
            for name, value in {**TIMEOUTS, **retries}.items()
        }
        return f"{self._base}/{quote(self._name(path))}", {**object_store_options(self._base, self.options), **limits}

    def table_error(self, path: str, message: str) -> StorageError | None:  # noqa: D102
        if "Error performing" not in message:
            return None
        kind = FileNotFoundError if "status code: 404" in message else OSError
        error = self._explain(kind(message), self.join(path), False)
        return error if isinstance(error, StorageError) else None  # a file of the log is missing

    @property
    def _is_web(self) -> bool:
        return self._base.startswith("http")

    @property
    def _store(self) -> Any:
        with _opening:
            return _open(self._base, self.options, credential_value(self.options.credential))

    def _writable(self, path: str) -> Any:
        if self._is_web:
            raise StorageError(f"{self._uri(self._name(path))}: a web server is read only; name another location")
        return self._store

    def _uri(self, name: str) -> str:
        return f"{self._base}/{name}".rstrip("/")

    def _name(self, path: str) -> str:
        """A path below its base: of a URI as `list` gives it, or relative to the root."""
        if path == self._base or path.startswith(f"{self._base}/"):
            return path.removeprefix(self._base).strip("/")
        if re.match(rf"{re.escape(self._base.partition('//')[0])}//", path):
            raise StorageError(f"{path} is not in {self._base}")
        return "/".join(part for part in (self._folder, path.strip("/")) if part)

    def _key(self, name: str) -> str:
        """A name as obstore takes it."""
        return unquote(name) if self._is_web else name

    def _get(self, path: str, **conditions: Any) -> Any:
        return obstore.get(self._store, self._key(self._name(path)), options=cast(Any, conditions))

    def _head(self, name: str) -> Entry:
        meta = obstore.head(self._store, self._key(name))
        return Entry(self._uri(name), meta["size"], meta["last_modified"])

    def _fetch(self, path: str, start: int, end: int, **conditions: Any) -> tuple[Any, Any]:
        """What is known of a file, and a range of it; raises EOFError for one that begins where it ends."""
        with self._explained(path, of_one_file=True):
            try:
                answer = self._get(path, range=(start, end), **conditions)
                return answer.meta, answer.bytes()
            except BaseError as error:
                if BEHIND_END.search(str(error)):
                    raise EOFError from None
                raise

    def _put(self, path: str, file: BinaryIO) -> None:
        with self._explained(path):
            obstore.put(self._writable(path), self._name(path), file, chunk_size=CHUNK_BYTES)

    def _single(self, name: str) -> Entry:
        """The entry of one file; raises StorageError where there is none."""
        if name:
            with contextlib.suppress(FileNotFoundError):
                return self._head(name)
        why = "no such folder; check the location, or create it first"
        if self._is_web:
            why = "no such file; a web server does not list its folders, so name one image, video or archive"
        raise StorageError(f"{self._uri(name)}: {why}")

    def _objects_at_once(self, start: str, tolerant: bool) -> Iterator[Entry]:
        """What is below a folder, in the order of names; the folders in it at the same time, if that is worth it."""
        pages: Iterator[Any] = iter(() if self._is_web else obstore.list(self._store, start or None, chunk_size=PAGE))
        first: list[Any] = []
        streams: Streams = []
        with contextlib.suppress(InvalidPathError):
            first = list(next(pages, []))
            depth = len(start) + 1 if start else 0
            # Where a page has no folder, the level may have any number of objects.
            if len(first) == PAGE and any("/" in item["path"][depth:] for item in first):
                streams = self._streams(start, tolerant)
        if streams:
            yield from chain_ahead(streams, LISTINGS)
        else:
            yield from self._objects(start, tolerant, pages=itertools.chain([first], pages) if first else None)

    def _streams(self, start: str, tolerant: bool) -> Streams:
        """What lists the folders of the first level that has several, each by itself, and the objects between them."""
        level = obstore.list_with_delimiter(self._store, start or None)
        while len(level["common_prefixes"]) == 1 and not level["objects"]:
            level = obstore.list_with_delimiter(self._store, level["common_prefixes"][0])
        if not 2 <= len(level["common_prefixes"]) <= MOST_FOLDERS:
            return []
        parts: Any = [(f"{folder}/", None) for folder in level["common_prefixes"]]
        parts += [(item["path"], self._entry(item)) for item in level["objects"]]
        parts.sort(key=operator.itemgetter(0))
        streams: Streams = []
        for is_folder, group in itertools.groupby(parts, lambda part: part[1] is None):
            if is_folder:
                streams += [functools.partial(self._objects, name[:-1], tolerant) for name, _ in group]
            else:
                streams.append(functools.partial(iter, [entry for _, entry in group]))
        return streams

    def _objects(
        self, folder: str, tolerant: bool, after: str = "", pages: Iterable[Any] | None = None
    ) -> Iterator[Entry]:
        """What is below a folder, in the order of names, from after a name on; its pages may be there already."""
        last = after
        if pages is None:
            pages = () if self._is_web else obstore.list(self._store, folder or None, chunk_size=PAGE)
        try:
            for page in pages:
                for item in page:
                    if item["path"] > last:
                        last = item["path"]
                        yield self._entry(item)
        except InvalidPathError as error:
            if not tolerant:
                raise
            yield from self._level(folder, last, f"it holds a name that cannot be used ({_odd_path(error)}); rename it")

    def _level(self, folder: str, after: str, why: str) -> Iterator[Entry]:
        """The same, a level at a time: a name that cannot be used costs its own folder's objects only."""
        try:
            level = obstore.list_with_delimiter(self._store, folder or None)
        except InvalidPathError:
            yield Entry(self._uri(folder), 0, NO_TIME, True, why)
            return
        yield from (self._entry(item) for item in level["objects"] if item["path"] > after)
        for below in level["common_prefixes"]:
            yield from self._objects(below, True, after)

    def _entry(self, item: Any) -> Entry:
        return Entry(self._uri(item["path"]), item["size"], item["last_modified"])

    def _folders(self, start: str, previous: str, path: str) -> Iterator[str]:
        """The folders between the start and a path that are not those of the path before."""
        parts = self._name(path).removeprefix(start).strip("/").split("/")
        for depth in range(1, len(parts)):
            folder = self._uri("/".join([*([start] if start else []), *parts[:depth]]))
            if not previous.startswith(f"{folder}/"):
                yield folder

    def _is_folder(self, name: str) -> bool:
        with self._explained(self._uri(name)):
            return next(iter(obstore.list(self._store, name or None, chunk_size=1)), None) is not None

    @contextlib.contextmanager
    def _explained(self, path: str, of_one_file: bool = False) -> Iterator[None]:
        """Turn the store's errors, which may show URLs with a token, into ours."""
        try:
            yield
        except (BaseError, FileNotFoundError, ValueError) as error:
            raise self._explain(error, path, of_one_file) from None

    def _explain(self, error: Exception, path: str, of_one_file: bool) -> Exception:
        text = str(error)
        code, status = (match[1] if (match := form.search(text)) else "" for form in (CODE, STATUS))
        if code in NO_CONTAINER:
            return self._missing()
        if isinstance(error, FileNotFoundError):
            if of_one_file and not self._is_web and self._is_folder(self._name(path)):
                return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(error, PreconditionError):
            return OSError(errno.ESTALE, "it has changed while it was read", path)
        if isinstance(error, InvalidPathError):
            return StorageError(f"{path}: a name below it cannot be used ({_odd_path(error)}); rename it")
        if isinstance(error, ValueError) and "parse path" in text:
            return OSError(errno.EINVAL, "a name with control characters or empty parts cannot be used", path)
        if isinstance(error, NotSupportedError):
            return StorageError(f"{path}: this server has no ranges of files, which videos and archives need; copy it")
        if code in OTHER_REGION or "Received redirect" in text:
            return StorageError(f"{self._base} is in another region; name that with storage.region")
        if of_one_file and code in OF_ONE_FILE:
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if NO_IDENTITY.search(text):
            remedy = "give the machine a role or a service account, set AWS_ACCESS_KEY_ID or"
            remedy += " GOOGLE_APPLICATION_CREDENTIALS and its like, or name another storage.credential"
            return StorageError(f"default: this process has no identity at {self._base}; {remedy}")
        said = code or (status and f"HTTP {status}") or _said(text)
        if self._is_web and status in ("401", "403"):
            return StorageError(f"{path}: the web server gives it to nobody without a login ({said}); copy it")
        # S3 gives some reasons with status 400, and to a request without a body in its answer no reason.
        if status in ("401", "403") or code in REFUSED or said == "HTTP 400":
            return self._refused(said)
        return self._unanswered(said)

    def _missing(self) -> StorageError:
        return StorageError(f"{self._base}: there is no such container; check the location, or create it first")

    def _refused(self, code: str) -> StorageError:
        self._forget()
        why = "it is wrong, lacks a permission or has expired: renew it and run again, what is finished is kept"
        return StorageError(f"{self.root}: the credential {self.options.credential} was refused ({code}); {why}")

    def _forget(self) -> None:
        forget_stores()

    def _unanswered(self, why: str) -> StorageError:
        return StorageError(
            f"{self.root}: the storage does not answer as it should ({why}), after {TRIES} more tries where that may "
            "help; run again when it does, what is finished is kept"
        )


class _Ranges(io.RawIOBase):
    """A file by ranges: small ones after a jump, and larger and larger ones while it is read on."""

    def __init__(self, fetch: Callable[[int, int], Any], size: int, first: Any):
        self._fetch, self._size = fetch, size
        self._block, self._start, self._position, self._ahead = memoryview(first), 0, 0, FIRST_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._position < end:
            is_near = 0 <= self._position - end <= len(self._block)  # from header to header of a tar file, for example
            self._ahead = min(2 * self._ahead, MOST_BYTES) if is_near else FIRST_BYTES
            stop = min(self._size, self._position + max(len(buffer), self._ahead))
            self._block = memoryview(b"")  # two are never held at once
            self._block, self._start = memoryview(self._fetch(self._position, stop)), self._position
        piece = self._block[self._position - self._start :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


@functools.cache
def _open(base: str, options: StorageOptions, value: int) -> Any:
    """The one store of a process, location and credential; `value` tells credentials of one reference apart."""
    scheme, _, place = base.partition("://")
    config: Any = _address(base, options)
    if address := config.get("endpoint") or config.get("base_url") or (scheme.startswith("http") and base):
        check_host(address)
    authorities = _authorities()
    trusted = {"root_certificate": authorities.read_bytes()} if authorities else {}
    settings: Any = {
        "client_options": {**TIMEOUTS, **trusted, "allow_http": "allow_http" in config},
        "retry_config": {"max_retries": TRIES, "retry_timeout": RETRY_TIME, "backoff": BACKOFF},
    }
    reference = options.credential
    # Given as a function, a credential is the only one: the variables of the environment add nothing to it.
    if scheme == "abfss":
        credential = resolve(reference, config["account_name"])
        settings["credential_provider"] = functools.partial(_azure_credential, credential)
        return AzureStore(place.partition("@")[0], config=config, **settings)
    if scheme == "s3":
        if reference != "default":
            key = _s3_credential(reference)
            token = key.pop("session_token", None)
            settings["credential_provider"] = lambda: {**key, "token": token, "expires_at": None}
        return S3Store(place, config=config, **settings)
    if scheme == "gs":
        key = {} if reference == "default" else _gcs_credential(reference)
        return GCSStore(place, config=config | key, **settings)
    return HTTPStore(base, **settings)


def _address(uri: str, options: StorageOptions) -> dict[str, str]:
    """How a location is reached, without its credential."""
    scheme, endpoint = uri.partition(":")[0], options.endpoint
    names: dict[str, str | None] = {}
    if scheme == "abfss":
        host = uri.partition("@")[2].partition("/")[0]
        endpoint = endpoint or f"https://{host}"
        names = {"account_name": host.partition(".")[0], "endpoint": endpoint.replace(".dfs.", ".blob.", 1)}
    elif scheme == "s3":
        names = {"region": options.region, "endpoint": endpoint, "conditional_put": "etag"}
    elif scheme == "gs":
        names = {"base_url": endpoint}
    else:
        endpoint = uri
    if (endpoint or "").startswith("http:"):
        names["allow_http"] = "true"
    return {name: value for name, value in names.items() if value}


def _azure_credential(credential: Any) -> dict[str, Any]:
    """What `resolve` has returned, as obstore takes it."""
    if isinstance(credential, str):
        return {"sas_token": credential, "expires_at": None}
    if hasattr(credential, "named_key"):
        return {"access_key": credential.named_key.key, "expires_at": None}
    token = credential.get_token(STORAGE_SCOPE)
    return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}


def _s3_credential(reference: str) -> dict[str, str]:
    parts = fetch(reference).split(":")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise StorageError(f"{reference} holds no ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]; set it anew")
    for secret in parts[1:]:
        remember(secret)
    return dict(zip(("access_key_id", "secret_access_key", "session_token"), parts, strict=False))


def _gcs_credential(reference: str) -> dict[str, str]:
    key = fetch(reference)
    try:
        remember(json.loads(key)["private_key"])
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{reference} holds no service account's key (a JSON text); set it anew") from None
    return {"service_account_key": key}


def _authorities() -> Path | None:
    """The certificates of authorities to trust beside the system's, such as a company's own."""
    files = (Path(os.environ.get(name) or ".") for name in CERTIFICATES)
    return next((file for file in files if file.is_file()), None)


def _without_markers(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Leave out empty objects that stand for a folder: `a/` has the path `a`, and `a/b` follows."""
    held: Entry | None = None
    for entry in entries:
        if held and not entry.path.startswith(f"{held.path}/"):
            yield held
        held = None if entry.length or entry.is_directory else entry
        if held is None:
            yield entry
    if held:
        yield held


def _odd_path(error: Exception) -> str:
    """The name that obstore does not take, of its message about it."""
    match = re.search(r'[Pp]ath "(.*?)"', str(error), re.DOTALL)
    return repr(match[1]) if match else first_line(error)


def _said(text: str) -> str:
    """What an error is about, without the address, which the message before it has."""
    if "InvalidCertificate" in text or "invalid peer certificate" in text:
        return f"its certificate is not trusted: {CERTIFICATES[0]} may name a file with the authority's"
    return first_line(text).rpartition(" - ")[2]
