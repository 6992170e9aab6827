"""ADLS Gen2 alone, against a real server: the SDK's traps, a bad network, credentials, secrets, long listings.

What it has in common with local storage is in `test_storage.py`.

How it was checked that tests fail without their protection: in a copy of the repository, one change at a time.

    changed                                                    failed
    adls.py: `_move` gives up where the source is gone         any one request: writes and rename, dropped afterwards
    adls.py: the rename's source is not quoted                 percent signs
    adls.py: `_put` writes under the final name                a reader never sees a part
    objects.py: a refused credential is an OSError             forbidden and refused, expired token, wrong key
    adls.py, objects.py: nothing is repeated                   any one request: list, and read
    adls.py: urllib3's log is not filtered                     planted secret
    adls.py: one client for ever                               expired token
    redaction.py: `redact` without names, or without secrets  redacting, wrong address

One is double: the SDK's own errors do not show the planted token either, whether `_explain` redacts them or not.
"""

import datetime as dt
import errno
import functools
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs

import pytest
from azure.storage.filedatalake import FileSystemSasPermissions, generate_file_system_sas
from dfs_facade import ACCOUNT, BUSY, CUT, DROP, DROP_AFTERWARDS, EXPIRE, KEY, Refusal, Request
from pyspark import cloudpickle

from helpers import redaction
from helpers.config import load_config
from helpers.errors import ConfigError, StorageError
from helpers.images import boundary
from helpers.pipeline import reading
from helpers.storage import StorageOptions, adls, credentials, objects, open_storage, prefetch
from helpers.storage.adls import AdlsStorage
from helpers.storage.credentials import resolve
from helpers.storage.prefetch import chain_ahead, map_groups
from studies.cluster import wait_for

ALL = FileSystemSasPermissions(read=True, write=True, create=True, add=True, delete=True, list=True)


@pytest.fixture
def storage(adls_root, adls_settings) -> AdlsStorage:
    return open_storage(adls_root, load_config("local", **adls_settings))


@pytest.fixture
def hasty(monkeypatch):
    """Repeat what fails at once, so that failures take no time."""
    monkeypatch.setitem(adls.RETRY, "increment_base", 0)
    monkeypatch.setitem(adls.RETRY, "random_jitter_range", 0)
    monkeypatch.setitem(objects.BACKOFF, "init_backoff", dt.timedelta(milliseconds=1))
    monkeypatch.setitem(objects.BACKOFF, "max_backoff", dt.timedelta(milliseconds=2))
    adls.forget_clients()
    yield
    adls.forget_clients()


def sas(container: str, seconds: float = 3600) -> str:
    expiry = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
    return generate_file_system_sas(ACCOUNT, container, KEY, permission=ALL, expiry=expiry)


@pytest.fixture
def by_sas(storage, dfs, monkeypatch) -> Callable[..., AdlsStorage]:
    """Open the storage with a SAS token."""

    def open_it(**options) -> AdlsStorage:
        monkeypatch.setenv("ADLS_SAS", sas(storage._container, **options))
        return AdlsStorage(storage.root, StorageOptions(dfs.endpoint, "env:ADLS_SAS"))

    return open_it


# ---------------------------------------------------------------- the SDK's traps


def test_an_empty_file_is_written(storage):
    storage.write("empty", b"")
    with storage.create("empty too"):
        pass
    assert sorted(entry.length for entry in storage.list()) == [0, 0]
    assert storage.read("empty") == storage.read("empty too") == b""


def test_a_reader_never_sees_a_part_at_any_request_of_a_write(storage, dfs):
    old, new = b"o" * 1000, b"n" * 3000
    storage.write("a", old)
    seen: list[bytes] = []

    def look(request: Request) -> None:
        if not request.is_read:
            seen.append(storage.read("a"))

    with dfs.disturb(look):
        storage.write("a", new)
    assert storage.read("a") == new
    assert len(seen) >= 4 and set(seen) == {old}


@pytest.mark.parametrize("name", ["100%25 #1?", "%41", "a%2Fb", "+ &=;"])
def test_names_with_percent_signs_survive_renaming(storage, name):
    storage.write(f"{name}/{name}", b"1")
    storage.rename(f"{name}/{name}", f"{name}/new/{name}")
    assert [entry.path for entry in storage.list()] == [storage.join(name, "new", name)]
    assert storage.read(storage.join(name, "new", name)) == b"1"


