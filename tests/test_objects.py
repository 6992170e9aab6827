"""Object stores alone and in a run, against real servers: ranges, odd names, a bad network, credentials, secrets.

What they have in common with other storage is in `test_storage.py`.
"""

import datetime as dt
import errno
import io
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import object_stores
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_rows, start_run
from dfs_facade import ACCOUNT, BUSY, CUT, DROP, DROP_AFTERWARDS, KEY, Answer, Request
from object_stores import S3, Gcs
from pyspark import cloudpickle
from test_adls import ACTIONS, contents, fill, sas
from test_adls_pipeline import comparable, files_of

from helpers import pipeline, redaction
from helpers.config import load_config
from helpers.errors import StorageError
from helpers.images import boundary
from helpers.pipeline import readers, reading
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.pipeline.table import NONE, Conflict, File, Table
from helpers.storage import StorageOptions, objects, open_storage
from helpers.storage.adls import AdlsStorage
from helpers.storage.objects import ObjectStorage, object_store_options

EFFECTS = [DROP, DROP_AFTERWARDS, BUSY]


@pytest.fixture
def storage(s3_root, s3_settings) -> ObjectStorage:
    return open_storage(s3_root, load_config("local", **s3_settings))


@pytest.fixture
def hasty(monkeypatch) -> Iterator[None]:
    """Repeat what fails at once, so that failures take no time."""
    for name in ("init_backoff", "max_backoff"):
        monkeypatch.setitem(objects.BACKOFF, name, dt.timedelta(milliseconds=1 + (name == "max_backoff")))
    objects.forget_stores()
    yield
    objects.forget_stores()


def put(s3: S3, storage: ObjectStorage, *keys: str) -> None:
    """Objects whose names obstore would not take."""
    for key in keys:
        s3.client.put_object(Bucket=storage.root.split("/")[2], Key=f"a folder/{key}", Body=b"1")


def refusal(status: int, code: str) -> Answer:
    return Answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


# ---------------------------------------------------------------- reading and writing


def ranges(requests: list[Request]) -> list[int]:
    """Bytes of each range that was asked for."""
    asked = [request.headers["range"].removeprefix("bytes=").split("-") for request in requests if request.is_get]
    return [int(end) - int(start) + 1 for start, end in asked]


@pytest.fixture
def fetched(s3, monkeypatch) -> Callable[[], list[int]]:
    monkeypatch.setattr(Request, "is_get", property(lambda self: "range" in self.headers), raising=False)
    s3.relay.requests.clear()
    return lambda: ranges(s3.relay.requests)


