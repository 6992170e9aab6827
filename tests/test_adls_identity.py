"""Entra ID and Key Vault, spoken to over TLS under Azure's own host names; a proxy leads those to servers of ours."""

import contextlib
import datetime as dt
import ipaddress
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from dfs_facade import ACCOUNT, KEY, DfsFacade

from helpers.errors import StorageError
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.table import Table
from helpers.storage import StorageOptions, adls, objects
from helpers.storage.adls import AdlsStorage
from helpers.storage.credentials import resolve

DFS, BLOB = f"{ACCOUNT}.dfs.core.windows.net", f"{ACCOUNT}.blob.core.windows.net"
VAULT = "our-vault.vault.azure.net"
HEADER = "PLANTEDHEADER"


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> tuple[ssl.SSLContext, Path]:
    """A server's context, and the file that makes clients trust it."""
    now = dt.datetime.now(dt.UTC)
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "tests"))
    names = [x509.DNSName(host) for host in (DFS, BLOB, VAULT)] + [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]

    def sign(name: x509.Name, of: ec.EllipticCurvePrivateKey, is_authority: bool) -> bytes:
        builder = x509.CertificateBuilder(issuer, name, of.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        if not is_authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    folder = tmp_path_factory.mktemp("tls")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    (folder / "certificate.pem").write_bytes(sign(subject, key, False))
    (folder / "authority.pem").write_bytes(sign(issuer, authority, True))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context, folder / "authority.pem"


@dataclass
class Azure:
    """A host's managed identity, a vault, and a storage account that knows the identity's tokens."""

    storage: DfsFacade
    tokens: dict[str, str] = field(default_factory=dict)  # resource -> the last token given out
    secrets: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def token(self, path: str, headers: dict[str, str]) -> tuple[int, dict, dict]:
        if headers.get("X-IDENTITY-HEADER") != HEADER:
            return 400, {}, {"error": "invalid_request"}
        resource = parse_qs(urlsplit(path).query)["resource"][0]
        token = f"TOKEN-{len(self.asked)}-{threading.get_ident()}"
        self.asked.append(resource)
        self.tokens[resource] = token
        self.storage.tokens |= {token} if "storage" in resource else set()
        answer = {"access_token": token, "expires_on": str(int(time.time()) + 3600), "resource": resource}
        return 200, {}, {**answer, "token_type": "Bearer"}

    def secret(self, path: str, headers: dict[str, str]) -> tuple[int, dict, dict]:
        if headers.get("Authorization") != f"Bearer {self.tokens.get('https://vault.azure.net', '')}":
            challenge = 'Bearer authorization="https://login.microsoftonline.com/t", resource="https://vault.azure.net"'
            return 401, {"WWW-Authenticate": challenge}, {}
        name = urlsplit(path).path.split("/")[2]
        if name not in self.secrets:
            return 404, {}, {"error": {"code": "SecretNotFound", "message": f"A secret named {name} was not found"}}
        return 200, {}, {"value": self.secrets[name], "id": f"https://{VAULT}/secrets/{name}/1", "attributes": {}}


def serve(answer, context: ssl.SSLContext | None = None) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802
            status, headers, body = answer(self.path, dict(self.headers))
            content = json.dumps(body).encode()
            self.send_response_only(status)
            for name, value in {**headers, "Content-Type": "application/json", "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server


@pytest.fixture
def proxy() -> Iterator[tuple[str, dict[str, int]]]:
    """The address of a proxy for TLS, and the ports here that stand for hosts."""
    ports: dict[str, int] = {}

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    class Connect(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = b""
            while not asked.endswith(b"\r\n\r\n"):
                asked += self.request.recv(1)
            host = asked.split()[1].decode().partition(":")[0]
            with socket.create_connection(("127.0.0.1", ports[host])) as server:
                self.request.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                back = threading.Thread(target=pump, args=[server, self.request], daemon=True)
                back.start()
                pump(self.request, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connect) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", ports
        server.shutdown()


@pytest.fixture
def azure(dfs, tls, proxy, monkeypatch) -> Iterator[Azure]:
    context, trusted = tls
    azure = Azure(DfsFacade(dfs.upstream, context))
    identity, vault = serve(azure.token), serve(azure.secret, context)
    address, ports = proxy
    ports |= dict.fromkeys((DFS, BLOB), azure.storage.server_address[1]) | {VAULT: vault.server_address[1]}
    monkeypatch.setenv("HTTPS_PROXY", address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", "")
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{identity.server_address[1]}/token")
    monkeypatch.setenv("IDENTITY_HEADER", HEADER)
    adls.forget_clients()
    yield azure
    adls.forget_clients()
    azure.storage.stop()
    for server in (identity, vault):
        server.shutdown()
        server.server_close()


def test_the_hosts_identity_opens_a_storage_under_its_own_name(azure):
    """No endpoint and no credential are set: what a job on Azure has."""
    storage = AdlsStorage(f"abfss://{azure.storage.make_container()}@{DFS}/folder")
    storage.write("a/b", b"1")
    storage.rename("a/b", "c")
    assert storage.read("c") == b"1"
    assert {entry.path.removeprefix(storage.root) for entry in storage.list()} == {"/c"}
    storage.delete("a")
    assert not storage.exists("a")
    assert azure.asked == ["https://storage.azure.com"]  # once for all requests
    hosts = {request.headers["host"] for request in azure.storage.requests}
    assert hosts == {DFS, BLOB}


def test_the_hosts_identity_opens_a_table_under_its_own_name(azure):
    storage = AdlsStorage(f"abfss://{azure.storage.make_container()}@{DFS}/a folder")
    _, options = storage.delta_table("results")
    assert options["token"] in azure.storage.tokens and options["endpoint"] == f"https://{BLOB}"
    table = Table(storage, "results", RESULT_SCHEMA)
    assert table.create().number == table.open().number == 0
    assert storage.exists("results/_delta_log/00000000000000000000.json")
    assert len(azure.asked) == 1


def test_an_identity_without_access_is_told_without_its_token(azure):
    storage = AdlsStorage(f"abfss://{azure.storage.make_container()}@{DFS}/folder")
    storage.write("a", b"1")
    azure.storage.tokens.clear()
    with pytest.raises(StorageError, match="the credential default was refused") as error:
        storage.read("a")
    assert "TOKEN" not in str(error.value)


def test_a_server_whose_certificate_nobody_vouches_for_is_told_with_the_remedy(azure, monkeypatch):
    storage = AdlsStorage(f"abfss://{azure.storage.make_container()}@{DFS}/folder")
    storage.write("a", b"1")
    adls.forget_clients()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")
    monkeypatch.setattr(objects, "TRIES", 0)
    with pytest.raises(StorageError, match="certificate is not trusted: REQUESTS_CA_BUNDLE"):
        storage.read("a")


def test_a_host_without_an_identity_is_one_line(azure, monkeypatch):
    for name in ("IDENTITY_ENDPOINT", "IDENTITY_HEADER"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")  # looks nowhere else
    with pytest.raises(StorageError, match="default: this process has no identity.*managed") as error:
        AdlsStorage(f"abfss://c@{DFS}/folder").exists("a")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("vault", ["our-vault", VAULT])
def test_a_key_of_a_vault_opens_a_storage(azure, dfs, vault):
    azure.secrets["storage-key"] = KEY
    options = StorageOptions(dfs.endpoint, f"keyvault:{vault}/storage-key")
    storage = AdlsStorage(f"abfss://{dfs.make_container()}@{DFS}/folder", options)
    storage.write("a", b"1")
    assert storage.read("a") == b"1"
    assert azure.asked == ["https://vault.azure.net"]


def test_a_secret_that_the_vault_has_not_is_one_line(azure):
    with pytest.raises(StorageError, match="keyvault:our-vault/absent.*SecretNotFound.*identity") as error:
        resolve("keyvault:our-vault/absent", ACCOUNT)
    assert "\n" not in str(error.value) and "TOKEN" not in str(error.value)