def test_names_are_renamed_with_a_sas_token_too(by_sas):
    storage = by_sas()
    storage.write("a", b"1")
    storage.rename("a", "b/c")
    assert storage.read("b/c") == b"1" and not storage.exists("a")


def test_a_storage_that_was_used_pickles_without_its_credential(storage):
    storage.write("a", b"1")
    _, options = storage.delta_table("results")
    assert options["account_key"] == KEY
    for pickled in (pickle.dumps(storage), cloudpickle.dumps(lambda: storage)):
        assert KEY.encode() not in pickled
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


def test_a_large_file_is_read_in_one_request_and_written_in_chunks(storage, dfs, monkeypatch):
    monkeypatch.setattr(adls, "CHUNK_BYTES", 70_000)
    content = os.urandom(1_000_001)
    dfs.requests.clear()
    storage.write("large", content)
    assert sum(request.query.get("action") == "append" for request in dfs.requests) == 15
    assert storage.read("large") == content
    assert sum(request.is_read for request in dfs.requests) == 1


@pytest.mark.parametrize("name", ["two\nlines.png", "tab\there.png"])
def test_names_with_control_characters_are_read_by_the_sdk_up_to_a_limit(storage, name):
    storage.write(name, b"12")
    assert storage.read(name, 2) == b"12"
    with pytest.raises(OSError, match="too large"):
        storage.read(name, 1)
    with pytest.raises(OSError, match="control characters"):
        storage.open(name)


def test_deleting_a_folder_takes_all_that_is_below(storage):
    for i in range(30):
        storage.write(f"folder/{i % 3}/{i}", b"1")
    storage.write("folder too", b"1")
    storage.delete("folder")
    assert [entry.path for entry in storage.list(directories=True)] == [storage.join("folder too")]


# ---------------------------------------------------------------- a bad network


ACTIONS: dict[str, Callable[[AdlsStorage], object]] = {
    "write": lambda storage: storage.write("a", b"new"),
    "write a new one": lambda storage: storage.write("new/b", b"new"),
    "rename": lambda storage: storage.rename("a", "new/b"),
    "delete": lambda storage: storage.delete("folder"),
    "read": lambda storage: storage.read("a"),
    "list": lambda storage: sorted(entry.path for entry in storage.list()),
    "exists": lambda storage: [storage.exists(path) for path in ("", "a", "folder", "absent")],
    "prune": lambda storage: [storage.prune(path) for path in ("empty", "folder")],
}


def fill(storage: AdlsStorage) -> None:
    for path in ("a", "folder/b", "folder/c"):
        storage.write(path, b"old")
    storage.write("empty/d", b"old")
    storage.delete("empty/d")


def contents(storage: AdlsStorage) -> dict[str, bytes]:
    return {entry.path.removeprefix(storage.root): storage.read(entry.path) for entry in storage.list()}