def test_a_file_that_is_read_on_comes_in_larger_and_larger_ranges(storage, fetched, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_BYTES", 1000)
    monkeypatch.setattr(objects, "MOST_BYTES", 16_000)
    content = os.urandom(100_000)
    storage.write("a", content)
    with storage.open("a") as file:
        assert b"".join(iter(lambda: file.read(700), b"")) == content
    sizes = fetched()
    assert max(sizes) <= 16_000 and sum(sizes) == len(content) and len(sizes) <= 12


def test_a_jump_in_a_file_fetches_little(storage, fetched, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_BYTES", 1000)
    content = os.urandom(2_000_000)
    storage.write("a", content)
    with storage.open("a") as file:
        for position in (1_999_990, 5, 1_000_000, 70, 1_500_000):
            file.seek(position)
            assert file.read(10) == content[position : position + 10]
    assert len(fetched()) <= 6 and sum(fetched()) < 500_000


def test_small_jumps_forwards_fetch_as_reading_on_does(storage, fetched, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_BYTES", 1000)
    monkeypatch.setattr(objects, "MOST_BYTES", 16_000)
    content = os.urandom(100_000)
    storage.write("a", content)
    with storage.open("a") as file:
        for position in range(0, len(content), 900):
            assert file.seek(position) == position and file.read(10) == content[position : position + 10]
    assert len(fetched()) <= 12


def test_a_file_that_is_opened_reads_as_one_on_a_disk(storage, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_BYTES", 1000)
    content = os.urandom(100_000)
    storage.write("a", content)
    with storage.open("a") as file:
        plain = io.BytesIO(content)
        for offset, whence in [(0, 0), (50_000, 0), (-10, 1), (30_000, 1), (-7, 2), (0, 2), (200_000, 0), (3, 0)]:
            assert file.seek(offset, whence) == plain.seek(offset, whence) == file.tell()
            assert file.read(9_000) == plain.read(9_000)
        assert file.read() == plain.read()
        with pytest.raises(OSError, match="Invalid argument"):
            file.seek(-1)


def test_a_file_that_changes_while_it_is_read_is_an_error_of_its_own(storage):
    content = os.urandom(objects.FIRST_BYTES * 2)
    storage.write("a", content)
    with storage.open("a") as file:
        storage.write("a", content[::-1])
        with pytest.raises(OSError, match="changed while it was read") as error:
            file.read()
    assert error.value.errno == errno.ESTALE


def test_an_empty_file_opens(storage):
    storage.write("a", b"")
    with storage.open("a") as file:
        assert file.read() == b""


def test_a_long_file_is_written_in_parts_and_seen_when_all_are_there(storage, s3):
    content = os.urandom(objects.CHUNK_BYTES * 2 + 5)
    storage.write("a", b"old")
    seen = []
    s3.relay.requests.clear()

    def look(request: Request) -> None:
        if request.method in ("PUT", "POST"):
            seen.append(storage.read("a"))

    with s3.relay.disturb(look), storage.create("a") as file:
        file.write(content)
    assert storage.read("a") == content
    assert len(seen) >= 5 and set(seen) == {b"old"}


@pytest.mark.parametrize("inside", ["", "one/"])
def test_folders_are_listed_at_once_where_there_is_more_than_a_page(storage, s3, monkeypatch, inside):
    for path in ("a/1", "a/deep/2", "a-b/3", "a0", "b/4", "c/5"):
        storage.write(f"{inside}{path}", b"")
    s3.client.put_object(Bucket=storage.root.split("/")[2], Key=f"a folder/{inside}a/")
    in_one_pass = list(storage.list(directories=True))
    monkeypatch.setattr(objects, "PAGE", 5)
    both = threading.Barrier(2)

    def meet(request: Request) -> None:
        if "delimiter" not in request.query and request.query.get("prefix", "").endswith(("a/", "c/")):
            both.wait(30)

    with s3.relay.disturb(meet):
        assert list(storage.list(directories=True)) == in_one_pass
    assert len(in_one_pass) == 11 + bool(inside)


def test_a_level_of_many_folders_is_listed_in_one_pass(storage, s3, monkeypatch):
    paths = ["a/1", "b/2", "c/3"]
    for path in paths:
        storage.write(path, b"")
    monkeypatch.setattr(objects, "PAGE", 3)
    monkeypatch.setattr(objects, "MOST_FOLDERS", 2)
    s3.relay.requests.clear()
    assert [entry.path for entry in storage.list()] == [storage.join(path) for path in paths]
    assert len(s3.relay.requests) == 2  # all, and the level


def test_a_listing_of_less_than_a_page_is_one_request(storage, s3):
    storage.write("a/1", b"")
    s3.relay.requests.clear()
    assert len(list(storage.list())) == 1 == len(s3.relay.requests)


# ---------------------------------------------------------------- names


def test_objects_that_stand_for_a_folder_are_no_files(storage, s3):
    put(s3, storage, "album.jpg/a.png")
    bucket = storage.root.split("/")[2]
    for key in ("a folder/", "a folder/album.jpg/"):
        s3.client.put_object(Bucket=bucket, Key=key)
    assert [(entry.path, entry.is_directory) for entry in storage.list(directories=True)] == [
        (storage.join("album.jpg"), True),
        (storage.join("album.jpg/a.png"), False),
    ]


def test_each_folder_is_listed_once_and_none_of_those_skipped(storage):
    for path in ("b/c/1", "b/c/2", "b/d/1", "b/2", "e/1"):
        storage.write(path, b"")
    listed = list(storage.list(directories=True, skip=[storage.join("b/c")]))
    assert [entry.path.removeprefix(storage.root) for entry in listed if entry.is_directory] == ["/b", "/b/d", "/e"]
    assert [entry.path.removeprefix(storage.root) for entry in listed if not entry.is_directory] == [
        "/b/2",
        "/b/d/1",
        "/e/1",
    ]


def test_a_name_that_cannot_be_used_costs_its_own_folder_only(storage, s3):
    good = ["a.png", "b/b.png", "bad/deeper/c.png", "c/c.png", "d.png", "odd too/deeper/1.png"]
    for path in good:
        storage.write(path, b"1")
    put(s3, storage, "bad//x.png", "bad/y.png", "odd too/../z.png")
    entries = {entry.path.removeprefix(f"{storage.root}/"): entry for entry in storage.list(tolerant=True)}
    wrong = {path for path, entry in entries.items() if entry.error}
    assert wrong == {"bad", "odd too"} and all(entries[path].is_directory for path in wrong)
    assert all("cannot be used" in entries[path].error and "rename" in entries[path].error for path in wrong)
    # Others of the folder are missing, and the error says so.
    assert set(entries) - wrong == {path for path in good if not path.startswith(("bad", "odd"))}
    with pytest.raises(StorageError, match=r"bad//x\.png.*rename"):
        list(storage.list())


def test_a_folder_of_more_than_a_page_is_listed_and_deleted_and_nothing_is_listed_twice(storage, s3):
    """A page has 1,000 names: all of one folder, and some of the next."""
    others = ["a too", *(f"{number:04d}.png" for number in range(100))]
    folder = [f"a/{number:04d}.png" for number in range(objects.PAGE + 50)]
    for path in (*others, *folder):
        storage.write(path, b"")
    everything = sorted(storage.join(path) for path in (*others, *folder))
    assert [entry.path for entry in storage.list()] == everything
    put(s3, storage, "bad//x.png")  # what was listed before such a name is not listed again
    assert sorted(entry.path for entry in storage.list(tolerant=True) if not entry.error) == everything
    storage.delete("a")
    left = sorted(entry.path for entry in storage.list(tolerant=True) if not entry.error)
    assert left == sorted(map(storage.join, others))


def test_a_path_of_another_bucket_is_refused(storage):
    with pytest.raises(StorageError, match="is not in"):
        storage.read("s3://other/a")


@pytest.mark.parametrize("form", ["s3://bucket/photos/", "s3://bucket/x/../photos", "s3://bucket//photos"])
def test_one_folder_has_one_root_however_it_is_spelt(form):
    assert open_storage(form).root == "s3://bucket/photos"


@pytest.mark.parametrize("path", ["", "/"])
def test_a_whole_bucket_is_a_location(s3, s3_settings, path):
    bucket = f"s3://{s3.make_bucket()}"
    storage = open_storage(bucket + path, load_config("local", **s3_settings))
    assert storage.root == bucket and storage.exists("")
    storage.write("a/b", b"1")
    assert [entry.path for entry in storage.list()] == [f"{bucket}/a/b"]


PRESIGNED = "https://b.s3.amazonaws.com/k?X-Amz-Signature=PLANTEDSECRET"
ADDRESSES = ["s3://KEY:PLANTEDSECRET@bucket/p", "gs://user:PLANTEDSECRET@b/p", "https://u:PLANTEDSECRET@host/a.png"]
ADDRESSES += [PRESIGNED, "https://host/a.png?token=PLANTEDSECRET", "s3://bucket/k?X-Amz-Signature=PLANTEDSECRET"]


@pytest.mark.parametrize("uri", [*ADDRESSES, "s3:/bucket/p", "s3://", "https://"])
def test_a_wrong_address_is_shown_with_the_right_form_and_without_a_secret(uri):
    with pytest.raises(StorageError, match="s3://BUCKET/PATH") as error:
        open_storage(uri)
    assert "PLANTEDSECRET" not in str(error.value)


# ---------------------------------------------------------------- a bad network


@pytest.mark.parametrize("effect", EFFECTS, ids=["dropped", "dropped afterwards", "busy"])
@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"prune"}))
def test_a_disturbance_of_any_one_request_changes_nothing(s3, s3_settings, hasty, action, effect):
    config = load_config("local", **s3_settings)

    def perform(disturbed: int | None = None) -> tuple:
        storage = open_storage(f"s3://{s3.make_bucket()}/f", config)
        fill(storage)
        requests: list[bool] = []
        with s3.relay.disturb(
            lambda request: requests.append(True) or (effect if len(requests) - 1 == disturbed else None)
        ):
            answer = ACTIONS[action](storage)
        answer = [path.removeprefix(storage.root) for path in answer] if action == "list" else answer
        return len(requests), answer, contents(storage)

    count, *expected = perform()
    assert count >= 1
    for disturbed in range(count):
        repeated, *found = perform(disturbed)
        assert found == expected and repeated > count, f"request {disturbed} of {count}"


def test_an_answer_that_breaks_off_is_read_again(storage, s3, hasty):
    content = os.urandom(200_000)
    storage.write("a", content)
    effects = iter([CUT, CUT])
    with s3.relay.disturb(lambda request: next(effects, None)):
        assert storage.read("a") == content
    assert next(effects, None) is None


@pytest.mark.parametrize("effect", [DROP, BUSY], ids=["dropped", "busy"])
def test_what_does_not_get_better_is_one_clear_error_after_so_many_tries(storage, s3, hasty, effect):
    storage.write("a", b"12")
    actions = [ACTIONS[name] for name in ("read", "list", "write", "rename", "delete", "exists")]
    for action in (*actions, lambda storage: Table(storage, "results", RESULT_SCHEMA).open()):
        s3.relay.requests.clear()
        with s3.relay.disturb(lambda request: effect), pytest.raises(StorageError) as error:
            action(storage)
        message = str(error.value)
        assert storage.root in message and "run again" in message and "\n" not in message
        assert len(s3.relay.requests) == 1 + objects.TRIES
    assert storage.read("a") == b"12"


def test_a_server_that_never_answers_is_given_up(monkeypatch, hasty):
    monkeypatch.setenv("S3_KEY", "KEYID:PLANTEDSECRET")
    monkeypatch.setattr(objects, "TRIES", 1)
    monkeypatch.setitem(objects.TIMEOUTS, "read_timeout", dt.timedelta(milliseconds=300))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match=r"does not answer.*1 more tries"):
            ObjectStorage("s3://bucket/a", StorageOptions(endpoint, "env:S3_KEY")).read("b")


