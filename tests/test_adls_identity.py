"""Entra ID and Key Vault, spoken to over TLS under Azure's own host names; only what those names resolve to is ours."""

import datetime as dt
import ipaddress
import json
import socket
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
from helpers.storage import StorageOptions, client
from helpers.storage.adls import AdlsStorage
from helpers.storage.credentials import resolve

DFS, BLOB = f"{ACCOUNT}.dfs.core.windows.net", f"{ACCOUNT}.blob.core.windows.net"
VAULT = "our-vault.vault.azure.net"
HEADER = "PLANTEDHEADER"


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> tuple[ssl.SSLContext, Path]:
    """A server's context, and the file that makes clients trust it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")]), dt.datetime.now(dt.UTC)
    names = [x509.DNSName(host) for host in (DFS, BLOB, VAULT)] + [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context, folder / "certificate.pem"


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
def azure(dfs, tls, monkeypatch) -> Iterator[Azure]:
    context, trusted = tls
    azure = Azure(DfsFacade(dfs.upstream, context))
    identity, vault = serve(azure.token), serve(azure.secret, context)
    ports = {
        DFS: azure.storage.server_address[1],
        BLOB: azure.storage.server_address[1],
        VAULT: vault.server_address[1],
    }
    resolve_name = socket.getaddrinfo

    def ours(host, port, *arguments, **options):
        return resolve_name("127.0.0.1" if host in ports else host, ports.get(host, port), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", ours)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(trusted))
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"http://127.0.0.1:{identity.server_address[1]}/token")
    monkeypatch.setenv("IDENTITY_HEADER", HEADER)
    client.forget_clients()
    yield azure
    client.forget_clients()
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
    uri, options = AdlsStorage(f"abfss://photos@{DFS}/a folder").delta_table("results")
    assert uri == "az://photos/a%20folder/results" and options["endpoint"] == f"https://{BLOB}"
    assert options["bearer_token"] in azure.storage.tokens


def test_an_identity_without_access_is_told_without_its_token(azure):
    storage = AdlsStorage(f"abfss://{azure.storage.make_container()}@{DFS}/folder")
    storage.write("a", b"1")
    azure.storage.tokens.clear()
    with pytest.raises(StorageError, match="the credential default was refused") as error:
        storage.read("a")
    assert "TOKEN" not in str(error.value)


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