@pytest.mark.parametrize("effect", [DROP, DROP_AFTERWARDS, BUSY], ids=["dropped", "dropped afterwards", "busy"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_disturbance_of_any_one_request_changes_nothing(dfs, adls_settings, hasty, action, effect):
    """Each request fails once, and afterwards all is as if it had not."""
    config = load_config("local", **adls_settings)

    def perform(disturbed: int | None = None) -> tuple:
        storage = open_storage(f"abfss://{dfs.make_container()}@{ACCOUNT}.dfs.core.windows.net/f", config)
        fill(storage)
        requests: list[bool] = []
        with dfs.disturb(lambda request: requests.append(True) or (effect if len(requests) - 1 == disturbed else None)):
            answer = ACTIONS[action](storage)
        answer = [path.removeprefix(storage.root) for path in answer] if action == "list" else answer
        return len(requests), answer, contents(storage)

    count, *expected = perform()
    assert count >= 1
    for disturbed in range(count):
        repeated, *found = perform(disturbed)
        assert found == expected, f"request {disturbed} of {count}"
        assert repeated > count


def test_an_answer_that_breaks_off_is_read_again(storage, dfs, hasty):
    content = os.urandom(200_000)
    storage.write("a", content)
    reads = iter([CUT, CUT])
    with dfs.disturb(lambda request: next(reads, None) if request.is_read else None):
        assert storage.read("a") == content
    assert next(reads, None) is None


@pytest.mark.parametrize("effect", [DROP, BUSY, CUT], ids=["dropped", "busy", "cut"])
def test_what_does_not_get_better_is_one_clear_error_and_no_missing_file(storage, dfs, hasty, effect):
    storage.write("a", b"12")
    for action in (ACTIONS["read"], ACTIONS["list"], ACTIONS["write"])[: 2 if effect == CUT else 3]:
        with dfs.disturb(lambda request: effect), pytest.raises(StorageError) as error:
            action(storage)
        message = str(error.value)
        assert storage.root in message and "run again" in message and "\n" not in message
    assert storage.read("a") == b"12"
    assert len(list(storage.list())) <= 2  # a temporary file may be left


def test_retries_wait_longer_and_longer_but_not_for_ever():
    policy = adls.ExponentialRetry(**adls.RETRY)
    least = [max(0, 2**count - 1) for count in range(1, objects.TRIES + 1)]
    waits = [policy.get_backoff_time({"count": count}) for count in range(1, objects.TRIES + 1)]
    assert all(low <= wait <= low + 2 for low, wait in zip(least, waits, strict=True))
    assert 30 < sum(waits) < 120
    retries = policy.total_retries, policy.connect_retries, policy.read_retries, policy.status_retries
    assert retries == (objects.TRIES,) * 4


# ---------------------------------------------------------------- what is refused


def test_a_container_that_is_not_there_is_named(dfs, adls_settings):
    storage = open_storage(f"abfss://absent@{ACCOUNT}.dfs.core.windows.net/x", load_config("local", **adls_settings))
    for action in (
        lambda: list(storage.list()),
        lambda: storage.write("a", b""),
        lambda: storage.prune("a"),
    ):
        with pytest.raises(StorageError, match=r"absent@.* no such container"):
            action()


def test_an_account_that_does_not_exist_is_told_without_a_single_try(monkeypatch):
    """No name server is at hand here, so its answers are played."""
    answer = socket.EAI_NONAME
    asked: list[str] = []

    def resolve_name(host: str, *_: object) -> list:
        asked.append(host)
        raise socket.gaierror(answer, "what the system says")

    monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
    monkeypatch.setenv("ADLS_KEY", KEY)
    monkeypatch.setattr(objects, "getproxies", dict)
    nobody = AdlsStorage("abfss://photos@nobody.dfs.core.windows.net/a", StorageOptions(None, "env:ADLS_KEY"))
    with pytest.raises(StorageError, match=r"^nobody\.dfs\.core\.windows\.net: there is no such host"):
        nobody.exists("b")
    assert asked == ["nobody.dfs.core.windows.net"]
    monkeypatch.setattr(objects, "getproxies", lambda: {"https": "http://proxy"})
    assert nobody._files.file_system_name == "photos"
    answer = socket.EAI_AGAIN
    adls.forget_clients()
    monkeypatch.setattr(objects, "getproxies", dict)
    assert nobody._files.file_system_name == "photos"
    adls.forget_clients()


def test_a_file_that_its_access_rights_forbid_is_an_error_row_and_a_refused_credential_is_not(storage, dfs):
    storage.write("a.png", b"1")
    forbidden = Refusal(403, "AuthorizationPermissionMismatch").answer
    with dfs.disturb(lambda request: forbidden if request.is_read else None):
        with pytest.raises(PermissionError):
            storage.read("a.png")
        assert reading._read(storage, reading.File("a.png", None, 100, None)) == (
            None,
            boundary.READ_ERRORS[errno.EACCES],
        )
    with dfs.disturb(lambda request: forbidden), pytest.raises(StorageError, match="refused"):
        list(storage.list())
    refused = Refusal(403, "AuthenticationFailed").answer
    with dfs.disturb(lambda request: refused), pytest.raises(StorageError, match="refused.*run again"):
        reading._read(storage, reading.File("a.png", None, 100, None))


def test_a_sas_token_that_has_expired_is_told_and_a_new_one_taken(by_sas, dfs, monkeypatch):
    storage = by_sas(seconds=2)
    storage.write("a", b"1")

    def refused() -> bool:
        try:
            return storage.read("a") == b"0"
        except StorageError as error:
            assert "env:ADLS_SAS" in str(error) and "expired" in str(error) and "sig" not in str(error)
            return True

    wait_for("the expiry", refused, patience=20)
    monkeypatch.setenv("ADLS_SAS", sas(storage._container))
    assert storage.read("a") == b"1"


@pytest.mark.parametrize(
    "uri",
    [
        "abfss://account.dfs.core.windows.net/path",
        "abfss:/container/path",
        "abfss://c@a.dfs.core.windows.net?sv=1&sig=PLANTEDSECRET",
        "abfss://c@a.dfs.core.windows.net/x?sv=1&sig=PLANTEDSECRET",
        "https://a.blob.core.windows.net/c?sig=PLANTEDSECRET",
    ],
)
def test_a_wrong_address_is_shown_with_the_right_form_and_without_a_token(uri):
    with pytest.raises(StorageError) as error:
        open_storage(uri)
    assert "abfss://" in str(error.value) and "PLANTEDSECRET" not in str(error.value)


def test_a_sas_token_in_the_endpoint_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match=r"storage") as error:
        load_config("local", **{"storage.endpoint": "https://a/?sig=PLANTEDSECRET"})
    assert "PLANTEDSECRET" not in str(error.value)


@pytest.mark.parametrize("path", ["", "/", "x/..", "/x/../"])
def test_a_whole_container_is_a_location(dfs, adls_settings, path):
    container = f"abfss://{dfs.make_container()}@{ACCOUNT}.dfs.core.windows.net"
    storage = open_storage(container + ("/" if path else "") + path, load_config("local", **adls_settings))
    assert storage.root == container and storage.exists("")
    storage.write("a/b", b"1")
    assert [entry.path for entry in storage.list()] == [f"{container}/a/b"]


@pytest.mark.parametrize("form", ["photos/", "x/../photos", "./photos", "/photos"])
def test_one_folder_has_one_root_however_it_is_spelt(form):
    assert open_storage(f"abfss://c@a.dfs.core.windows.net/{form}").root == "abfss://c@a.dfs.core.windows.net/photos"


def test_a_path_of_another_container_is_refused(storage):
    with pytest.raises(StorageError, match="is not in"):
        storage.read(f"abfss://other@{ACCOUNT}.dfs.core.windows.net/a")


def test_modification_times_are_the_servers_in_utc(storage):
    before = dt.datetime.now(dt.UTC).replace(microsecond=0)
    storage.write("a", b"1")
    (listed,), (single,) = (
        storage.list(),
        open_storage(storage.join("a"), types.SimpleNamespace(storage=storage.options)).list(),
    )
    assert listed == single and before <= listed.modified <= dt.datetime.now(dt.UTC)


# ---------------------------------------------------------------- long listings


LISTING = """
import resource, sys
from helpers.config import load_config
from helpers.pipeline import listing as ingest
from helpers.pipeline.listing import list_images
from helpers.storage import open_storage
ingest.ROWS_PER_CHUNK = 5000
config = load_config("local", **{"storage.endpoint": sys.argv[1], "storage.credential": "env:ADLS_KEY"})
storage = open_storage("abfss://" + sys.argv[2] + "@devstoreaccount1.dfs.core.windows.net", config)
next(storage.list())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = list_images(storage, config).images
print(images.num_rows, images.nbytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_long_listing_of_one_folder_is_one_pass_of_pages_in_the_memory_of_its_manifest(dfs, adls_settings):
    files, held = 60_000, {}
    for count in (15_000, files):
        dfs.synthetic[f"synthetic{count}"] = count
        dfs.requests.clear()
        command = [sys.executable, "-c", LISTING, dfs.endpoint, f"synthetic{count}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        listed, table, peak = map(int, answer.split())
        assert listed == count
        pages = [request.query.get("continuation") for request in dfs.requests if request.query["recursive"] == "true"]
        del pages[0]  # was for the look before
        assert len(pages) == len(set(pages)) == count / adls.PAGE
        held[count] = peak - table
    # Beyond the table there are a page and the rows of a chunk that is not full, however long the listing is.
    assert held[files] < held[15_000] + 10 * 2**20, held


# ---------------------------------------------------------------- hosts

STRANGERS = [
    "attacker.example",
    "dfs.core.windows.net",
    "acct.dfs.core.windows.net.attacker.example",
    "127.0.0.1:10000",
]
STRANGERS += [
    "attacker.example:443",
    "acct.dfs.core.windows.net:443",
    "acct.dfs.core.windows.net.",
    "dfs.core.windows.net.evil",
]
STRANGERS += ["attacker.example\\.dfs.core.windows.net", "a cct.dfs.core.windows.net", "аcct.dfs.core.windows.net"]
STRANGERS += ["xdfs.core.windows.net", "acct.dfs.core.windows.net\nx", "[::1]", "acct.dfs.core.windowsxnet"]


@pytest.mark.parametrize("host", STRANGERS)
def test_a_credential_goes_to_no_host_that_only_a_location_names(host, monkeypatch):
    monkeypatch.setenv("ADLS_SAS", "sv=1&sig=PLANTED")
    monkeypatch.setattr(adls, "_open", lambda *arguments: pytest.fail(f"a client for {arguments}"))
    for credential in ("default", "env:ADLS_SAS"):
        with pytest.raises(StorageError, match=r"no host of Azure.*storage\.endpoint") as error:
            open_storage(f"abfss://c@{host}/p", load_config("local", **{"storage.credential": credential})).exists("a")
        assert "PLANTED" not in str(error.value)


AZURES = ["acct.dfs.core.windows.net", "ACCT.dfs.core.Windows.net", "a.privatelink.dfs.core.windows.net"]
AZURES += ["acct.dfs.core.usgovcloudapi.net", "acct.dfs.core.chinacloudapi.cn", "acct.z12.dfs.storage.azure.net"]


@pytest.mark.parametrize("host", AZURES)
def test_the_hosts_of_azures_clouds_get_it(host):
    assert AdlsStorage(f"abfss://c@{host}/p").root == f"abfss://c@{host}/p"


def test_another_host_is_for_storage_endpoint_to_name(monkeypatch):
    asked = []
    monkeypatch.setattr(adls, "_open", lambda address, *_: asked.append(address) or pytest.raises(ValueError))
    storage = AdlsStorage("abfss://c@acct.attacker.example/p", StorageOptions("https://ours.example"))
    assert pickle.loads(pickle.dumps(storage)).root == storage.root
    assert storage._files and asked == ["https://ours.example"]


# ---------------------------------------------------------------- credentials


def test_a_key_of_the_environment_may_have_a_newline_at_its_end(storage, monkeypatch):
    monkeypatch.setenv("ADLS_KEY", f"{KEY}\n")
    storage.write("a", b"1")


@pytest.mark.parametrize("value", ["", "  "])
def test_a_variable_that_is_not_set_is_named(storage, monkeypatch, value):
    monkeypatch.setenv("ADLS_KEY", value)
    with pytest.raises(StorageError, match="env:ADLS_KEY.*export ADLS_KEY"):
        storage.exists("a")


CONNECTION_STRING = "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=PLANTEDSECRET==;EndpointSuffix=core"


@pytest.mark.parametrize("value", [CONNECTION_STRING, "PLANTEDSECRET", "PLANTEDSECRET grün"])
def test_what_is_neither_key_nor_token_is_told_and_not_shown(storage, monkeypatch, value):
    monkeypatch.setenv("ADLS_KEY", value)
    with pytest.raises(StorageError, match="env:ADLS_KEY.*neither") as error:
        storage.exists("a")
    assert "PLANTEDSECRET" not in "".join(traceback.format_exception(error.value))


def test_a_wrong_key_is_told_and_not_shown(storage, monkeypatch):
    wrong = "AAAA" + KEY[4:]
    monkeypatch.setenv("ADLS_KEY", wrong)
    for action in (lambda: storage.exists("a"), lambda: storage.write("a", b""), lambda: list(storage.list())):
        with pytest.raises(StorageError, match="env:ADLS_KEY was refused") as error:
            action()
        assert wrong[4:] not in "".join(traceback.format_exception(error.value))


class Secrets:
    """What Databricks' dbutils has for secrets."""

    def __init__(self, known: dict[tuple[str, str], str]):
        self.known = known

    def get(self, scope: str, key: str) -> str:
        if (scope, key) not in self.known:
            raise RuntimeError(f"Secret does not exist with scope: {scope} and key: {key}\n\tat com.databricks.X")
        return self.known[scope, key]


@pytest.fixture
def databricks(monkeypatch) -> None:
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "17.3")
    runtime = types.ModuleType("databricks.sdk.runtime")
    runtime.dbutils = types.SimpleNamespace(secrets=Secrets({("storage", "the/key"): KEY}))
    monkeypatch.setitem(sys.modules, "databricks.sdk.runtime", runtime)
    monkeypatch.setitem(sys.modules, "databricks.sdk", types.ModuleType("databricks.sdk"))
    monkeypatch.setitem(sys.modules, "databricks", types.ModuleType("databricks"))
    adls.forget_clients()


