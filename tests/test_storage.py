"""What every storage does, local or distant, and what only local ones do."""

import errno
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from helpers.config import load_config
from helpers.errors import StorageError
from helpers.storage import LocalStorage, Storage, lock, open_storage

NAMES = [
    "plain.png",
    "with space.png",
    "100%.png",
    "%41 not decoded.png",
    "hash#1.png",
    "question?.png",
    "semi;colon,comma.png",
    'it\'s "quoted".png',
    "two\nlines.png",
    "tab\there.png",
    "*star[1].png",
    "grün 日本 🙂.png",
    "cafe\u0301.png",  # decomposed: must not be normalized to é
    " leading and trailing ",
    "-dash",
    "noextension",
]

# A process that holds something open until it is killed.
HOLDER = """
import json, sys
from helpers.config import load_config
from helpers.storage import open_storage
with open_storage(sys.argv[1], load_config("local", **json.loads(sys.argv[2]))).{what} as file:
    {body}
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(storage: Storage, settings: dict, what: str, body: str = "pass") -> subprocess.Popen:
    script = HOLDER.format(what=what, body=body)
    process = subprocess.Popen(
        [sys.executable, "-c", script, storage.root, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def local(tmp_path) -> LocalStorage:
    return open_storage(str(tmp_path))


@pytest.fixture(params=["local", "adls", "s3"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def settings(request, kind) -> dict:
    """How a kind of storage is reached; nothing is needed for a local one."""
    return {} if kind == "local" else request.getfixturevalue(f"{kind}_settings")


@pytest.fixture
def storage(request, kind, settings, tmp_path) -> Storage:
    root = str(tmp_path) if kind == "local" else request.getfixturevalue(f"{kind}_root")
    return open_storage(root, load_config("local", **settings))


@pytest.fixture
def reopen(settings):
    """Open another place of the same kind."""
    return lambda root: open_storage(root, load_config("local", **settings))


# ---------------------------------------------------------------- what every storage does


def can_be_named(name: str, kind: str) -> bool:
    return kind != "s3" or name.isprintable()  # what obstore takes; `test_objects.py` has what becomes of others


def test_every_file_is_listed_with_its_exact_name(storage, kind):
    expected = {}
    for folder in ("", "nested", "nested/deeper folder", "100% #1"):
        for size, name in enumerate(name for name in NAMES if can_be_named(name, kind)):
            path = f"{folder}/{name}".lstrip("/")
            storage.write(path, b"x" * size)
            expected[f"{storage.root}/{path}"] = size
    listed = list(storage.list())
    assert {entry.path: entry.length for entry in listed} == expected
    assert len(listed) == len(expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_path_reads_back(storage, kind, name):
    if not can_be_named(name, kind):
        with pytest.raises(OSError, match="control characters"):
            storage.write(f"folder/{name}", b"")
        return
    storage.write(f"folder/{name}", name.encode())
    (entry,) = storage.list("folder")
    assert entry.path == storage.join("folder", name)
    assert storage.read(entry.path) == storage.read(f"folder/{name}") == name.encode()


@pytest.mark.parametrize("length", [0, 1, 1000])
def test_a_file_is_read_whole_up_to_a_limit_and_not_at_all_beyond(storage, length):
    content = os.urandom(length)
    storage.write("a", content)
    for limit in (length, length + 1, 2**31, None):
        assert storage.read("a", limit) == content
    if length:
        with pytest.raises(OSError, match="too large") as error:
            storage.read("a", length - 1)
        assert error.value.errno == errno.EFBIG


def test_a_file_opens_to_be_read_from_any_position(storage):
    content = os.urandom(300_000)
    storage.write("a", content)
    with storage.open("a") as file:
        assert file.read(10) == content[:10]
        assert file.seek(-10, os.SEEK_END) == len(content) - 10
        assert file.read() == content[-10:]
        assert file.seek(0) == 0 and file.read() == content


@pytest.mark.parametrize("name", ["gone", "folder"])
def test_what_is_no_file_does_not_open(storage, name):
    storage.write("folder/a", b"1")
    with pytest.raises((FileNotFoundError, IsADirectoryError)):
        storage.open(name)


def test_directories_are_listed_only_when_asked_for(storage):
    storage.write("album.jpg/a.png", b"")
    assert [entry.path for entry in storage.list()] == [storage.join("album.jpg/a.png")]
    assert {entry.path: entry.is_directory for entry in storage.list(directories=True)} == {
        storage.join("album.jpg"): True,
        storage.join("album.jpg/a.png"): False,
    }


SORTED = ["a!/1", "a-1", "a-b/1", "a.png", "a/1", "a/b/1", "a/c", "a0", "b", "grün", "日本/1", "🙂"]


def test_files_are_listed_in_the_order_of_their_paths(storage, kind):
    assert sorted(SORTED, key=str.encode) == SORTED
    for name in reversed(SORTED):
        storage.write(name, b"")
    listed = [entry.path.removeprefix(f"{storage.root}/") for entry in storage.list()]
    assert sorted(listed, key=str.encode) == SORTED
    if kind != "adls":
        assert listed == SORTED


def test_a_single_file_is_a_location_too(storage, reopen):
    storage.write("a.png", b"123")
    (entry,) = reopen(storage.join("a.png")).list()
    assert (entry.path, entry.length) == (storage.join("a.png"), 3)


@pytest.mark.parametrize("prefix", ["", "absent"])
def test_listing_what_is_not_there_names_it(storage, reopen, prefix):
    gone = reopen(storage.join("gone"))
    with pytest.raises(StorageError, match="gone.*no such folder"):
        list(gone.list(prefix))


def test_a_file_appears_whole_when_the_block_ends(storage):
    storage.write("a.bin", b"old")
    with storage.create("a.bin") as file:
        file.write(b"new")
        file.flush()
        assert storage.read("a.bin") == b"old"
    assert storage.read("a.bin") == b"new"


def test_an_exception_leaves_nothing_behind(storage):
    storage.write("old.bin", b"old")
    for name in ("old.bin", "new.bin"):
        with pytest.raises(RuntimeError, match="stop"), storage.create(name) as file:
            file.write(b"half")
            raise RuntimeError("stop")
    assert [entry.path for entry in storage.list()] == [storage.join("old.bin")]
    assert storage.read("old.bin") == b"old"


def test_a_writer_that_is_killed_leaves_the_old_content(storage, settings):
    storage.write("a.bin", b"old")
    kill(start_holder(storage, settings, "create('a.bin')", "file.write(b'half'); file.flush()"))
    assert storage.read("a.bin") == b"old"


def test_write_makes_folders_and_replaces(storage):
    storage.write("new/folder/a.bin", b"1")
    storage.write("new/folder/a.bin", b"22")
    assert storage.read("new/folder/a.bin") == b"22"
    assert len(list(storage.list())) == 1


def test_rename_moves_and_replaces(storage):
    storage.write("a", b"a")
    storage.write("b", b"b")
    storage.rename("a", "b")
    storage.rename("b", "new folder/c")
    assert not storage.exists("a") and not storage.exists("b")
    assert storage.read("new folder/c") == b"a"


def test_delete_takes_files_folders_and_what_is_not_there(storage):
    storage.write("file", b"")
    storage.write("folder/deep/file", b"")
    for path in ("file", "folder", "never there"):
        storage.delete(path)
        assert not storage.exists(path)


def test_a_missing_file_is_an_os_error(storage):
    storage.write("present", b"")
    with pytest.raises(FileNotFoundError):
        storage.read("absent")
    with pytest.raises(FileNotFoundError):
        storage.rename("absent", "present")
    assert storage.exists("present")


def test_a_folder_read_as_a_file_is_an_os_error(storage):
    storage.write("album.jpg/a.png", b"")
    with pytest.raises(IsADirectoryError):
        storage.read("album.jpg")


def test_folders_to_skip_are_left_out(storage):
    for path in ("a", "skipped/b", "skipped/deep/c", "skipped too"):
        storage.write(path, b"")
    listed = storage.list(skip=[storage.join("skipped"), storage.join("absent")])
    assert {entry.path for entry in listed} == {storage.join("a"), storage.join("skipped too")}


def test_the_root_exists_once_something_is_in_it(storage, reopen):
    below = reopen(storage.join("below"))
    assert not below.exists("")
    below.write("a", b"")
    assert below.exists("")


def test_a_storage_travels_to_another_process(storage):
    storage.write("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.root == storage.root and copy.read("a") == b"1"


def test_a_folder_is_pruned_only_where_nothing_is_in_it(storage):
    storage.write("full/deep/a", b"")
    storage.write("empty/a", b"")
    storage.delete("empty/a")
    for path in ("full", "full/deep", "empty", "absent"):
        storage.prune(path)
    assert not storage.exists("empty") and storage.exists("full/deep/a")
    storage.delete("full/deep/a")
    storage.prune("full/deep")
    assert not storage.exists("full/deep")


# ---------------------------------------------------------------- local ones


def test_a_lock_keeps_another_process_out_until_it_is_killed(local):
    holder = start_holder(local, {}, "lock('below/_lock')")
    try:
        with pytest.raises(BlockingIOError), lock(local, "below/_lock"):
            pytest.fail("two processes hold the lock")
    finally:
        kill(holder)  # SIGKILL: no clean-up runs
    with lock(local, "below/_lock"):
        pass


def test_a_lock_is_free_after_its_block(local):
    with lock(local, "_lock"), pytest.raises(BlockingIOError), lock(open_storage(local.root), "_lock"):
        pytest.fail("locked twice")
    with lock(local, "_lock"):
        pass


def test_a_lock_below_a_file_names_the_file(local):
    local.write("notes.txt", b"")
    with (
        pytest.raises(StorageError, match=r"notes\.txt is a file"),
        lock(open_storage(local.join("notes.txt")), "_lock"),
    ):
        pytest.fail("locked")


def test_object_storage_has_no_locks_and_says_so(adls_root, adls_settings, caplog):
    with lock(open_storage(adls_root, load_config("local", **adls_settings)), "_lock"):
        assert f"{adls_root}: object storage has no locks" in caplog.text


def test_folders_that_are_pruned_while_files_are_written_in_them_cost_no_file(local):
    """As by a run that tidies up where another one is at work."""
    ended = threading.Event()

    def prune() -> None:
        while not ended.wait(0.0002):  # without a pause no process would ever have its turn
            local.prune("top/folder")
            local.prune("top")

    thread = threading.Thread(target=prune)
    thread.start()
    try:
        for number in range(1000):
            local.write("top/folder/a", str(number).encode())
            assert local.read("top/folder/a") == str(number).encode()
            local.delete("top/folder/a")
    finally:
        ended.set()
        thread.join()


def test_an_entry_has_length_and_modification_time_to_the_microsecond(local, tmp_path):
    local.write("a.png", b"12345")
    os.utime(tmp_path / "a.png", ns=(0, 1_700_000_000_123_456_789))
    (entry,) = local.list()
    assert entry.length == 5
    assert entry.modified == datetime.fromtimestamp(1_700_000_000, UTC).replace(microsecond=123_456)


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "file:///{}"])
def test_file_uris_name_the_same_place(local, tmp_path, form):
    local.write("a b.png", b"1")
    root = str(tmp_path)
    opened = open_storage(form.format(root.lstrip("/") if form.endswith("///{}") else root))
    assert opened.root == local.root and opened.read("a b.png") == b"1"


def test_file_uris_are_percent_decoded_and_plain_paths_are_not(tmp_path):
    for name in ("a b", "a%20b"):
        open_storage(str(tmp_path)).write(f"{name}/which", name.encode())
    assert open_storage((tmp_path / "a b").as_uri()).read("which") == b"a b"
    assert open_storage((tmp_path / "a%20b").as_uri()).read("which") == b"a%20b"
    assert open_storage(str(tmp_path / "a%20b")).read("which") == b"a%20b"


def test_a_relative_root_is_made_absolute_at_once(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    storage = open_storage("photos")
    storage.write("a.png", b"1")
    monkeypatch.chdir("/")  # a worker's working directory is another
    assert storage.root == str(tmp_path / "photos")
    assert [entry.path for entry in storage.list()] == [str(tmp_path / "photos" / "a.png")]


@pytest.mark.parametrize("form", ["{}/x/../photos", "{}/photos/", "{}/./photos", "{}//photos"])
def test_one_folder_has_one_root_however_it_is_spelt(tmp_path, form):
    # Resuming compares paths: a second spelling would put every image into the results twice.
    (tmp_path / "photos").mkdir()
    assert open_storage(form.format(tmp_path)).root == str(tmp_path / "photos")


def test_a_plain_folder_with_a_colon_in_its_name_opens(tmp_path, monkeypatch):
    (tmp_path / "run:1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_storage("run:1").root == str(tmp_path / "run:1")


def test_dbfs_is_the_mount():
    assert open_storage("dbfs:/data/photos").root == "/dbfs/data/photos"


@pytest.mark.parametrize("uri", ["wasbs://c@host/photos", "ftp://host/x", "hdfs://host/x.png"])
def test_an_unknown_scheme_is_named_with_what_works(uri):
    with pytest.raises(StorageError) as error:
        open_storage(uri)
    assert uri in str(error.value) and "file:" in str(error.value) and "s3://" in str(error.value)


def test_a_folder_of_more_names_than_are_sorted_at_once_is_sorted_on_the_disk(local, monkeypatch):
    monkeypatch.setattr("helpers.storage.local.SORTED_AT_ONCE", 3)
    monkeypatch.setattr("helpers.temporary.READ_AT_ONCE", 2)
    names = sorted(f"{number:x}" for number in range(1, 60, 5))
    for name in reversed(names):
        local.write(name, b"")
    listed = [entry.path for entry in local.list()]
    assert listed == [local.join(name) for name in names] and len(listed) == 12


def test_two_may_delete_the_same_folder_at_once(local):
    both = threading.Barrier(2)

    def delete() -> None:
        both.wait()
        local.delete("folder")

    with ThreadPoolExecutor(2) as pool:
        for _ in range(300):
            local.write("folder/a.txt", b"")
            assert [call.result() for call in [pool.submit(delete) for _ in range(2)]] == [None, None]
            assert not local.exists("folder")


def test_deleting_a_link_keeps_what_it_leads_to(local, tmp_path):
    local.write("kept/file", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    local.delete("link")
    assert not local.exists("link") and local.read("kept/file") == b"1"


def test_links_that_lead_in_circles_end(local, tmp_path):
    local.write("a/real.png", b"123")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    listed = list(islice(local.list(), 1000))
    assert len(listed) < 1000
    files = [entry for entry in listed if entry.path.endswith("real.png")]
    assert len(files) == 1 and files[0].length == 3


def test_broken_and_looping_links_are_listed_with_no_bytes(local, tmp_path):
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "x.png").symlink_to(tmp_path / "y.png")
    (tmp_path / "y.png").symlink_to(tmp_path / "x.png")
    assert {(Path(entry.path).name, entry.length) for entry in local.list()} == {
        ("broken.png", 0),
        ("loop.png", 0),
        ("x.png", 0),
        ("y.png", 0),
    }
    with pytest.raises(OSError, match="symbolic links"):
        local.read("loop.png")


def test_a_link_to_a_file_has_the_files_length(local, tmp_path):
    local.write("real.png", b"123")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    assert {entry.length for entry in local.list()} == {3}


def links(local, tmp_path) -> None:
    """A location with links that stay in it and links that lead out of it."""
    (tmp_path / "else" / "where").mkdir(parents=True)
    (tmp_path / "else" / "where" / "b.png").write_bytes(b"12")
    for name, target in {
        "in.png": "real/a.png",
        "in": "real",
        "absolute.png": tmp_path / "linked root" / "real" / "a.png",
        "out.png": tmp_path / "else" / "where" / "b.png",
        "out": "../else/where",
        "out of proc": "/proc",
        "nowhere.png": "real/none.png",
        "nowhere outside.png": "../else/none.png",
        "beside.png": "../source too/c.png",
    }.items():
        (Path(local.root) / name).symlink_to(target)


@pytest.fixture
def linked(tmp_path) -> LocalStorage:
    local = open_storage(str(tmp_path / "source"))
    local.write("real/a.png", b"1")
    open_storage(str(tmp_path / "source too")).write("c.png", b"123")
    (tmp_path / "linked root").symlink_to("source")
    links(local, tmp_path)
    return local


LEADING_OUT = {"out.png", "out", "out of proc", "nowhere outside.png", "beside.png"}


@pytest.mark.parametrize("root", ["source", "linked root"])
def test_links_that_lead_out_of_a_source_are_entries_that_say_so(linked, tmp_path, root):
    storage = open_storage(str(tmp_path / root))
    entries = {entry.path.removeprefix(f"{storage.root}/"): entry for entry in storage.list(outside_links=False)}
    assert set(entries) == {"real/a.png", "in.png", "absolute.png", "nowhere.png", *LEADING_OUT}
    for name, entry in entries.items():
        assert ("leads out of the source" in (entry.error or "")) == (name in LEADING_OUT), name
        assert entry.length == (1 if name in ("real/a.png", "in.png", "absolute.png") else entry.length)


def test_links_that_lead_out_are_followed_where_that_is_asked_for(linked):
    (Path(linked.root) / "out of proc").unlink()
    names = {entry.path.removeprefix(f"{linked.root}/"): entry.length for entry in linked.list(outside_links=True)}
    assert names["out.png"] == 2 and names["out/b.png"] == 2 and names["beside.png"] == 3


def test_what_has_a_path_of_its_own_is_not_listed_below_a_link(local, tmp_path):
    for name in ("a", "m", "z"):
        (tmp_path / name).symlink_to("folder", target_is_directory=True)
        local.write("folder/deep/x.png", b"")
        assert [entry.path for entry in local.list() if entry.path.endswith(".png")] == [
            local.join("folder/deep/x.png")
        ]


def test_folders_are_told_apart_where_every_inode_is_0(local, monkeypatch):
    for name in ("a/1.png", "b/2.png", "b/c/3.png", "skipped/4.png"):
        local.write(name, b"")
    real = os.stat

    def numberless(path, **options):
        status = real(path, **options)
        return SimpleNamespace(
            **{name: getattr(status, name) for name in dir(status) if name[:3] == "st_"} | {"st_ino": 0}
        )

    monkeypatch.setattr("os.stat", numberless)
    listed = local.list(skip=[local.join("skipped")])
    assert {entry.path for entry in listed} == {local.join(name) for name in ("a/1.png", "b/2.png", "b/c/3.png")}


def test_a_chain_of_links_of_any_length_is_one_entry(local, tmp_path):
    local.write("good.png", b"1")
    for number in range(3000):
        (tmp_path / f"{number}.png").symlink_to(f"{number + 1}.png")
    entries = list(local.list(tolerant=True, outside_links=False))
    assert len(entries) == 3001
    with pytest.raises(OSError, match="symbolic links"):
        local.read("0.png")


def make_deep(folder: Path, name: str, depth: int) -> None:
    """A file whose path is longer than the operating system takes; only its folder's own process can make it."""
    script = "import os, sys\nfor _ in range(int(sys.argv[3])):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)\n\
    open(sys.argv[2], 'w').close()"
    subprocess.run([sys.executable, "-c", script, "", name, str(depth)], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["x.png", "x" * 251 + ".png"])
