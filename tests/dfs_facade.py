"""ADLS Gen2 on this machine: Azurite, which serves the Blob API only, and in front of it the DFS API that it lacks.

Requests of the DFS API are translated into Blob requests. Everything else passes through untouched, so that ranges,
ETags, SAS tokens and keys are Azurite's to judge; only listings from one name on are cut here. Renaming and deleting
are atomic, as with a hierarchical namespace: one lock holds off whoever could see a half. `disturb` breaks chosen
requests as a network and a busy service do.

    python tests/dfs_facade.py          starts both, and prints the endpoint
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode
from xml.etree import ElementTree
from xml.sax.saxutils import escape

PROJECT = Path(__file__).resolve().parent.parent
END_TOO = ["setpriv", "--pdeathsig", "KILL"]  # begins the command of a process that is to end if this one is killed
AZURITE = PROJECT / ".venv" / "node" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
ACCOUNT = "devstoreaccount1"
# The emulator's published key: every Azurite has it, so it protects nothing.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
FOLDER = {"x-ms-meta-hdi_isfolder": "true"}
CODES = {"BlobAlreadyExists": "PathAlreadyExists", "BlobNotFound": "PathNotFound"}
CODES |= {"ContainerNotFound": "FilesystemNotFound"}
SAS_NAMES = {
    "sv",
    "ss",
    "srt",
    "sp",
    "st",
    "se",
    "spr",
    "sig",
    "sr",
    "si",
    "sip",
    "skoid",
    "sktid",
    "skt",
    "ske",
    "sks",
}


def missing() -> str | None:
    """Why Azurite cannot be started here, or None."""
    if not shutil.which("node"):
        return "there is no node on the PATH: `make azurite` installs it through apt-get"
    return None if AZURITE.exists() else "Azurite is not installed: run `make azurite`"


@dataclass
class Request:
    method: str
    path: str  # as sent, percent-encoded, with the account
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes = b""

    @property
    def container(self) -> str:
        return unquote((self.path.split("/") + ["", ""])[2])

    @property
    def name(self) -> str:
        """Of the file or folder, decoded."""
        return unquote("/".join(self.path.split("/")[3:])).strip("/")

    @property
    def is_dfs(self) -> bool:
        by_json = self.method == "DELETE" and "json" in self.headers.get("accept", "")
        return bool({"resource", "action"} & set(self.query)) or "x-ms-rename-source" in self.headers or by_json

    @property
    def is_read(self) -> bool:
        """Whether a file's content is asked for."""
        return self.method == "GET" and bool(self.name) and not self.query.keys() - SAS_NAMES


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Refusal(Exception):  # noqa: N818 - it is an answer
    def __init__(self, status: int, code: str):
        super().__init__(code)
        body = json.dumps({"error": {"code": code, "message": f"{code} at {time.ctime()}"}}).encode()
        self.answer = Answer(status, {"x-ms-error-code": code, "Content-Type": "application/json"}, body)


# What a disturbance does with a request: an answer of its own, or one of these.
DROP = "close the connection before anything is done"
DROP_AFTERWARDS = "do it, and close the connection before the answer"
CUT = "close the connection in the middle of the answer's body"
EXPIRE = "let the request's SAS token be of yesterday"
BUSY = Refusal(503, "ServerBusy").answer
Rule = Callable[[Request], Answer | str | None]