def test_a_databricks_secret_opens_a_storage(storage, databricks):
    options = StorageOptions(storage.options.endpoint, "secret:storage/the/key")
    AdlsStorage(storage.root, options).write("a", b"1")
    assert storage.read("a") == b"1"


@pytest.mark.parametrize("refused, following", [("list", "read"), ("read", "list")])
def test_a_secret_is_looked_up_anew_by_both_clients_when_one_is_refused(storage, dfs, databricks, refused, following):
    rotated = open_storage(
        storage.root, types.SimpleNamespace(storage=StorageOptions(dfs.endpoint, "secret:storage/the/key"))
    )
    fill(rotated)
    assert ACTIONS["read"](rotated) == b"old"
    sys.modules["databricks.sdk.runtime"].dbutils.secrets.known["storage", "the/key"] = f"AAAA{KEY[4:]}"
    assert ACTIONS[following](rotated)  # until a request is refused, nobody asks
    answer = Refusal(403, "AuthenticationFailed").answer
    with dfs.disturb(lambda request: answer), pytest.raises(StorageError, match="was refused"):
        ACTIONS[refused](rotated)
    with pytest.raises(StorageError, match="was refused"):
        ACTIONS[following](rotated)


def test_a_databricks_secret_that_is_not_there_is_one_line(databricks):
    with pytest.raises(StorageError, match="secret:storage/other.*does not exist.*permission") as error:
        resolve("secret:storage/other", ACCOUNT)
    assert "\n" not in str(error.value)


