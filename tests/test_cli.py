import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import call

from helpers.bundle.manifest import load_bundle
from helpers.storage import open_storage

KEYS = ["images", "ok", "failed", "skipped", "partitions", "seconds", "images_per_second", "results"]  # the contract


def helpers(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """`python -m helpers ...` as a user calls it, from anywhere."""
    return subprocess.run(
        [sys.executable, "-m", "helpers", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run(samples: Path, bundle: str, output: str, cwd: Path, *settings: str) -> subprocess.CompletedProcess:
    options = [part for setting in ("spark.master=local[2]", *settings) for part in ("--set", setting)]
    source = os.path.relpath(samples, cwd)
    return helpers("run", "--source", source, "--model", bundle, "--output", output, *options, cwd=cwd)


def assert_mistake(answer: subprocess.CompletedProcess, *parts: str) -> None:
    assert answer.returncode == 2
    assert answer.stdout == ""
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and answer.stderr.rstrip().endswith(errors[0])
    assert "Traceback" not in answer.stderr and "\tat " not in answer.stderr
    for part in parts:
        assert part in errors[0]


@pytest.fixture(scope="module")
def first(samples, bundle_uri, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    cwd = tmp_path_factory.mktemp("elsewhere")
    return run(samples, bundle_uri, "found/here", cwd, "pictures=5"), cwd


def test_run_ends_with_the_contracts_summary(first):
    answer, cwd = first
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout.splitlines()[-1])
    assert list(summary) == KEYS
    assert [summary[key] for key in KEYS[:5]] == [64, 60, 4, 0, 2]
    assert summary["seconds"] > 0 and summary["images_per_second"] > 0
    assert summary["results"] == str(cwd / "found" / "here" / "results")
    assert pq.read_table(summary["results"]).num_rows == 64
    assert len(list((cwd / "found" / "here" / "pictures").iterdir())) == 5


def test_run_tells_the_reasons_of_failures_and_draws_no_bar_into_a_log(first):
    answer, _ = first
    assert "the file is empty" in answer.stderr
    assert "\r" not in answer.stderr and "images/s]" not in answer.stderr
    assert "\tat " not in answer.stderr and not re.search(r"^\d\d:\d\d:\d\d (WARN|ERROR)", answer.stderr, re.MULTILINE)


def test_run_again_from_another_folder_resumes(first, samples, bundle_uri, tmp_path):
    _, cwd = first
    answer = run(samples, bundle_uri, str(cwd / "found" / "here"), tmp_path)
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout.splitlines()[-1])
    assert [summary[key] for key in KEYS[:5]] == [64, 0, 0, 64, 0]
    assert pq.read_table(summary["results"]).num_rows == 64


def test_run_with_too_many_failures_exits_1_with_the_reasons_and_keeps_the_results(samples, bundle_uri, tmp_path):
    answer = run(samples, bundle_uri, "out", tmp_path, "max_failed_share=0.01", "pictures=0")
    assert answer.returncode == 1
    assert "4 of 64 images failed" in answer.stderr and "max_failed_share=0.01" in answer.stderr
    assert "the file is empty" in answer.stderr and "not an image" in answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1])["failed"] == 4
    assert pq.read_table(tmp_path / "out" / "results").num_rows == 64
    assert not (tmp_path / "out" / "pictures").exists()


WRONG_SETTINGS = {
    "spark.mastr=local[1]": ("spark.mastr", "spark.master"),
    "pictures=many": ("pictures", "integer"),
    "pictures": ("KEY=VALUE",),
    "spark.app_name=[": ("spark.app_name",),
    "profile=cluster": ("profile",),
}