def test_a_path_that_is_too_long_costs_what_is_below_it(local, tmp_path, name):
    local.write("good.png", b"1")
    for depth in (18, 30):
        (tmp_path / str(depth)).mkdir()
        make_deep(tmp_path / str(depth), name, depth)
    entries = list(local.list(tolerant=True))
    assert [entry.path for entry in entries if entry.error is None and entry.length] == [local.join("good.png")]
    wrong = [entry for entry in entries if entry.error]
    assert wrong and all("too long" in entry.error.lower() for entry in wrong)


def test_what_cannot_be_looked_at_is_an_entry_with_the_reason(local, monkeypatch):
    for name in ("good.png", "bad.png", "value.png", "folder/x.png"):
        local.write(name, b"1")
    failures = {"bad.png": OSError(5, "Input/output error"), "value.png": ValueError("odd")}
    failures = {local.join(name): error for name, error in failures.items()}
    for function in ("stat", "lstat"):
        monkeypatch.setattr(f"os.{function}", failing(getattr(os, function), failures))
    entries = {entry.path.removeprefix(f"{local.root}/"): entry.error for entry in local.list()}
    assert entries["good.png"] is None and entries["folder/x.png"] is None
    assert "Input/output error" in entries["bad.png"] and "odd" in entries["value.png"]