def test_time_limits_leave_room_for_long_files():
    assert objects.TIMEOUTS["timeout"] >= dt.timedelta(minutes=30) > 10 * objects.TIMEOUTS["read_timeout"]
    assert dt.timedelta(minutes=5) >= objects.RETRY_TIME


# ---------------------------------------------------------------- what is refused


def test_a_bucket_that_is_not_there_is_named(s3, s3_settings):
    storage = open_storage("s3://absent/x", load_config("local", **s3_settings))
    for action in ("read", "list", "write", "delete"):
        with pytest.raises(StorageError, match=r"s3://absent: there is no such container"):
            ACTIONS[action](storage)


def test_a_host_that_does_not_exist_is_told_without_a_single_try(monkeypatch):
    """No name server is at hand here, so its answers are played."""

    def resolve_name(host: str, *_: object) -> list:
        raise socket.gaierror(socket.EAI_NONAME, "what the system says")

    monkeypatch.setenv("S3_KEY", "KEYID:PLANTEDSECRET")
    monkeypatch.setattr(socket, "getaddrinfo", resolve_name)
    monkeypatch.setattr(objects, "getproxies", dict)
    for uri in ("s3://bucket/a", "gs://bucket/a"):
        options = StorageOptions("https://nobody.example", "env:S3_KEY" if uri.startswith("s3") else "default")
        with pytest.raises(StorageError, match=r"^nobody\.example: there is no such host"):
            ObjectStorage(uri, options).exists("b")
    with pytest.raises(StorageError, match=r"^nobody\.example: there is no such host"):
        ObjectStorage("https://nobody.example/a.png").exists("")