@pytest.mark.parametrize("setting", WRONG_SETTINGS)
def test_a_wrong_setting_is_one_line_and_exit_2(samples, bundle_uri, tmp_path, setting):
    answer = run(samples, bundle_uri, "out", tmp_path, setting)
    assert_mistake(answer, *WRONG_SETTINGS[setting])
    assert answer.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_profile_is_one_line_and_exit_2(tmp_path):
    answer = helpers("doctor", "--profile", "laptop", cwd=tmp_path)
    assert_mistake(answer, "laptop", "local")


def test_a_missing_bundle_is_one_line_and_exit_2(samples, tmp_path):
    assert_mistake(run(samples, "no/bundle", "out", tmp_path), str(tmp_path / "no" / "bundle"), "helpers export")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_source_is_one_line_and_exit_2(bundle_uri, tmp_path):
    assert_mistake(run(tmp_path / "photos", bundle_uri, "out", tmp_path), str(tmp_path / "photos"), "no such folder")


def test_a_missing_argument_is_exit_2_with_the_usage(tmp_path):
    answer = helpers("run", "--source", "x", cwd=tmp_path)
    assert answer.returncode == 2 and "--model" in answer.stderr and "usage" in answer.stderr


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_export_makes_a_bundle(checkpoint, samples, tmp_path, monkeypatch, precision):
    monkeypatch.chdir(tmp_path)
    calibration = ("--calibration", samples) if precision == "int8" else ()
    options = ("--checkpoint", checkpoint, "--output", "models/mine", "--precision", precision, *calibration)
    answer = call("export", "--architecture", "fashion_cnn", *options)
    assert answer.returncode == 0, answer.stderr
    summary = json.loads(answer.stdout.splitlines()[-1])
    assert summary["bundle"] == str(tmp_path / "models" / "mine")
    bundle = load_bundle(open_storage(summary["bundle"]))
    assert bundle.manifest.precision == precision and bundle.manifest.model == summary["model"]
    assert all(bundle.read(name) for name in ("model.xml", "model.bin"))