def test_elsewhere_a_databricks_secret_is_refused_with_what_works():
    with pytest.raises(StorageError, match="only Databricks.*env:NAME"):
        resolve("secret:scope/key", ACCOUNT)


def test_in_a_task_the_errors_say_what_a_worker_needs(databricks, monkeypatch):
    monkeypatch.setattr(credentials, "_in_task", lambda: True)
    with pytest.raises(StorageError, match="driver only.*{{secrets/storage/other}}.*env:NAME"):
        resolve("secret:storage/other", ACCOUNT)
    with pytest.raises(StorageError, match="environment this task runs in.*every Spark worker"):
        resolve("env:NOT_THERE", ACCOUNT)


# ---------------------------------------------------------------- secrets are not shown


def test_a_planted_secret_is_in_no_error_log_or_pickle(by_sas, dfs, hasty, caplog):
    storage = by_sas()
    secret = parse_qs(os.environ["ADLS_SAS"])["sig"][0]
    forms = [secret, *(form for form in redaction._resolved if secret[:8] in form), os.environ["ADLS_SAS"]]
    texts: list[str] = []

    def note_errors(of: AdlsStorage) -> None:
        for action in ACTIONS.values():
            try:
                action(of)
            except Exception as error:  # noqa: BLE001 - whatever it is must not show the secret
                texts.append("".join(traceback.format_exception(error)) + repr(error))

    with caplog.at_level(logging.DEBUG):
        fill(storage)
        for effect in (DROP, CUT, BUSY, EXPIRE):
            with dfs.disturb(lambda request, effect=effect: effect):
                note_errors(storage)
        nobody = AdlsStorage(storage.root, StorageOptions("http://127.0.0.1:9/x", "env:ADLS_SAS"))
        note_errors(nobody)
    assert len(texts) >= 30
    texts += [repr(storage), repr(storage.options), str(vars(storage)), cloudpickle.dumps(storage).decode("latin-1")]
    assert len(caplog.text) > 10_000 and "/a%20folder" in caplog.text
    for text in (*texts, caplog.text):
        assert not [form for form in forms if form in text], text[:2000]