@pytest.mark.parametrize("uri, key", [("s3://bucket/a", "ID:SECRETSECRET"), ("gs://bucket/a", Gcs.key)])
def test_a_bucket_is_not_taken_for_a_host(monkeypatch, uri, key):
    monkeypatch.setenv("A_KEY", key)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: pytest.fail(f"asked for {host}"))
    assert ObjectStorage(uri, StorageOptions(None, "env:A_KEY"))._store


@pytest.mark.parametrize("wrong", ["id", "secret"])
def test_a_wrong_key_is_told_and_not_shown(storage, s3, monkeypatch, wrong):
    secret = s3.secret if wrong == "id" else f"PLANTED{s3.secret[7:]}"
    key_id = "AKIAWRONGWRONGWRONG0" if wrong == "id" else s3.key_id
    monkeypatch.setenv("S3_KEY", f"{key_id}:{secret}")
    for action in ("exists", "read", "write", "list"):
        with pytest.raises(StorageError, match=r"env:S3_KEY was refused.*run again") as error:
            ACTIONS[action](storage)
        assert secret not in "".join(traceback.format_exception(error.value))


def test_a_token_that_has_expired_is_told_and_a_new_one_taken(storage, s3):
    """S3 answers with a status that others give to malformed requests."""
    storage.write("a", b"1")
    expired = refusal(400, "ExpiredToken")
    with s3.relay.disturb(lambda request: expired), pytest.raises(StorageError, match="refused .ExpiredToken"):
        storage.read("a")
    assert storage.read("a") == b"1"


def test_a_file_that_may_not_be_read_is_an_error_row_and_a_refused_listing_is_not(storage, s3):
    storage.write("a.png", b"1")
    denied = refusal(403, "AccessDenied")
    with s3.relay.disturb(lambda request: denied):
        assert reading._read(storage, reading.File("a.png", None, 100, None)) == (
            None,
            boundary.READ_ERRORS[errno.EACCES],
        )
        with pytest.raises(StorageError, match="refused .AccessDenied"):
            list(storage.list())


@pytest.mark.parametrize("answer", [refusal(301, "PermanentRedirect"), refusal(400, "AuthorizationHeaderMalformed")])
def test_a_bucket_of_another_region_is_told_with_the_setting(storage, s3, answer):
    with s3.relay.disturb(lambda request: answer), pytest.raises(StorageError, match=r"storage\.region"):
        storage.read("a")


def test_the_region_is_part_of_the_signature(s3, s3_root, s3_settings):
    storage = open_storage(s3_root, load_config("local", **s3_settings, **{"storage.region": "eu-north-1"}))
    s3.relay.requests.clear()
    storage.exists("a")
    assert s3.relay.requests and all("/eu-north-1/s3/" in r.headers["authorization"] for r in s3.relay.requests)