def test_export_leaves_the_onnx_graph_of_an_older_opset(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--checkpoint", checkpoint, "--output", "mine", "--opset", "11", "--onnx", "mine.onnx")
    answer = call("export", "--architecture", "fashion_cnn", *options)
    assert answer.returncode == 0, answer.stderr
    assert onnx.load(tmp_path / "mine.onnx").opset_import[0].version == 11
    assert load_bundle(open_storage(str(tmp_path / "mine"))).manifest.outputs[0].shape == (10,)


def test_export_of_an_opset_there_is_not_is_one_line_and_exit_2(checkpoint, tmp_path):
    options = ("--checkpoint", checkpoint, "--output", tmp_path / "mine", "--opset", "5")
    assert_mistake(call("export", "--architecture", "fashion_cnn", *options), "opset 5")


def test_export_of_what_is_no_checkpoint_is_one_line_and_exit_2(samples, tmp_path):
    options = ("--checkpoint", samples / "notes.jpg", "--output", tmp_path / "out")
    assert_mistake(call("export", "--architecture", "fashion_cnn", *options), "notes.jpg")
    assert list(tmp_path.iterdir()) == []


def test_train_runs_a_program_with_its_own_arguments_and_prints_what_rank_0_says(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\nprint(json.dumps({'ranks': os.environ['WORLD_SIZE'], 'rest': sys.argv[1:]}))\n"
    )
    options = ["--set", "spark.master=local[2]", "--processes", "1"]
    answer = helpers("train", *options, str(program), "--epochs", "3", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == {"ranks": "1", "rest": ["--epochs", "3"]}


def test_doctor_finds_this_host_in_order(fashion_mnist_root, tmp_path):
    answer = helpers("doctor", cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    lines = answer.stdout.splitlines()
    for part in ("python", "packages", "java", "spark", "openvino", "data", "storage"):
        assert any(line.split()[:2] == ["ok", part] for line in lines), part


def test_doctor_without_java_exits_1_with_the_remedy_and_goes_on(tmp_path):
    answer = helpers("doctor", cwd=tmp_path, JAVA_HOME=str(tmp_path / "nowhere"))
    assert answer.returncode == 1
    (missing,) = [line for line in answer.stdout.splitlines() if line.startswith("missing")]
    assert missing.split()[1] == "java" and "nowhere" in missing and "apt-get install openjdk-17" in missing
    assert any(line.split()[:2] == ["ok", "openvino"] for line in answer.stdout.splitlines())


def test_a_run_without_java_is_sails_and_one_line_and_exit_2_where_spark_is_asked_for(samples, bundle_uri, tmp_path):
    options = ("--source", samples, "--model", bundle_uri, "--output", "out")
    answer = helpers("run", *options, cwd=tmp_path, JAVA_HOME=str(tmp_path / "nowhere"))
    assert answer.returncode == 0, answer.stderr
    asked = (*options, "--set", "spark.mode=local")
    answer = helpers("run", *asked, cwd=tmp_path, JAVA_HOME=str(tmp_path / "nowhere"))
    assert_mistake(answer, "Java 17", "apt-get install openjdk-17")


def test_doctor_looks_for_the_data_and_fetches_nothing(tmp_path):
    answer = helpers("doctor", "--set", f"paths.data={tmp_path / 'data'}", cwd=tmp_path)
    assert answer.returncode == 1 and "make setup" in answer.stdout
    assert not (tmp_path / "data").exists()


def plan(records: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess:
    return helpers("plan", "--records", records, "--images", "1000000", *options, cwd=cwd)


def test_plan_says_what_a_run_elsewhere_takes_and_draws_it(first, tmp_path):
    _, cwd = first
    options = ["--executors", "8", "--cores", "4", "--speed", "1,0.5", "--price", "0.5", "--plot", "curve.png"]
    answer = plan(cwd / "found" / "here", tmp_path, *options)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("1,000,000 images on 8 executors of 4 cores: ")
    summary = json.loads(lines[-1])
    assert f"--set partitioning.partitions={summary['partitions']}" in answer.stdout
    assert summary["cost"] == pytest.approx(0.5 * 8 * summary["seconds"] / 3600, abs=1e-3)
    parts = [value for name, value in summary.items() if name.endswith("_seconds") and name != "pass_seconds"]
    assert sum(parts) == pytest.approx(summary["seconds"], abs=0.01)
    table = [line.split() for line in lines if re.match(r" *\d+ +\d+ ", line)]
    assert [int(row[0]) for row in table] == [1, 2, 3, 4, 6, 8, 11, 16]
    assert cv2.imread(str(tmp_path / "curve.png")) is not None


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--executors", "0"], ["no such cluster", "at least 1"]),
        (["--executors", "2", "--speed", "0"], ["speeds must be positive"]),
        (["--executors", "2", "--failure-rate", "1"], ["--failure-rate"]),
    ],
)
def test_plan_explains_what_cannot_be(first, tmp_path, options, parts):
    _, cwd = first
    assert_mistake(plan(cwd / "found" / "here", tmp_path, *options), *parts)


def test_plan_warns_of_records_of_tasks_that_had_to_wait_for_a_processor(first, tmp_path):
    _, cwd = first
    folder = shutil.copytree(cwd / "found" / "here" / "runs", tmp_path / "loaded" / "runs")
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        for name in ("cpu_seconds", "thread_seconds"):
            table = table.set_column(table.column_names.index(name), name, pa.array([0.0] * len(table)))
        pq.write_table(table, path)
    answer = plan(tmp_path / "loaded", tmp_path, "--executors", "2")
    assert answer.returncode == 0 and json.loads(answer.stdout.splitlines()[-1])["images"] == 1_000_000
    assert "computed in only 0 % of their time" in answer.stderr


def test_plan_without_records_says_where_they_come_from(tmp_path):
    assert_mistake(plan(tmp_path, tmp_path, "--executors", "2"), "no records of runs", "--output of a run")