def test_redacting_hides_tokens_and_known_secrets_in_every_form(monkeypatch):
    monkeypatch.setattr(redaction, "_resolved", set())
    redaction.remember("?sv=1&sig=abc%2Bdef%3D%3D&se=x")
    hidden = redaction.redact("sig=abc%2Bdef%3D%3D&x abc+def== abc%2Bdef%3D%3D https://h/c?sig=other&y='z'")
    assert "abc" not in hidden and "other" not in hidden and "y='z'" in hidden


def test_folders_are_listed_at_once_where_there_is_more_than_a_page(storage, dfs, monkeypatch):
    for path in ("a/1", "a/deep/2", "a-b/3", "a0", "b/4", "c"):
        storage.write(f"only/{path}", b"")
    in_one_pass = list(storage.list("only", directories=True))
    monkeypatch.setattr(adls, "PAGE", 6)
    both = threading.Barrier(2)

    def meet(request: Request) -> None:
        if request.query.get("directory", "").endswith(("only/a", "only/b")):
            both.wait(30)

    with dfs.disturb(meet):
        at_once = list(storage.list(directories=True, skip=[storage.join("only/a-b")]))
    names = [entry.path.removeprefix(f"{storage.root}/only").lstrip("/") for entry in at_once]
    assert names == ["", "a", "a/1", "a/deep", "a/deep/2", "a0", "b", "b/4", "c"]
    left_out = [entry for entry in in_one_pass if "a-b" in entry.path]
    assert len(left_out) == 2
    assert {(e.path, e.length, e.modified, e.is_directory) for e in [*at_once[1:], *left_out]} == {
        (e.path, e.length, e.modified, e.is_directory) for e in in_one_pass
    }