# ---------------------------------------------------------------- credentials


@pytest.mark.parametrize("value", ["PLANTEDSECRET", "id:PLANTEDSECRET:token:more", ":PLANTEDSECRET", "id:"])
def test_what_is_no_key_of_s3_is_told_and_not_shown(storage, monkeypatch, value):
    monkeypatch.setenv("S3_KEY", value)
    with pytest.raises(StorageError, match="env:S3_KEY holds no ACCESS_KEY_ID:SECRET") as error:
        storage.exists("a")
    assert "PLANTEDSECRET" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("value", ["PLANTEDSECRET", '{"client_email": "PLANTEDSECRET"}', "[]"])
def test_what_is_no_key_of_gcs_is_told_and_not_shown(monkeypatch, value):
    monkeypatch.setenv("GCS_KEY", value)
    storage = ObjectStorage("gs://bucket/a", StorageOptions("http://127.0.0.1:9", "env:GCS_KEY"))
    with pytest.raises(StorageError, match="env:GCS_KEY holds no service account's key") as error:
        storage.exists("a")
    assert "PLANTEDSECRET" not in "".join(traceback.format_exception(error.value))


def test_a_session_token_is_sent(storage, s3, monkeypatch):
    monkeypatch.setenv("S3_KEY", f"{s3.credential}:TOKENTOKEN")
    s3.relay.requests.clear()
    # The server knows of no such session, and an answer to HEAD has no body that says so.
    with pytest.raises(StorageError, match="refused .HTTP 400"):
        storage.exists("a")
    assert s3.relay.requests[0].headers["x-amz-security-token"] == "TOKENTOKEN"