def failing(function: Callable, failures: dict[str, Exception]) -> Callable:
    def call(path, *arguments, **options):
        if str(path) in failures:
            raise failures[str(path)]
        return function(path, *arguments, **options)

    return call


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_folder_that_cannot_be_listed_costs_its_own_files_only(local, monkeypatch, error):
    for name in ("good.png", "locked/a.png", "z/deep/b.png"):
        local.write(name, b"1")
    monkeypatch.setattr("os.scandir", failing(os.scandir, {local.join("locked"): error}))
    entries = {entry.path: entry for entry in local.list(tolerant=True)}
    locked = entries.pop(local.join("locked"))
    assert locked.is_directory and error.strerror in locked.error
    assert set(entries) == {local.join("good.png"), local.join("z/deep/b.png")}
    with pytest.raises(StorageError, match=rf"locked: this folder cannot be listed \({error.strerror}\)"):
        list(local.list())


def test_a_location_that_cannot_be_looked_at_is_told_in_one_line(tmp_path):
    storage = open_storage(str(tmp_path / ("x" * 300)))
    for look in (lambda: storage.exists(""), lambda: list(storage.list())):
        with pytest.raises(StorageError, match="too long"):
            look()


@pytest.mark.parametrize("seconds", [300_000_000_000, -70_000_000_000, 2**62])
def test_a_time_that_no_calendar_has_is_an_entry_with_the_reason(local, monkeypatch, seconds):
    for name in ("good.png", "odd.png", "folder/x.png"):
        local.write(name, b"1")
    real, odd = os.stat, local.join("odd.png")

    def far(path, **options):
        status = real(path, **options)
        return (
            SimpleNamespace(st_mode=status.st_mode, st_size=1, st_mtime_ns=seconds * 10**9) if path == odd else status
        )

    monkeypatch.setattr("os.stat", far)
    entries = {entry.path: entry for entry in local.list()}
    assert "modification time" in entries.pop(odd).error
    assert {entry.error for entry in entries.values()} == {None} and len(entries) == 2


