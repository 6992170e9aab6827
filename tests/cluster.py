"""The command line as a user calls it, and runs of it to disturb; `studies.cluster` has the cluster for them."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from helpers.cli import main
from helpers.java import local_options
from helpers.session import DAEMON
from studies.cluster import PATIENCE, Process, arguments_of, wait_for

# What pyspark's own daemon prints in local mode when Spark closes the pipe of a task because another one has failed.
DAEMONS_OWN = re.compile(r"Traceback .*\n  File .*/pyspark/daemon\.py.*\n(?:  .*\n)*\w+Error(?:: .*)?\n")


def without_privileges() -> list[str]:
    """Root reads everything; a command before the command takes that away, so that permissions count."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("root reads every file, and there is no setpriv here to give that up")
    less = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={less}", f"--inh-caps={less}", "--"]


def python_workers(process: psutil.Process) -> list[psutil.Process]:
    """The processes below a JVM in which tasks run: children of the daemon that forks them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = process.children(recursive=True)
        daemons = {
            p.pid
            for p in tree
            if {"pyspark.daemon", DAEMON} & set(arguments_of(p)) and arguments_of(p.parent()) != arguments_of(p)
        }
        return [p for p in tree if p.ppid() in daemons]
    return []


@dataclass
class Run:
    """`python -m helpers run` in a process of its own."""

    output: Path
    process: Process

    def staged(self) -> set[Path]:
        """What its tasks have finished so far."""
        return set(self.output.glob("_staging/*/*.parquet"))

    def wait_until_staged(self, files: int) -> None:
        """Wait until the run is in the middle of its work."""

        def look() -> bool:
            assert self.process.popen.poll() is None, f"the run ended before its middle:\n{self.process.errors}"
            return len(self.staged()) >= files

        wait_for(f"{files} finished tasks", look)

    def finish(self) -> "Finished":
        try:
            code = self.process.popen.wait(PATIENCE)
        finally:
            self.process.kill()
        return Finished(self.output, code, self.process.answer, self.process.errors)


@dataclass(frozen=True)
class Finished:
    """What a run left."""

    output: Path
    code: int
    answer: str
    errors: str

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code in (0, 1), self.errors
        return json.loads(self.answer.splitlines()[-1])

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.output)

    def assert_one_clear_error(self, *parts: str) -> None:
        """Exit code 2, and one line that a user understands instead of a stack trace."""
        assert self.code == 2, self.errors
        assert self.answer == ""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and self.errors.rstrip().endswith(lines[0]), self.errors
        ours = DAEMONS_OWN.sub("", self.errors)
        assert "Traceback" not in ours and "\tat " not in ours, self.errors
        for part in parts:
            assert part in lines[0]


def start_run(
    source: Path,
    model: str,
    output: Path,
    log: Path,
    *settings: str,
    profile: str = "local",
    before: Sequence[str] = (),
) -> Run:
    """Start the command line as a user does, perhaps by another command that stands before it."""
    options = [part for setting in settings for part in ("--set", setting)]
    command = [*before, sys.executable, "-m", "helpers", "run", "--profile", profile, *options]
    command += ["--source", str(source), "--model", model, "--output", str(output)]
    # The JVM of a cluster's driver is the tests' own to set up. One that is all of Spark has these options already, and
    # with the variable it would be started by Spark's launcher, a JVM more.
    return Run(output, Process(command, log, {"SPARK_SUBMIT_OPTS": local_options()} if profile == "cluster" else {}))


def call(*arguments: object) -> subprocess.CompletedProcess:
    """The command line in this process, which costs no imports; the log goes to this process's own."""
    answer, errors = io.StringIO(), io.StringIO()
    words = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(answer), contextlib.redirect_stderr(errors):
        code = main(words)
    return subprocess.CompletedProcess(words, code, answer.getvalue(), errors.getvalue())


def read_results(output: str | Path, version: int | None = None) -> pa.Table:
    """The results as any reader of the table sees them."""
    return DeltaTable(Path(output, "results").as_uri(), version).to_pyarrow_dataset().to_table()


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The results as any reader of the table sees them, by path; no path twice."""
    rows = read_results(output).sort_by("path").to_pylist()
    paths = [row["path"] for row in rows]
    assert len(paths) == len(set(paths)), "an image is twice in the results"
    return rows


def staged_rows(output: Path) -> pa.Table:
    """What tasks have finished and nobody has published yet."""
    files = sorted(output.glob("_staging/*/*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


@contextlib.contextmanager
def stopped(process: subprocess.Popen) -> Iterator[None]:
    """Hold a process still for the length of a block."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