class DfsFacade(ThreadingHTTPServer):
    """One loopback port with both APIs; `requests` are all that came."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: tuple[str, int], tls: ssl.SSLContext | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.local = upstream, threading.local()
        self.lock = threading.RLock()
        self.pending: dict[tuple[str, str], dict[int, int]] = {}  # appended and not flushed: position -> length
        # What Azurite needs not be asked for: all folders, and the headers of files without anything in them yet.
        self.folders: set[tuple[str, str]] = set()
        self.created: dict[tuple[str, str], dict[str, str]] = {}
        self.synthetic: dict[str, int] = {}  # containers that exist in listings only -> files
        self.requests: list[Request] = []
        self.keep = True
        self.rules: list[Rule] = []
        self.tokens: set[str] = set()  # of Entra ID
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True, name="dfs").start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{ACCOUNT}"

    @contextlib.contextmanager
    def disturb(self, rule: Rule) -> Iterator[None]:
        """Ask a rule about each request for the length of a block."""
        self.rules.append(rule)
        try:
            yield
        finally:
            self.rules.remove(rule)

    def make_container(self) -> str:
        name = f"c{uuid.uuid4().hex[:12]}"
        answer = self.send(Request("PUT", f"/{ACCOUNT}/{name}", {"restype": "container"}, {}))
        assert answer.status == 201, answer
        return name

    def delete_container(self, name: str) -> None:
        """With its files: Azurite looks through all that it has for each request."""
        _checked(self.send(Request("DELETE", f"/{ACCOUNT}/{name}", {"restype": "container"}, {})))

    def put(self, container: str, name: str, data: bytes) -> None:
        """Bring a file as somebody else does, in one request past the DFS API, which has four."""
        request = Request("PUT", f"/{ACCOUNT}/{container}/{quote(name)}", {}, {"x-ms-blob-type": "BlockBlob"}, data)
        with self.lock:
            self._make_folders(request, name.rpartition("/")[0])
        _checked(self.send(request))

    def copy_folder(self, container: str, source: str, target: str) -> None:
        """Copy a folder with all that is below and what is known of it, a request a file."""
        request = Request("PUT", f"/{ACCOUNT}/{container}/{quote(target)}", {}, {})
        with self.lock:
            self._make_folders(request, target)
            for name in list(self._names(request, f"{source}/")):
                copied = f"{target}/{name.removeprefix(f'{source}/')}"
                self._copy(request, name, copied, {})
                if (container, name) in self.folders:
                    self.folders.add((container, copied))

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that is gone, on purpose in most tests

    # ------------------------------------------------------------ Azurite

    def send(self, request: Request) -> Answer:
        """Pass a request on; one without any authorization, which is the facade's own, gets the account key's."""
        headers = {key: value for key, value in request.headers.items() if key != "host"}
        if "authorization" not in headers and "sig" not in request.query:
            headers |= {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
            if request.body:
                headers["content-length"] = str(len(request.body))
            headers["authorization"] = _signature(request, headers)
        url = request.path + (f"?{urlencode(request.query, quote_via=quote)}" if request.query else "")
        headers["content-length"] = str(len(request.body))
        for again in (True, False):
            if getattr(self.local, "connection", None) is None:
                self.local.connection = http.client.HTTPConnection(*self.upstream, timeout=60)
            try:
                self.local.connection.request(request.method, url, request.body or None, headers)
                response = self.local.connection.getresponse()
                return Answer(response.status, dict(response.getheaders()), response.read())
            except (http.client.HTTPException, ConnectionError):
                self.local.connection = None  # Azurite has closed it meanwhile
                if not again:
                    raise
        raise AssertionError

    def _blob(
        self,
        of: Request,
        method: str,
        name: str,
        query: dict | None = None,
        headers: dict | None = None,
        body: bytes = b"",
    ) -> Answer:
        """A Blob request on behalf of a DFS request, with its SAS token."""
        sas = {key: value for key, value in of.query.items() if key in SAS_NAMES}
        kept = {"x-ms-version": "2021-12-02"} if sas else {}
        path = f"/{ACCOUNT}/{of.container}" + (f"/{quote(name)}" if name else "")
        return self.send(Request(method, path, {**(query or {}), **sas}, {**kept, **(headers or {})}, body))

    def _authorize(self, request: Request) -> None:
        """Judge tokens and, for what is translated, keys; Azurite judges the rest, SAS tokens among it."""
        given = request.headers.get("authorization", "")
        if given.startswith("Bearer "):
            if given.removeprefix("Bearer ") not in self.tokens:
                raise Refusal(401, "InvalidAuthenticationInfo")
            del request.headers["authorization"]  # Azurite gets the key's instead
        elif not given and "sig" not in request.query:
            raise Refusal(401, "NoAuthenticationInformation")
        elif request.is_dfs and given and given != _signature(request, request.headers):
            raise Refusal(403, "AuthenticationFailed")

    # ------------------------------------------------------------ the DFS API

    def answer(self, request: Request) -> Answer:
        try:
            self._authorize(request)
            if request.is_dfs:
                with self.lock:
                    return self._dfs(request)
        except Refusal as refusal:
            return refusal.answer
        answer = self.send(request)
        if first := request.query.get("startFrom"):
            answer.body = _from(answer.body, first)
        if request.method == "PUT" and answer.status == 201:
            with self.lock:
                self._make_folders(Request("PUT", request.path, {}, {}), request.name.rpartition("/")[0])
        return answer

    def _dfs(self, request: Request) -> Answer:
        if request.method == "GET" and request.query.get("resource") == "filesystem":
            return self._list(request)
        if request.method == "DELETE":
            return self._delete(request)
        if "x-ms-rename-source" in request.headers:
            return self._rename(request)
        if request.method == "PUT":
            return self._create(request)
        if request.query.get("action") == "append":
            return self._append(request)
        if request.query.get("action") == "flush":
            return self._flush(request)
        raise Refusal(501, "NotImplementedInThisFacade")

    def _create(self, request: Request) -> Answer:
        self._make_folders(request, request.name.rpartition("/")[0])
        headers = {"x-ms-blob-type": "BlockBlob", **_metadata(request), **_conditions(request)}
        if kind := request.headers.get("x-ms-content-type"):
            headers["x-ms-blob-content-type"] = kind
        if request.query["resource"] == "directory":
            headers |= FOLDER
        elif (request.container, request.name) in self.folders:
            raise Refusal(409, "PathAlreadyExists")
        else:
            self._forget(request.container, request.name)
        answer = _checked(self._blob(request, "PUT", request.name, headers=headers))
        if request.query["resource"] == "directory":
            self.folders.add((request.container, request.name))
        else:
            known = {"content-length": "0", "content-type": kind or "application/octet-stream", **_metadata(request)}
            self.created[request.container, request.name] = known
        return answer

    def _forget(self, container: str, name: str) -> None:
        self.folders.discard((container, name))
        self.created.pop((container, name), None)
        self.pending.pop((container, name), None)

    def _append(self, request: Request) -> Answer:
        if (request.container, request.name) not in self.created:
            self._head(request, request.name)
        position = int(request.query["position"])
        query = {"comp": "block", "blockid": _block(position)}
        _checked(self._blob(request, "PUT", request.name, query, body=request.body))
        self.pending.setdefault((request.container, request.name), {})[position] = len(request.body)
        return Answer(202)

    def _flush(self, request: Request) -> Answer:
        head = self.created.get((request.container, request.name)) or self._head(request, request.name)
        end = committed = int(head["content-length"])
        pending = self.pending.get((request.container, request.name), {})
        if committed and request.headers.get("if-none-match") == "*":
            raise Refusal(412, "ConditionNotMet")
        while end in pending:
            end += pending[end]
        if end != int(request.query["position"]):
            raise Refusal(400, "InvalidFlushPosition")
        blocks = []
        if committed:
            query = {"comp": "blocklist", "blocklisttype": "committed"}
            listed = _checked(self._blob(request, "GET", request.name, query))
            blocks = [element.text or "" for element in ElementTree.fromstring(listed.body).iter("Name")]
        blocks += [_block(position) for position in sorted(pending)]
        body = "".join(f"<Latest>{escape(block)}</Latest>" for block in blocks)
        kept = {key: value for key, value in head.items() if key.startswith("x-ms-meta-")}
        body = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{body}</BlockList>'
        headers = {**kept, **_conditions(request), "x-ms-blob-content-type": head["content-type"]}
        answer = _checked(self._blob(request, "PUT", request.name, {"comp": "blocklist"}, headers, body.encode()))
        self._forget(request.container, request.name)
        return Answer(200, answer.headers)

    def _rename(self, request: Request) -> Answer:
        location = request.headers["x-ms-rename-source"].partition("?")[0]
        container, _, source = unquote(location).strip("/").partition("/")
        assert container == request.container, "a rename into another file system"
        try:
            is_folder = FOLDER.keys() <= self._head(request, source).keys()
        except Refusal as refusal:
            raise Refusal(404, "SourcePathNotFound") from refusal
        parent = request.name.rpartition("/")[0]
        if parent and not self._is_folder(request, parent):
            raise Refusal(404, "RenameDestinationParentPathNotFound")
        answer = self._move(request, source, request.name, _conditions(request))
        for child in list(self._names(request, f"{source}/")) if is_folder else []:
            self._move(request, child, f"{request.name}/{child.removeprefix(source + '/')}", {})
        return Answer(201, {key: value for key, value in answer.headers.items() if key.lower() == "etag"})

    def _move(self, request: Request, source: str, target: str, conditions: dict[str, str]) -> Answer:
        answer = self._copy(request, source, target, conditions)
        _checked(self._blob(request, "DELETE", source))
        if (request.container, source) in self.folders:
            self.folders.add((request.container, target))
        self._forget(request.container, source)
        return answer

    def _copy(self, request: Request, source: str, target: str, conditions: dict[str, str]) -> Answer:
        sas = urlencode({key: value for key, value in request.query.items() if key in SAS_NAMES})
        host, port = self.upstream
        url = f"http://{host}:{port}/{ACCOUNT}/{request.container}/{quote(source)}"
        headers = {"x-ms-copy-source": f"{url}?{sas}" if sas else url, **conditions}
        return _checked(self._blob(request, "PUT", target, headers=headers))

    def _delete(self, request: Request) -> Answer:
        is_folder = FOLDER.keys() <= self._head(request, request.name).keys()
        children = list(self._names(request, f"{request.name}/")) if is_folder else []
        if children and request.query.get("recursive") != "true":
            raise Refusal(409, "DirectoryNotEmpty")
        for name in [*reversed(children), request.name]:
            conditions = _conditions(request) if name == request.name else {}
            answer = self._blob(request, "DELETE", name, headers=conditions)
            if answer.status != 404:  # a folder that is nowhere but in its files' names
                _checked(answer)
            self._forget(request.container, name)
        return Answer(200)

    def _list(self, request: Request) -> Answer:
        folder = request.query.get("directory", "").strip("/")
        most = int(request.query.get("maxResults", 5000))
        if request.container in self.synthetic:
            return _synthetic_page(self.synthetic[request.container], most, request.query.get("continuation"))
        if folder and "continuation" not in request.query and not self._is_folder(request, folder):
            raise Refusal(404, "PathNotFound")
        found, marker = self._page(request, f"{folder}/" if folder else "", most, request.query.get("continuation"))
        if request.query.get("recursive") != "true":
            found = [path for path in found if "/" not in path["name"].removeprefix(f"{folder}/")]
        headers = {"x-ms-continuation": marker} if marker else {}
        return Answer(200, {"Content-Type": "application/json", **headers}, json.dumps({"paths": found}).encode())

    # ------------------------------------------------------------ folders and listings in Azurite

    def _head(self, request: Request, name: str) -> dict[str, str]:
        answer = self._blob(request, "HEAD", name)
        if answer.status == 404 and self._children(request, name):
            return {"content-length": "0", **FOLDER}
        return {key.lower(): value for key, value in _checked(answer).headers.items()}

    def _is_folder(self, request: Request, name: str) -> bool:
        if (request.container, name) in self.folders:
            return True
        try:
            return "x-ms-meta-hdi_isfolder" in self._head(request, name)
        except Refusal:
            return False

    def _make_folders(self, request: Request, name: str) -> None:
        if not name or (request.container, name) in self.folders:
            return
        self._make_folders(request, name.rpartition("/")[0])
        headers = {"x-ms-blob-type": "BlockBlob", "if-none-match": "*", **FOLDER}
        answer = self._blob(request, "PUT", name, headers=headers)
        if answer.status != 409:
            _checked(answer)
        elif not self._is_folder(request, name):
            raise Refusal(409, "PathConflict")
        self.folders.add((request.container, name))

    def _children(self, request: Request, name: str | None = None) -> bool:
        name = request.name if name is None else name
        return bool(name) and next(self._names(request, f"{name}/", 1), None) is not None

    def _names(self, request: Request, prefix: str, most: int = 5000) -> Iterator[str]:
        marker: str | None = ""
        while marker is not None:
            found, marker = self._page(request, prefix, most, marker)
            yield from (path["name"] for path in found)

    def _page(self, request: Request, prefix: str, most: int, marker: str | None) -> tuple[list[dict], str | None]:
        query = {"restype": "container", "comp": "list", "include": "metadata", "maxresults": str(most)}
        query |= {"prefix": prefix} if prefix else {}
        answer = _checked(self._blob(request, "GET", "", query | ({"marker": marker} if marker else {})))
        # Azurite writes names into XML as they are; what XML cannot hold cannot be listed.
        root = ElementTree.fromstring(answer.body)
        found = []
        for blob in root.iter("Blob"):
            properties = {element.tag: element.text or "" for element in blob.find("Properties") or ()}
            path = {
                "name": blob.findtext("Name") or "",
                "contentLength": properties["Content-Length"],
                "lastModified": properties["Last-Modified"],
                "etag": properties["Etag"].strip('"'),
            }
            if blob.find("Metadata/hdi_isfolder") is not None:
                path["isDirectory"] = "true"
            found.append(path)
        return found, root.findtext("NextMarker") or None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # an answer in one packet
    server: DfsFacade

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        if self.headers.get("Host", "").startswith(f"{ACCOUNT}."):  # as in Azure; Azurite has the account in the path
            path = f"/{ACCOUNT}{path}"
        length = int(self.headers.get("Content-Length") or 0)
        headers = {name.lower(): value for name, value in self.headers.items()}
        headers.pop("connection", None)
        request = Request(
            self.command, path, dict(parse_qsl(query, keep_blank_values=True)), headers, self.rfile.read(length)
        )
        if self.server.keep:
            self.server.requests.append(request)
        effect = next((found for rule in self.server.rules if (found := rule(request)) is not None), None)
        if effect == DROP:
            self.close_connection = True
            return
        if effect == EXPIRE and "sig" in request.query:
            request.query["se"] = "2020-01-01T00:00:00Z"
        answer = effect if isinstance(effect, Answer) else self.server.answer(request)
        request.body = b""  # nobody looks at it again, and all requests are kept
        if effect == DROP_AFTERWARDS:
            self.close_connection = True
            return
        self._write(request, answer, half=effect == CUT)

    def _write(self, request: Request, answer: Answer, half: bool) -> None:
        self.send_response_only(answer.status)
        given = {name.lower(): value for name, value in answer.headers.items()}
        if request.method != "HEAD" or "content-length" not in given:
            given["content-length"] = str(len(answer.body))
        for name in ("connection", "keep-alive", "transfer-encoding"):
            given.pop(name, None)
        for name, value in given.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if half else answer.body)
        self.wfile.flush()
        self.close_connection = self.close_connection or half

    do_GET = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_POST = _serve  # noqa: N815

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


def _signature(request: Request, headers: dict[str, str]) -> str:
    """The Authorization header of the Shared Key scheme."""
    names = ("content-encoding", "content-language", "content-length", "content-md5", "content-type", "date")
    names += ("if-modified-since", "if-match", "if-none-match", "if-unmodified-since", "range")
    standard = [headers.get(name, "") for name in names]
    standard[2] = "" if standard[2] == "0" else standard[2]
    ours = [f"{name}:{headers[name].strip()}" for name in sorted(headers) if name.startswith("x-ms-")]
    resource = [f"/{ACCOUNT}{request.path}", *(f"{key.lower()}:{request.query[key]}" for key in sorted(request.query))]
    text = "\n".join([request.method, *standard, *ours, *resource])
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    return f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"


def _checked(answer: Answer) -> Answer:
    if answer.status >= 400:
        code = {key.lower(): value for key, value in answer.headers.items()}.get("x-ms-error-code", "")
        fallback = {404: "PathNotFound", 403: "AuthenticationFailed"}.get(answer.status, "InternalError")
        raise Refusal(answer.status, CODES.get(code, code or fallback))
    return answer


def _conditions(request: Request) -> dict[str, str]:
    return {key: value for key, value in request.headers.items() if key in ("if-match", "if-none-match")}


def _metadata(request: Request) -> dict[str, str]:
    """From the DFS API's one header `name=base64,...` to the Blob API's many."""
    pairs = [pair.partition("=") for pair in request.headers.get("x-ms-properties", "").split(",") if pair]
    return {f"x-ms-meta-{name.strip()}": base64.b64decode(value).decode() for name, _, value in pairs}


def _from(listing: bytes, first: str) -> bytes:
    """A listing from one name on, which Azure's service sees to and Azurite does not."""
    root = ElementTree.fromstring(listing)
    if (blobs := root.find("Blobs")) is not None:
        for blob in [blob for blob in blobs if (blob.findtext("Name") or "") < first]:
            blobs.remove(blob)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _block(position: int) -> str:
    return base64.b64encode(f"{position:021d}".encode()).decode()


