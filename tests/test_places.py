"""Outputs that cannot be written, or hold something else: one line, exit code 2, and everything stays as it was."""

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_results, without_privileges
from test_results import publish, stage, table

from helpers.cli import main
from helpers.pipeline.results import ResultStore
from helpers.storage import open_storage

RUN = "20260101T000000-0123abcd"


@pytest.fixture
def photos(samples) -> Path:
    return samples / "bags"


def arguments(photos: Path, model: str, output: Path, *settings: str) -> list[str]:
    options = [part for setting in ("spark.master=local[2]", *settings) for part in ("--set", setting)]
    command = ["run", "--profile", "local", "--source", str(photos), "--model", model, "--output", str(output)]
    return [*command, *options]


def content_of(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and what is in it."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_one_line(code: int, answer: str, errors: str, *parts: str) -> None:
    assert code == 2, errors
    assert answer == "" and "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.rstrip().endswith(lines[0]), errors
    for part in parts:
        assert part in lines[0]


# ---------------------------------------------------------------- something else in our folders


def foreign_table(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"name": ["thesis"]}), path)


def cut_short(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table("a"), buffer)
    path.write_bytes(buffer.getvalue()[:-100])


def text(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("the only copy")


FOREIGN: dict[str, Callable[[Path], None]] = {
    "results/thesis.docx": text,
    "results/drafts/thesis.docx": text,
    "results/table.parquet": foreign_table,
    "results/cut.parquet": cut_short,
    "results/empty.parquet": Path.touch,
    "results": text,
    "_staging/thesis.docx": text,
    "_staging/drafts/thesis.docx": text,
    "_staging/table.parquet": foreign_table,
    f"_staging/{RUN}/thesis.docx": text,
    f"_staging/{RUN}/000000-1-0.parquet": foreign_table,
    f"_staging/{RUN}/000001-1-0.parquet": cut_short,
    "_staging": text,
}


@pytest.mark.parametrize("resume", [True, False], ids=["resume", "start over"])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_stops_the_run_and_stays(spark, photos, bundle_uri, tmp_path, capsys, name, resume):
    output = tmp_path / "out"
    if "/" in name:
        publish(ResultStore(open_storage(str(output))))
        (output / name).parent.mkdir(parents=True, exist_ok=True)
    else:
        output.mkdir()
    FOREIGN[name](output / name)
    before = content_of(output)
    code = main(arguments(photos, bundle_uri, output, f"resume={str(resume).lower()}"))
    if not resume and name.endswith("-0.parquet"):  # starting over looks at nothing that is staged
        assert code == 0
        return
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, str(output / name.partition("/")[0]), "move it away")
    assert content_of(output) == before


def test_what_comes_into_our_folders_during_a_run_is_not_deleted(
    spark, photos, bundle_uri, tmp_path, capsys, monkeypatch
):
    """Only the next run refuses."""
    output, publish_really = tmp_path / "out", ResultStore.publish

    def put_beside(store: ResultStore, *given) -> list[str]:
        (output / "_staging" / "thesis.docx").write_text("the only copy")
        return publish_really(store, *given)

    monkeypatch.setattr(ResultStore, "publish", put_beside)
    assert main(arguments(photos, bundle_uri, output)) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out.splitlines()[-1])["ok"] > 0 and "Traceback" not in answer.err
    assert (output / "_staging" / "thesis.docx").read_text() == "the only copy"
    assert main(arguments(photos, bundle_uri, output)) == 2


def test_rows_staged_of_another_model_are_not_published(spark, photos, bundle_uri, tmp_path, capsys):
    output = tmp_path / "out"
    stage(ResultStore(open_storage(str(output))), RUN, 0, table("planted", model="other@1"))
    before = content_of(output)
    code = main(arguments(photos, bundle_uri, output))
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, "other@1", "another --output", "resume=false")
    assert content_of(output) == before
    assert main(arguments(photos, bundle_uri, output, "resume=false")) == 0
    assert "planted" not in read_results(output)["path"].to_pylist()
    assert main(arguments(photos, bundle_uri, output)) == 0


