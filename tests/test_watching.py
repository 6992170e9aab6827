"""What watches scheduled runs: the log as JSON, the hook, numbers for Prometheus, and the warning of drift."""

import http.server
import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from helpers import pipeline
from helpers.config import load_config
from helpers.errors import ConfigError, UserError
from helpers.pipeline.drift import CLASSES, OTHERS, Distribution, Distributions, distance
from helpers.pipeline.results import ResultStore
from helpers.pipeline.schemas import RESULT_SCHEMA
from helpers.storage import open_storage
from helpers.tracking.watching import call_hook, write_prometheus

SECRET = "a-token-in-a-path"


class Hook(http.server.BaseHTTPRequestHandler):
    """Keeps what it gets; refuses it below /refused."""

    got: list[tuple[str, str, Any]]

    def do_POST(self):  # noqa: N802 - the library's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.got.append((self.path, self.headers["Content-Type"], body))
        self.send_response(500 if self.path.startswith("/refused") else 200)
        self.end_headers()

    def log_message(self, *_):
        return


@pytest.fixture
def hook() -> Iterator[tuple[str, list]]:
    handler = type("Handler", (Hook,), {"got": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.got
        server.shutdown()


def results(labels: list[str], scores: list[float], model: str = "m") -> pa.Table:
    """One image a prediction, and one that failed."""
    rows = [
        {"path": str(n), "model": model, "predictions": [{"label": label, "score": score}]}
        for n, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    return pa.Table.from_pylist([*rows, {"path": "x", "model": model, "error": "bad"}], RESULT_SCHEMA)


def test_predictions_are_counted_by_model_class_and_score():
    counts = Distributions()
    counts.add(pa.concat_tables([results(["a", "a", "b"], [0.05, 0.95, 1.0]), results(["c"], [0.5], "other")]))
    counts.add(results(["b"], [0.41]))
    assert counts["m"].classes == {"a": 2, "b": 2} and counts["m"].scores == [1, 0, 0, 0, 1, 0, 0, 0, 0, 2]
    assert counts["other"].classes == {"c": 1}
    assert Distributions().merge([counts.to_json(), counts.to_json()])["m"].classes == {"a": 4, "b": 4}


def test_rows_without_predictions_count_nothing():
    rows = [
        {"path": "a", "model": "m", "embedding": [1.0], "predictions": []},
        {"path": "b", "model": "m", "error": "bad"},
    ]
    counts = Distributions()
    counts.add(pa.Table.from_pylist(rows, RESULT_SCHEMA))
    assert counts["m"] == Distribution() and counts.distances(counts) == {"m": {"classes": 0.0, "scores": 0.0}}


def test_a_prediction_without_a_score_or_a_label_stops_nothing():
    counts = Distributions()
    counts.add(pa.Table.from_pylist([{"path": "a", "model": "m", "predictions": [{}, {"score": 2.0}]}], RESULT_SCHEMA))
    assert counts["m"].classes == {"": 2} and sum(counts["m"].scores) == counts["m"].scores[-1] == 1


def test_what_a_commit_tells_is_bounded():
    counts = Distributions(m=Distribution(Counter({f"class {n}": n + 1 for n in range(5000)})))
    text = counts.to_json()
    again = Distributions().merge([text])["m"].classes
    assert len(text) < 5000 and len(again) == CLASSES + 1
    assert again.total() == counts["m"].classes.total() and again["class 4999"] == 5000 and again[OTHERS] > 0
    assert counts.distances(Distributions().merge([text]))["m"]["classes"] < 0.01


def test_the_distance_is_that_of_jensen_and_shannon():
    from scipy.spatial.distance import jensenshannon

    one, other = np.array([500_000, 300_000, 200_000, 0]), np.array([200_000, 300_000, 400_000, 100_000])
    found = distance(dict(enumerate(one)), dict(enumerate(other)))
    assert found == pytest.approx(jensenshannon(one, other, 2), abs=1e-4)
    assert distance({"a": 10**6}, {"b": 10**6}) == pytest.approx(1, abs=1e-4)
    assert distance({"a": 5}, {}) == 0


def test_chance_alone_is_no_distance_and_a_shift_is_one():
    draws, shares = np.random.default_rng(0), np.array([0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    before = dict(enumerate(draws.multinomial(100_000, shares)))
    alike = [distance(dict(enumerate(draws.multinomial(n, shares))), before) for n in (20, 60, 500) for _ in range(200)]
    assert np.mean(np.array(alike) > 0.1) < 0.02
    shifted = [distance(dict(enumerate(draws.multinomial(200, shares[::-1]))), before) for _ in range(100)]
    assert min(shifted) > 0.3


def test_a_hook_gets_the_summary(hook, tmp_path):
    url, got = hook
    call_hook(f"{url}/run", '{"ok": 60}')
    assert got == [("/run", "application/json", {"ok": 60})]
    file = tmp_path / "a summary.json"
    call_hook(
        f"{sys.executable} -c 'import sys; open(sys.argv[1], \"w\").write(sys.stdin.read())' '{file}'", '{"ok": 61}'
    )
    assert json.loads(file.read_text()) == {"ok": 61}


def test_the_url_of_a_hook_may_be_a_secret_that_nobody_sees(hook, monkeypatch):
    url, got = hook
    monkeypatch.setenv("HOOK_URL", f"{url}/refused/{SECRET}")
    with pytest.raises(UserError, match="500") as raised:
        call_hook("env:HOOK_URL", "{}")
    assert got[0][0] == f"/refused/{SECRET}" and SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "target, words",
    [
        ("http://127.0.0.1:1/", "refused"),
        ("no-such-command --now", "No such file"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "exit status 3"),
        ("'unbalanced", "quotation"),
        ("env:NO_SUCH_HOOK", "NO_SUCH_HOOK"),
    ],
)
def test_a_hook_that_fails_says_why(target, words):
    with pytest.raises(UserError, match=words):
        call_hook(target, "{}")


def test_prometheus_reads_the_numbers(tmp_path):
    write_prometheus(str(tmp_path / "run.prom"), {"ok": 60, "seconds": 1.5, "nan": math.nan}, {"results": 'a "b"\\\n'})
    assert (tmp_path / "run.prom").read_text() == (
        "# TYPE spark_vision_ok gauge\n"
        'spark_vision_ok{results="a \\"b\\"\\\\\\n"} 60\n'
        "# TYPE spark_vision_seconds gauge\n"
        'spark_vision_seconds{results="a \\"b\\"\\\\\\n"} 1.5\n'
    )


def test_a_file_that_no_collector_takes_is_refused():
    with pytest.raises(ConfigError, match="tracking.prometheus"):
        load_config("local", **{"tracking.prometheus": "run.txt"})


@pytest.fixture(scope="module")
def watched(samples, bundle_uri, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """A run by the command line with a log of JSON, a hook that is a command, and a file for Prometheus."""
    folder = tmp_path_factory.mktemp("watched")
    command = ["run", "--log-format", "json", "--source", str(samples), "--model", bundle_uri]
    command += ["--output", str(folder / "out"), "--set", "spark.master=local[1]"]
    command += ["--set", f"tracking.prometheus={folder / 'run.prom'}"]
    script = "import sys; open('hook.json', 'w').write(sys.stdin.read())"
    environment = {**os.environ, "HELPERS_TRACKING__HOOK": json.dumps(f'{sys.executable} -c "{script}"')}
    answer = subprocess.run(
        [sys.executable, "-m", "helpers", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer, folder


def test_each_line_of_the_log_is_json(watched):
    lines = [line for line in watched[0].stderr.splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    assert all(set(record) == {"time", "level", "logger", "message"} for record in records)
    assert any(
        record["level"] == "INFO" and "64 images, 0 of them done already" in record["message"] for record in records
    )
    assert sum("images: " in record["message"] and record["logger"] == "helpers.cli" for record in records) > 0


def test_an_error_is_a_line_of_json_too(tmp_path):
    command = [sys.executable, "-m", "helpers", "run", "--log-format", "json", "--source", str(tmp_path / "none")]
    answer = subprocess.run(
        [*command, "--model", "nowhere", "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    (record,) = map(json.loads, answer.stderr.splitlines())
    assert answer.returncode == 2 and record["level"] == "ERROR" and "no model bundle at" in record["message"]


def test_the_hook_and_prometheus_have_the_runs_numbers(watched):
    answer, folder = watched
    summary = json.loads(answer.stdout)
    assert json.loads((folder / "hook.json").read_text()) == summary
    lines = [line for line in (folder / "run.prom").read_text().splitlines() if not line.startswith("#")]
    numbers = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert (numbers["spark_vision_images"], numbers["spark_vision_failed"]) == (64, 4)
    assert numbers["spark_vision_seconds"] == summary["seconds"] and numbers["spark_vision_stage_infer_seconds"] > 0
    assert f'results="{summary["results"]}"' in lines[0] and "fashion_cnn-fp32@" in lines[0]


def test_a_run_warns_where_its_predictions_part_from_earlier_ones(spark, samples, bundle_uri, tmp_path, caplog):
    """And what fails of the watching is a warning."""
    settings = {"spark.master": "local[2]", "tracking.hook": "http://127.0.0.1:1/"}
    config = load_config("local", **settings)
    source, output = tmp_path / "images", str(tmp_path / "out")
    source.mkdir()
    good = sorted(path for path in samples.rglob("*") if path.suffix in (".png", ".jpg"))[:40]
    for number, path in enumerate(good):
        (source / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    pipeline.run(spark, str(source), bundle_uri, output, config)
    pipeline.run(spark, str(source), bundle_uri, output, config.model_copy(update={"resume": False}))
    assert "distributed otherwise" not in caplog.text and "the end-of-run hook failed" in caplog.text
    store = ResultStore(open_storage(output))
    first, second = (json.loads(text) for text in store.told("distribution"))
    (model,) = first
    assert first == second and sum(first[model]["classes"].values()) == sum(first[model]["scores"]) > 40
    black = np.zeros((28, 28), np.uint8)
    for number in range(40):  # a camera that has failed
        (source / f"black{number}.png").write_bytes(png(black))
    with caplog.at_level(logging.WARNING):
        pipeline.run(spark, str(source), bundle_uri, output, config)
    warnings = [record.getMessage() for record in caplog.records if "distributed otherwise" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith(f"the classes that {model} finds are distributed otherwise")


def png(pixels: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode(".png", pixels)[1].tobytes()