def test_the_environment_adds_nothing_to_a_credential_that_is_named(storage, dfs, adls_root, monkeypatch):
    for name in ("AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "PLANTEDSECRET")
    for name in ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_TOKEN"):
        monkeypatch.setenv(name, "UExBTlRFRA==")
    objects.forget_stores()
    for place in (storage, AdlsStorage(adls_root, StorageOptions(dfs.endpoint, "env:ADLS_KEY"))):
        place.write("a", b"1")
        assert place.read("a") == b"1"
    objects.forget_stores()


def test_with_the_default_credential_the_environments_is_taken(storage, s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    by_default = ObjectStorage(storage.root, StorageOptions(s3.relay.endpoint))
    objects.forget_stores()
    by_default.write("a", b"1")
    assert storage.read("a") == b"1"


def test_a_host_without_an_identity_is_told_with_the_remedy(hasty, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    with pytest.raises(
        StorageError, match=r"^default: this process has no identity at s3://bucket; give.*name another"
    ):
        ObjectStorage("s3://bucket/a").read("b")


ABFSS = f"abfss://photos@{ACCOUNT}.dfs.core.windows.net/p"
OPTIONS = {
    "an account's key": (ABFSS, KEY, {"account_key": KEY}),
    "a token": (ABFSS, "?sv=1&sig=a%2Bb", {"sas_key": "sv=1&sig=a%2Bb"}),
    "a key of S3": ("s3://b/p", "ID:SECRET/+=", {"access_key_id": "ID", "secret_access_key": "SECRET/+="}),
    "a session of S3": (
        "s3://b/p",
        "ID:SECRET:TOKEN",
        {"access_key_id": "ID", "secret_access_key": "SECRET", "session_token": "TOKEN"},
    ),
    "a key of GCS": ("gs://b/p", Gcs.key, {"service_account_key": Gcs.key}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_for_other_libraries_hold_address_and_credential(monkeypatch, case):
    uri, secret, expected = OPTIONS[case]
    monkeypatch.setenv("A_KEY", secret)
    options = object_store_options(uri, StorageOptions(credential="env:A_KEY"))
    address = {"account_name": ACCOUNT, "endpoint": f"https://{ACCOUNT}.blob.core.windows.net"}
    address = {"abfss": address, "s3": {"conditional_put": "etag"}}.get(uri.partition(":")[0], {})
    assert options == expected | address
    there = object_store_options(uri, StorageOptions("http://127.0.0.1:1/x", "env:A_KEY", "eu-west-1"))
    assert there.items() >= (expected | {"allow_http": "true"}).items()
    assert there.get("endpoint", there.get("base_url")) == "http://127.0.0.1:1/x"
    assert there.get("region") == ("eu-west-1" if uri.startswith("s3") else None)


@pytest.fixture(params=["adls", "adls by token", "s3"])
def table(request, monkeypatch) -> Table:
    """A Delta table without rows."""
    kind = request.param.partition(" ")[0]
    root = request.getfixturevalue(f"{kind}_root")
    options = load_config("local", **request.getfixturevalue(f"{kind}_settings")).storage
    if request.param == "adls by token":
        monkeypatch.setenv("ADLS_SAS", sas(root.removeprefix("abfss://").partition("@")[0]))
        options = StorageOptions(options.endpoint, "env:ADLS_SAS")
    table = Table(open_storage(root, SimpleNamespace(storage=options)), "100% results", RESULT_SCHEMA)
    table.create()
    return table


def test_of_two_commits_on_one_version_of_a_table_one_passes(table):
    version = table.open()
    table.commit(version, {"a.parquet": File(1, "{}")}, [], {}, {})
    with pytest.raises(Conflict):
        table.commit(version, {"b.parquet": File(1, "{}")}, [], {}, {})
    assert table.open().names == {"a.parquet"}
    assert table.storage.exists("100% results/_delta_log/00000000000000000001.json")


WRONG = {
    "busy": (BUSY, "does not answer as it should .ServerBusy.*run again"),
    "dropped": (DROP, "does not answer as it should .HTTP error.*run again"),
    "wrong key": (refusal(403, "SignatureDoesNotMatch"), "env:S3_KEY was refused .SignatureDoesNotMatch"),
    "expired token": (refusal(400, "ExpiredToken"), "env:S3_KEY was refused .ExpiredToken"),
    "no bucket": (refusal(404, "NoSuchBucket"), "there is no such container"),
    "another region": (refusal(301, "PermanentRedirect"), r"storage\.region"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_the_service_is_not_taken_for_a_damaged_table(storage, s3, hasty, case):
    effect, message = WRONG[case]
    table = Table(storage, "results", RESULT_SCHEMA)
    for action in (table.open, table.create):
        with s3.relay.disturb(lambda request: effect), pytest.raises(StorageError, match=message) as error:
            action()
        assert "restore" not in str(error.value) and "\n" not in str(error.value)


def test_a_table_whose_log_lacks_a_file_is_told_with_the_remedy(storage):
    table = Table(storage, "results", RESULT_SCHEMA)
    for _ in range(3):
        table.commit(table.create(), {}, ["a.parquet"], {}, {})
    storage.delete("results/_delta_log/00000000000000000001.json")
    with pytest.raises(StorageError, match=r"/results: its log cannot be read; restore _delta_log"):
        table.open()


def test_a_planted_secret_is_in_no_error_log_or_pickle(storage, s3, hasty, caplog):
    secret = s3.secret
    forms = [secret, *(form for form in redaction._resolved if secret[:8] in form)]
    texts: list[str] = []

    def note_errors(of: ObjectStorage) -> None:
        for action in sorted(set(ACTIONS) - {"prune"}):
            try:
                ACTIONS[action](of)
            except Exception as error:  # noqa: BLE001 - whatever it is must not show the secret
                texts.append("".join(traceback.format_exception(error)) + repr(error))

    with caplog.at_level(logging.DEBUG):
        fill(storage)
        for effect in (DROP, CUT, BUSY, refusal(403, "SignatureDoesNotMatch"), refusal(400, "InvalidRequest")):
            with s3.relay.disturb(lambda request, effect=effect: effect):
                note_errors(storage)
        note_errors(ObjectStorage("s3://absent/x", storage.options))
    assert len(texts) >= 30
    texts += [repr(storage), repr(storage.options), str(vars(storage)), caplog.text]
    texts += [pickled.decode("latin-1") for pickled in (pickle.dumps(storage), cloudpickle.dumps(lambda: storage))]
    for text in texts:
        assert not [form for form in forms if form in text], text[:2000]
    assert redaction.redact(f"because {secret} was sent") == f"because {redaction.HIDDEN} was sent"


# ---------------------------------------------------------------- GCS


@pytest.fixture(scope="module")
def gcs(tmp_path_factory) -> Iterator[Gcs]:
    with (
        pytest.MonkeyPatch.context() as environment,
        object_stores.start_gcs(tmp_path_factory.mktemp("gcs")) as server,
    ):
        environment.setenv("GCS_KEY", Gcs.key)
        yield server


@pytest.fixture
def bucket(gcs) -> tuple[ObjectStorage, Callable[[str, bytes], None]]:
    """A folder in a bucket of its own, and how objects come there."""
    name = gcs.make_bucket()
    storage = open_storage(
        f"gs://{name}/a folder",
        load_config("local", **{"storage.endpoint": gcs.endpoint, "storage.credential": "env:GCS_KEY"}),
    )
    return storage, lambda path, data: gcs.put(name, f"a folder/{path}", data)


def test_gcs_lists_reads_and_deletes(bucket):
    storage, bring = bucket
    files = {"a.png": b"1", "100% #1/grün ?.png": b"22", "album.jpg/b.png": os.urandom(objects.FIRST_BYTES * 3)}
    for path, data in files.items():
        bring(path, data)
    listed = list(storage.list(directories=True))
    expected = {storage.join(path): len(data) for path, data in files.items()}
    assert {entry.path: entry.length for entry in listed if not entry.is_directory} == expected
    assert {entry.path for entry in listed if entry.is_directory} == {
        storage.join("100% #1"),
        storage.join("album.jpg"),
    }
    for path, data in files.items():
        assert storage.read(path) == data and storage.exists(path)
        with storage.open(path) as file:
            file.seek(-1, os.SEEK_END)
            assert file.read() == data[-1:]
    with pytest.raises(IsADirectoryError):
        storage.read("album.jpg")
    with pytest.raises(FileNotFoundError):
        storage.read("absent")
    storage.delete("album.jpg")
    storage.delete("never there")
    assert not storage.exists("album.jpg") and storage.exists("a.png")


def test_a_table_in_gcs_is_read(bucket, tmp_path):
    """The server takes no object, so that its log comes from a folder."""
    storage, bring = bucket
    table = Table(storage, "100% results", RESULT_SCHEMA)
    assert table.open() is NONE
    local = Table(open_storage(str(tmp_path)), "results", RESULT_SCHEMA)
    local.create({"a.parquet": File(1, "{}")})
    name = "_delta_log/00000000000000000000.json"
    bring(f"100% results/{name}", local.storage.read(f"results/{name}"))
    assert table.open().names == {"a.parquet"}


# ---------------------------------------------------------------- web servers


@pytest.fixture
def web(tmp_path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "web"
    folder.mkdir()
    with object_stores.start_web(folder) as address:
        yield address, folder


def test_one_file_of_a_web_server_is_a_location(web):
    address, folder = web
    (folder / "100% grün #1.png").write_bytes(b"123")
    storage = open_storage(f"{address}/100%25%20gr%C3%BCn%20%231.png")
    (entry,) = storage.list(directories=True)
    assert (entry.path, entry.length) == (storage.root, 3)
    modified = dt.datetime.fromtimestamp(int((folder / "100% grün #1.png").stat().st_mtime), dt.UTC)
    assert entry.modified == modified
    assert storage.read(entry.path, 3) == b"123" and storage.exists("")
    with pytest.raises(OSError, match="too large"):
        storage.read(entry.path, 2)


def test_files_of_a_web_server_are_read_by_their_names(web):
    address, folder = web
    (folder / "bundle").mkdir()
    (folder / "bundle" / "model.xml").write_bytes(b"xml")
    storage = open_storage(f"{address}/bundle")
    assert storage.read("model.xml") == b"xml" and storage.exists("model.xml") and not storage.exists("priors.npy")
    with pytest.raises(FileNotFoundError):
        storage.read("priors.npy")


def test_a_folder_of_a_web_server_cannot_be_listed(web):
    address, _ = web
    for uri in (address, f"{address}/absent/"):
        with pytest.raises(StorageError, match="a web server does not list its folders, so name one"):
            list(open_storage(uri).list())


def test_nothing_is_written_to_a_web_server(web):
    storage = open_storage(f"{web[0]}/out")
    changes: list[Callable[[], object]] = [
        lambda: storage.write("a", b""),
        lambda: storage.rename("a", "b"),
        lambda: storage.delete("a"),
        lambda: storage.delta_table("results"),
    ]
    for change in changes:
        with pytest.raises(StorageError, match="a web server is read only; name another location"):
            change()


def test_a_long_file_of_a_web_server_is_read_by_ranges_where_it_has_them(web):
    address, folder = web
    content = os.urandom(objects.FIRST_BYTES * 3)
    (folder / "clip.mp4").write_bytes(content)
    with open_storage(f"{address}/clip.mp4").open("") as file:
        file.seek(-9, os.SEEK_END)
        assert file.read() == content[-9:]
    with object_stores.start_web(folder, ranges=False) as without:
        storage = open_storage(f"{without}/clip.mp4")
        assert storage.read("") == content
        with pytest.raises(StorageError, match="no ranges of files"):
            storage.open("")


def test_a_file_that_a_web_server_refuses_is_told(web, monkeypatch):
    monkeypatch.setattr(object_stores._Web, "do_GET", lambda self: self.send_error(403))
    monkeypatch.setattr(object_stores._Web, "do_HEAD", lambda self: self.send_error(401))
    storage = open_storage(f"{web[0]}/a.png")
    for look in (lambda: storage.read(""), lambda: list(storage.list()), lambda: storage.exists("")):
        with pytest.raises(StorageError, match=r"nobody without a login \(HTTP 40[13]\)"):
            look()


@pytest.mark.parametrize("name", ["redirect.png", "path.png"])
def test_an_address_is_not_taken_for_what_is_wrong_with_it(storage, s3, hasty, name):
    with s3.relay.disturb(lambda request: BUSY), pytest.raises(StorageError, match=r"\(ServerBusy\)"):
        storage.read(name)


def test_an_endpoint_that_is_no_address_is_told(monkeypatch):
    monkeypatch.setenv("S3_KEY", "ID:SECRETSECRET")
    with pytest.raises(StorageError, match="no address: there is no such host.*storage.endpoint"):
        ObjectStorage("s3://bucket/a", StorageOptions("no address", "env:S3_KEY")).write("b", b"")


def test_a_credential_goes_to_no_web_server(web, monkeypatch):
    address, folder = web
    (folder / "a.png").write_bytes(b"1")
    monkeypatch.setenv("S3_KEY", "PLANTEDSECRET")
    sent: list[str] = []
    end_headers = object_stores._Web.end_headers
    monkeypatch.setattr(
        object_stores._Web, "end_headers", lambda self: sent.append(str(self.headers)) or end_headers(self)
    )
    config = load_config("local", **{"storage.credential": "env:S3_KEY"})
    assert open_storage(f"{address}/a.png", config).read("") == b"1"
    assert sent and "PLANTEDSECRET" not in "".join(sent) and "uthorization" not in "".join(sent)


# ---------------------------------------------------------------- runs


def rows_of(storage: ObjectStorage, root: str) -> list[dict]:
    files = files_of(storage, "results")
    rows = pa.concat_tables([pq.read_table(io.BytesIO(storage.read(path))) for path in files]).to_pylist()
    assert len({row["path"] for row in rows}) == len(rows), "an image is twice in the results"
    return comparable(rows, root)


def test_a_run_from_s3_to_s3_equals_a_run_over_a_folder_and_resumes(
    here, s3, s3_settings, storage, samples, bundle_uri, tmp_path
):
    for folder, below in ((samples, "photos"), (Path(bundle_uri), "model")):
        for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
            storage.write(f"{below}/{path.relative_to(folder)}", path.read_bytes())
    local = pipeline.run(here, str(samples), bundle_uri, str(tmp_path / "out"), load_config("local", pictures=0))
    places = [storage.join(place) for place in ("photos", "model", "out")]
    reached = [f"storage.endpoint={s3.relay.endpoint}", "storage.credential=env:S3_KEY"]
    settings = ["spark.master=local[2]", f"paths.runs={tmp_path / 'runs'}", "pictures=0", *reached]
    finished = start_run(*places, tmp_path / "log", *settings).finish()
    assert finished.code == 0, finished.errors
    assert s3.secret not in finished.errors + finished.answer

    out = open_storage(storage.join("out"), SimpleNamespace(storage=storage.options))
    counts = ("images", "ok", "failed", "skipped")
    assert [finished.summary[name] for name in counts] == [getattr(local, name) for name in counts]
    assert rows_of(out, storage.join("photos")) == comparable(read_rows(tmp_path / "out"), str(samples))
    assert not storage.exists("out/_staging")

    storage.write("photos/new.png", (samples / "clothes" / "sample 000.png").read_bytes())
    again = pipeline.run(here, *places, load_config("local", pictures=0, **s3_settings))
    assert (again.ok, again.skipped) == (1, local.images)
    assert len(rows_of(out, storage.join("photos"))) == local.images + 1
    # In a process of its own: the library lets no thread of this one go on while it waits for the relay.
    command = [sys.executable, "-m", "helpers", "history", out.root, *(f"--set={setting}" for setting in reached)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert [line.split()[-5] for line in printed.splitlines()[1:]] == ["1", str(local.images)]


def test_an_image_of_a_web_server_is_processed(spark, web, bundle_uri, samples, tmp_path):
    address, folder = web
    (folder / "a b.png").write_bytes((samples / "clothes" / "sample 000.png").read_bytes())
    pipeline.run(spark, f"{address}/a%20b.png", bundle_uri, str(tmp_path / "out"), load_config("local", pictures=0))
    rows = read_rows(tmp_path / "out")
    assert [(row["path"], row["error"]) for row in rows] == [(f"{address}/a%20b.png", None)]


@pytest.mark.parametrize("uri", ["s3://bucket/photos", "gs://bucket/photos", "https://host/a.png"])
def test_on_a_cluster_tasks_read_what_spark_may_have_no_connector_for(uri, monkeypatch):
    monkeypatch.setattr(readers, "local_slots", lambda spark: None)
    assert readers.choose_reader(None, ObjectStorage(uri), pa.table({}), load_config("cluster")) == "files"