# ---------------------------------------------------------------- places that cannot be written


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "test", str(folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and not os.environ.get("CI"):
        pytest.skip(f"nothing can be mounted here: {answer.stderr.strip()}")
    assert answer.returncode == 0, answer.stderr
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_unprivileged(*options: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, for which permissions count."""
    command = [*without_privileges(), sys.executable, "-m", "helpers", *options]
    settings = {**os.environ, **environment}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)


def another_users_folder(output: Path) -> None:
    output.mkdir()
    output.chmod(0o555)


def another_users_staging(output: Path) -> None:
    (output / "_staging").mkdir(parents=True)
    (output / "_staging").chmod(0o555)


def another_users_results(output: Path) -> None:
    store = ResultStore(open_storage(str(output)))
    (file,) = publish(store, stage(store, RUN, 0, table("a")))
    (output / file).chmod(0)


def another_users_log(output: Path) -> None:
    publish(ResultStore(open_storage(str(output))))
    for file in (output / "results" / "_delta_log").iterdir():
        file.chmod(0)


OTHERS = [another_users_folder, another_users_staging, another_users_results, another_users_log]


@pytest.mark.parametrize("prepare", OTHERS)
def test_an_output_of_another_user_is_one_line(photos, bundle_uri, tmp_path, prepare):
    prepare(tmp_path / "out")
    answer = run_unprivileged(*arguments(photos, bundle_uri, tmp_path / "out"))
    assert_one_line(answer.returncode, answer.stdout, answer.stderr, str(tmp_path / "out"), "ermission denied")


def test_an_output_below_a_folder_of_another_user_is_one_line(photos, bundle_uri, tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    answer = run_unprivileged(*arguments(photos, bundle_uri, tmp_path / "locked" / "out"))
    assert_one_line(answer.returncode, answer.stdout, answer.stderr, str(tmp_path / "locked"), "permission denied")


def test_a_user_who_may_write_the_output_only_gets_the_results_and_a_warning(photos, bundle_uri, tmp_path):
    """As the user of a pod, for whom the project's folder is another's."""
    (tmp_path / "project").mkdir(mode=0o555)
    runs = tmp_path / "project" / "out" / "runs"
    options = arguments(photos, bundle_uri, tmp_path / "out", "pictures=2", f"paths.runs={runs}")
    answer = run_unprivileged(*options)
    assert answer.returncode == 0 and "Traceback" not in answer.stderr, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1])["ok"] == len(list(photos.iterdir()))
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    (warning,) = [line for line in answer.stderr.splitlines() if "no dashboard" in line]
    assert str(runs) in warning and "permission denied" in warning and "set paths.runs" in warning


def test_an_output_on_a_read_only_disk_is_one_line(photos, bundle_uri, tmp_path, capsys):
    with mounted(tmp_path / "disk", "ro"):
        code = main(arguments(photos, bundle_uri, tmp_path / "disk" / "out"))
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, str(tmp_path / "disk" / "out"), "read-only")


IMPOSSIBLE = {"notes.txt": "a file is where a folder should be", "notes.txt/out": "a file is where a folder should be"}
IMPOSSIBLE |= {"x" * 300: "the name is too long", f"{'y' * 200}/" * 30: "the name is too long"}


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=["a file", "below a file", "long name", "long path"])
def test_an_output_that_cannot_be_is_one_line(photos, bundle_uri, tmp_path, capsys, name):
    (tmp_path / "notes.txt").write_text("the user's")
    code = main(arguments(photos, bundle_uri, tmp_path / name))
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, str(tmp_path), IMPOSSIBLE[name], "location")
    assert (tmp_path / "notes.txt").read_text() == "the user's"


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_an_output_on_a_file_system_without_whole_files_is_one_line(
    photos, bundle_uri, tmp_path, capsys, monkeypatch, number
):
    def replace(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "replace", replace)
    code = main(arguments(photos, bundle_uri, tmp_path / "out"))
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, str(tmp_path / "out"), "another")


def test_a_folder_for_temporary_files_that_is_full_is_one_line(photos, bundle_uri, tmp_path):
    with mounted(tmp_path / "disk", "size=1m"):
        (tmp_path / "disk" / "somebody else's").write_bytes(bytes(2**20 - 3 * 4096))
        given = arguments(photos, bundle_uri, tmp_path / "out", "spark.mode=local")  # Sail needs less there
        answer = run_unprivileged(*given, TMPDIR=str(tmp_path / "disk"))
    assert_one_line(answer.returncode, answer.stdout, answer.stderr, "disk is full", "TMPDIR")


def test_a_folder_for_temporary_files_that_is_missing_is_no_matter(photos, bundle_uri, tmp_path):
    answer = run_unprivileged(*arguments(photos, bundle_uri, tmp_path / "out"), TMPDIR=str(tmp_path / "nowhere"))
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    "setting",
    [
        "pictures=100000000000000000000", "pictures=1e20", "partitioning.target_seconds=1.0e+308",
        "partitioning.target_seconds=.inf", "partitioning.image_seconds=1.0e-320", "partitioning.gflops=.nan",
        "partitioning.target_bytes=100000000000000000000", "ingest.max_pixels=100000000000000000000",
        "inference.threads=100000000000000000000", "inference.memory_megabytes=100000000000000000000",
        "inference.max_batch=100000000000000000000", "video.every=100000000000000000000",
    ],
)  # fmt: skip
def test_a_setting_beyond_all_bounds_is_one_line(photos, bundle_uri, tmp_path, capsys, setting):
    code = main(arguments(photos, bundle_uri, tmp_path / "out", setting))
    answer = capsys.readouterr()
    assert_one_line(code, answer.out, answer.err, setting.partition("=")[0])