BYTES = st.sampled_from(
    [b"\\", b"x", b"5", b"c", b"f", b"8", b"\xff", b"\x80", b"a", "é".encode(), b"\xc3", b"\n", b" "]
)
FILE_NAMES = st.sets(st.lists(BYTES, min_size=1, max_size=12).map(b"".join), min_size=1, max_size=12)


@given(FILE_NAMES)
@settings_of_hypothesis(deadline=None, max_examples=200)
def test_every_name_of_bytes_has_a_path_of_its_own_that_reads_the_same_file(names):
    with tempfile.TemporaryDirectory() as folder:
        root = os.fsencode(folder) + b"/d\xff\\xff"
        os.mkdir(root)  # noqa: PTH102 - of bytes
        for name in names:
            Path(os.fsdecode(root + b"/" + name)).write_bytes(name)
        storage = open_storage(os.fsdecode(root))
        entries = list(storage.list())
        assert {storage.read(entry.path) for entry in entries} == names
        assert len({entry.path for entry in entries}) == len(names)
        for entry in entries:
            entry.path.encode()  # any reader can have it
            assert entry.path.startswith(f"{storage.root}/")
            again = pickle.loads(pickle.dumps(storage))
            assert again.read(entry.path.removeprefix(f"{storage.root}/")) == storage.read(entry.path)
            again.delete(entry.path)
        assert not list(storage.list())


