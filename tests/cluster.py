"""Processes as a user has them: a Spark standalone cluster on loopback, and runs of the command line to disturb.

Every process is started in a session of its own (`setsid`), which its children stay in whoever adopts them; so what a
killed process leaves is found and ended by that session's id, and nothing else ever is.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pyspark
import pytest

from helpers.config import PROJECT
from helpers.hosts.java import local_options

T = TypeVar("T")

SPARK_HOME = Path(pyspark.__file__).parent
LOOPBACK = "127.0.0.1"
# Six JVMs share this machine, each for seconds: code is not worth compiling twice, nor classes reading from jars.
SHORT_LIVED = local_options()
# What pyspark's own daemon prints in local mode when Spark closes the pipe of a task because another one has failed.
DAEMONS_OWN = re.compile(r"Traceback .*\n  File .*/pyspark/daemon\.py.*\n(?:  .*\n)*\w+Error(?:: .*)?\n")
PATIENCE = 300.0  # seconds until a process that shows no sign of what is waited for is taken for hung
POLL = 0.02


def wait_for(what: str, look: Callable[[], T], patience: float = PATIENCE) -> T:
    """Poll until the answer is true, and return it."""
    deadline = time.monotonic() + patience
    while not (answer := look()):
        assert time.monotonic() < deadline, f"waited {patience:.0f} s for {what}"
        time.sleep(POLL)
    return answer


@dataclass
class Process:
    """A command in a session of its own, its output in files."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    inherits: bool = True  # this process's environment variables too
    popen: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        with self.log.open("wb") as errors, self.log.with_suffix(".out").open("wb") as answers:
            self.popen = subprocess.Popen(
                self.command,
                cwd=PROJECT,
                env={**(os.environ if self.inherits else {}), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=answers,
                stderr=errors,
                start_new_session=True,
            )

    @property
    def errors(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def answer(self) -> str:
        return self.log.with_suffix(".out").read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Every process of the session that still runs, the first one's orphans included."""
        found = [process for process in psutil.process_iter() if _session(process.pid) == self.popen.pid]
        return [process for process in found if _runs(process)]

    def kill(self) -> None:
        """End the session as the kernel's out-of-memory killer does, without a chance to tidy up."""
        while members := self.members():
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(members, timeout=10)
        self.popen.wait()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


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
        daemons = {p.pid for p in tree if "pyspark.daemon" in _arguments(p) and _arguments(p.parent()) != _arguments(p)}
        return [p for p in tree if p.ppid() in daemons]
    return []


def _arguments(process: psutil.Process | None) -> list[str]:
    try:
        return process.cmdline() if process else []
    except psutil.Error:
        return []


@dataclass
class Cluster:
    """A master and workers of one core each, each a process; logs stay in the folder.

    With an `environment`, the processes have its variables and no others of this one's.
    """

    folder: Path
    environment: dict[str, str] | None = None
    workers: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = 0
        self.master = self._start("master.Master", "master")
        found = wait_for("the master's address", lambda: re.search(r"spark://[\d.]+:\d+", self._alive(self.master)))
        self.url = found[0]

    def complete(self, workers: int = 2) -> None:
        """Start workers until so many are registered, in place of those that were killed."""
        self.workers = [worker for worker in self.workers if worker.popen.poll() is None]
        while len(self.workers) < workers:
            self.started += 1
            folder = str(self.folder / f"work{self.started}")
            options = ["--cores", "1", "--memory", "1g", "--work-dir", folder, self.url]
            self.workers.append(self._start("worker.Worker", f"worker{self.started}", *options))
        registered = "Registering worker"
        wait_for("the workers", lambda: self._alive(self.master).count(registered) >= self.started)

    def executors(self) -> list[psutil.Process]:
        """The executors' JVMs."""
        processes = [process for worker in self.workers for process in worker.members()]
        return [p for p in processes if any("CoarseGrainedExecutorBackend" in part for part in _arguments(p))]

    def launched(self) -> int:
        """How many executors the master has started so far."""
        return self.master.errors.count("Launching executor")

    def executor_logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("work*/app-*/*/stderr"))

    def settings(self) -> list[str]:
        """What a run in this cluster needs to be told."""
        conf = {
            "driver.host": LOOPBACK,
            "executor.memory": "512m",
            "executor.extraJavaOptions": SHORT_LIVED,
        }
        return [f"spark.master={self.url}", *(f"spark.conf.spark.{key}={value}" for key, value in conf.items())]

    def stop(self) -> None:
        for process in (*self.workers, self.master):
            process.kill()

    def _start(self, kind: str, name: str, *options: str) -> Process:
        command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{kind}"]
        return Process(
            [*command, "--host", LOOPBACK, "--port", "0", "--webui-port", "0", *options],
            self.folder / f"{name}.log",
            {
                "SPARK_HOME": str(SPARK_HOME),
                "PYSPARK_PYTHON": sys.executable,
                "SPARK_LOCAL_DIRS": str(self.folder / "local"),
                "SPARK_DAEMON_MEMORY": "256m",
                "SPARK_DAEMON_JAVA_OPTS": SHORT_LIVED,
                **(self.environment or {}),
            },
            inherits=self.environment is None,
        )

    def _alive(self, process: Process) -> str:
        assert process.popen.poll() is None, f"{process.log} ended:\n{process.errors}"
        return process.errors


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
    return Run(output, Process(command, log, {"SPARK_SUBMIT_OPTS": SHORT_LIVED}))


def read_rows(output: Path) -> list[dict[str, Any]]:
    """The results as any reader of the folder sees them, by path; no path twice."""
    rows = pq.read_table(output / "results").sort_by("path").to_pylist()
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