@pytest.mark.parametrize("most", [(objects, "MOST_FOLDERS", 2), (adls, "PAGE", 3)])
def test_a_level_of_many_folders_or_files_is_listed_in_one_pass(storage, dfs, monkeypatch, most):
    paths = ["a/1", "b/2", "c/3", "d", "e"]
    for path in paths:
        storage.write(path, b"")
    monkeypatch.setattr(adls, "PAGE", 4)
    monkeypatch.setattr(*most)
    assert sorted(entry.path for entry in storage.list()) == [storage.join(path) for path in paths]
    recursive = [request for request in dfs.requests if request.query.get("recursive") == "true"]
    assert {request.query.get("directory", "") for request in recursive[-2:]} == {storage.root.rpartition("/")[2]}


# ---------------------------------------------------------------- reading ahead


def test_groups_come_in_order_and_one_is_read_ahead():
    started: list[int] = []
    release = threading.Event()

    def work(item: int) -> int:
        started.append(item)
        assert item < 4 or release.wait(30)
        return item * 10

    groups = map_groups(work, ([i, i + 1] for i in range(0, 8, 2)), threads=2)
    assert next(groups) == [0, 10]
    wait_for("the next group", lambda: sorted(started) == [0, 1, 2, 3])
    release.set()
    assert list(groups) == [[20, 30], [40, 50], [60, 70]]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_exception_comes_with_its_group_and_ends_the_rest(threads):
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return 10 // (3 - item)

    groups = map_groups(work, ([item] for item in range(100)), threads)
    with pytest.raises(ZeroDivisionError):
        for expected in (3, 5, 10, None):
            assert next(groups) == [expected]
    assert max(done) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_streams_come_one_after_the_other_while_the_next_are_gone_through():
    taken: list[int] = []
    first_waits = threading.Event()

    def stream(number: int) -> Iterator[tuple[int, int]]:
        for item in range(3):
            assert number or first_waits.wait(30)
            taken.append(number)
            yield number, item

    items = chain_ahead((functools.partial(stream, number) for number in range(20)), threads=3)
    release = threading.Thread(target=lambda: (wait_for("others", lambda: len(taken) == 6), first_waits.set()))
    release.start()
    assert list(items) == [(number, item) for number in range(20) for item in range(3)]
    release.join()
    assert taken[:6].count(1) == taken[:6].count(2) == 3


def test_a_streams_exception_comes_in_its_turn():
    def stream(number: int) -> Iterator[int]:
        yield number
        assert number < 2, "the third"

    items = chain_ahead([functools.partial(stream, number) for number in range(9)], threads=4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(AssertionError, match="the third"):
        next(items)


def test_streams_that_nobody_goes_on_with_end(monkeypatch):
    monkeypatch.setattr(prefetch, "LOOK_SECONDS", 0.01)
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(0)
            yield 0

    items = chain_ahead([endless] * 9, threads=3)
    assert next(items) == 0
    most = 3 * (prefetch.BATCHES_AHEAD + 2) * prefetch.BATCH
    wait_for("full queues", lambda: len(taken) >= 3 * prefetch.BATCHES_AHEAD * prefetch.BATCH)
    items.close()
    assert len(taken) <= most
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chain")]