def test_a_device_is_never_opened(tmp_path, monkeypatch):
    (tmp_path / "watchdog.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.jpg")
    opened = []
    monkeypatch.setattr("os.open", lambda *arguments, **options: opened.append(arguments))
    for name in ("watchdog.jpg", "pipe.jpg"):
        with pytest.raises(OSError, match="not a file"):
            open_storage(str(tmp_path)).read(name)
    assert opened == []


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="not a file"):
        open_storage(str(tmp_path)).read("pipe.jpg")


def test_a_device_is_refused_instead_of_read_for_ever(tmp_path):
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a file"):
        open_storage(str(tmp_path)).read("zero.jpg")


def test_a_backslash_is_part_of_a_name(local):  # object storage takes it for a slash
    local.write("back\\slash.png", b"1")
    (entry,) = local.list()
    assert entry.path == local.join("back\\slash.png") and local.read(entry.path) == b"1"


def test_no_more_of_a_file_is_read_than_its_limit_though_it_has_no_end(local, tmp_path):
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**43)
    (tmp_path / "endless").symlink_to("/proc/self/environ")  # of length 0, as the system says
    tracemalloc.start()
    try:
        for name in ("sparse", "endless"):
            with pytest.raises(OSError, match="too large"):
                local.read(name, 8)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert local.read("endless", 10**6) == Path("/proc/self/environ").read_bytes()


def test_a_file_that_grows_while_it_is_read_is_not_read_beyond_its_limit(local, tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    real = os.fstat

    def earlier(descriptor: int):
        """The status as it was before the file grew to 100 bytes."""
        status = list(real(descriptor))
        status[6] = min(status[6], 10)
        return os.stat_result(status)

    monkeypatch.setattr(os, "fstat", earlier)
    assert local.read("a", 100) == bytes(100)
    with pytest.raises(OSError, match="too large"):
        local.read("a", 99)