def _synthetic_page(files: int, most: int, continuation: str | None) -> Answer:
    start = int(continuation or 0)
    end = min(files, start + most)
    modified = formatdate(1_700_000_000, usegmt=True)
    found = [
        {"name": f"photos/{i:09d}.jpg", "contentLength": str(i), "lastModified": modified, "etag": str(i)}
        for i in range(start, end)
    ]
    headers = {"x-ms-continuation": str(end)} if end < files else {}
    return Answer(200, {"Content-Type": "application/json", **headers}, json.dumps({"paths": found}).encode())


@contextlib.contextmanager
def start_azurite(folder: Path) -> Iterator[tuple[str, int]]:
    """Azurite's blob service in memory, on a free port."""
    options = ["--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry", "--silent"]
    # The SDK speaks a newer version of the API than Azurite knows of.
    command = [*END_TOO, "node", str(AZURITE), *options, "--skipApiVersionCheck"]
    with (folder / "azurite.log").open("wb") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"listens on http://([\d.]+):(\d+)", line):
                break
        else:
            raise RuntimeError(f"Azurite has ended: {(folder / 'azurite.log').read_text()}")
        yield found[1], int(found[2])
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description="ADLS Gen2 on a free loopback port, until standard input ends")
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds to wait in each request")
    latency = parser.parse_args().latency / 1000
    with tempfile.TemporaryDirectory() as folder, start_azurite(Path(folder)) as upstream:
        facade = DfsFacade(upstream)
        facade.keep = False
        if latency:
            facade.rules.append(lambda request: time.sleep(latency))
        print(facade.endpoint, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
