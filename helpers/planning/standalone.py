"""A standalone Spark cluster on this machine, of as many one-core workers as asked, to measure and to try things on.

Master and workers are processes of their own, as on real machines; all of them end with the block. Each worker is held
to one of this machine's cores with all that it starts: to Spark a core is only a number, and a task that decodes while
it infers would take part of another.
"""

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from helpers.errors import HostError
from helpers.hosts.java import check_java, local_options

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PATIENCE = 60.0  # seconds until a process that shows no sign of life is taken for dead
PERIOD = 0.04  # seconds in which a slowed process runs once and stands once; a task should last many


@dataclass(frozen=True)
class Standalone:
    """The master's address, the workers' processes, and the folder for logs and the workers' files."""

    url: str
    workers: list[psutil.Process]
    folder: Path

    @property
    def settings(self) -> dict[str, str]:
        """What a session needs to be told, as `load_config(**settings)` takes it."""
        conf = {"driver.host": LOOPBACK, "executor.memory": "512m", "executor.extraJavaOptions": local_options()}
        return {"spark.master": self.url, **{f"spark.conf.spark.{key}": value for key, value in conf.items()}}

    def add_worker(self) -> None:
        """Start one more worker of one core and 1 GiB, on a core of its own as long as there are any.

        Raises:
            HostError: it does not come up.
        """
        place = len(self.workers)
        log = self.folder / f"worker{place}.log"
        options = ["--cores", "1", "--memory", "1g", "--work-dir", str(self.folder / f"work{place}"), self.url]
        with held_to([place]):
            self.workers.append(_start("worker.Worker", log, *options))
        _wait_for("Successfully registered", log, self.workers[place])


@contextlib.contextmanager
def slowed(worker: psutil.Process, share: float) -> Iterator[None]:
    """Let a worker's Python processes run only a share of the time, as on a slower machine, for a block.

    They are stopped and continued by signals, as `cpulimit` does; the JVM is not, or it would be taken for dead.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_stop_and_go, args=(worker, share, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def held_to(cores: Sequence[int]) -> Iterator[None]:
    """Hold this thread, and all processes that it starts in the block, to some of the cores that it may use.

    Args:
        cores: their places among these, from 0; what is beyond the last begins with the first again.
    """
    if not hasattr(os, "sched_setaffinity"):
        log.warning("this system holds no process to a core: what is of one core may take more")
        yield
        return
    before = os.sched_getaffinity(0)
    usable = sorted(before)
    os.sched_setaffinity(0, {usable[core % len(usable)] for core in cores})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def standalone(folder: str | Path, workers: int = 2) -> Iterator[Standalone]:
    """Start a master and workers (`Standalone.add_worker`).

    Args:
        folder: for logs and the workers' files.
        workers: how many.

    Raises:
        HostError: there is no usable Java, or a process does not come up.
    """
    check_java()
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    master = _start("master.Master", place / "master.log")
    started: list[psutil.Process] = []
    try:
        cluster = Standalone(_wait_for(r"spark://[\d.]+:\d+", place / "master.log", master), started, place)
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        for process in (*reversed(started), master):
            _end(process)


def _start(kind: str, log: Path, *options: str) -> psutil.Process:
    import pyspark

    home = Path(pyspark.__file__).parent
    environment = {
        **os.environ,
        "SPARK_HOME": str(home),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_DIRS": str(log.parent / "local"),
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_DAEMON_JAVA_OPTS": local_options(),
    }
    command = [str(home / "bin" / "spark-class"), f"org.apache.spark.deploy.{kind}"]
    command += ["--host", LOOPBACK, "--port", "0", "--webui-port", "0", *options]
    with log.open("wb") as output:
        return psutil.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _wait_for(pattern: str, log: Path, process: psutil.Process) -> str:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        found = re.search(pattern, log.read_text(errors="replace"))
        if found:
            return found[0]
        time.sleep(0.05)
    raise HostError(f"a process of the cluster did not come up; see {log}:\n{log.read_text(errors='replace')[-500:]}")


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)


def _stop_and_go(worker: psutil.Process, share: float, ended: threading.Event) -> None:
    members: list[psutil.Process] = []
    looked = 0.0
    while not ended.is_set():
        if time.monotonic() - looked > 1:
            members, looked = _python_below(worker), time.monotonic()
        _signal(members, "suspend")
        ended.wait(PERIOD * (1 - share))
        _signal(members, "resume")
        ended.wait(PERIOD * share)


def _python_below(worker: psutil.Process) -> list[psutil.Process]:
    """The processes in which tasks run: what is below a worker and no JVM."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in worker.children(recursive=True) if "python" in p.name()]
    return []


def _signal(members: list[psutil.Process], name: str) -> None:
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(member, name)()
