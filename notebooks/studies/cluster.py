"""A standalone Spark cluster of one-core workers on this machine, for measurements and trials.

Master and workers are separate processes, as on real machines. Each starts in its own session (`setsid`), which its
children never leave, whoever adopts them. So the session's id finds and ends all that a killed process leaves, and
nothing else.
"""

import contextlib
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import pyspark

from helpers.config import PROJECT
from helpers.errors import HostError
from helpers.java import OPTIONS, check_java, class_path, find_java, local_options

log = logging.getLogger(__name__)

T = TypeVar("T")

SPARK_HOME = Path(pyspark.__file__).parent
LOOPBACK = "127.0.0.1"
PATIENCE = 300.0  # seconds until a process without the awaited sign counts as hung
POLL = 0.02
PERIOD = 0.04  # seconds in which a slowed process runs once and stands once; a task should last many


@dataclass
class Process:
    """A command in a session of its own, its output in files: `NAME.log` for errors, `NAME.out` for answers."""

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
        """What it has written to standard error so far."""
        return self.log.read_text(errors="replace")

    @property
    def answer(self) -> str:
        """What it has written to standard output so far."""
        return self.log.with_suffix(".out").read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Every process of the session that still runs, the first one's orphans included."""
        session = [process for process in psutil.process_iter() if _session(process.pid) == self.popen.pid]
        return [process for process in session if _runs(process)]

    def kill(self) -> None:
        """End the session as the kernel's out-of-memory killer does, without a chance to tidy up."""
        while members := self.members():
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(members, timeout=10)
        self.popen.wait()


@dataclass
class Cluster:
    """A master and workers of one core and 1 GiB each; logs and the workers' files stay in the folder.

    With an `environment`, the processes have its variables and no others of this one's. With `pinned`, each worker and
    its children stay on one of this machine's cores. A core is only a number to Spark, and a task that decodes while
    it infers would take part of another core.

    Raises:
        HostError: there is no usable Java, or a process does not come up.
    """

    folder: Path
    environment: dict[str, str] | None = None
    pinned: bool = False
    workers: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_java()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = 0
        self.master = self._start("master.Master", "master")
        try:
            self.url = wait_for("the master's address", self._address)
        except BaseException:
            self.master.kill()
            raise

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a session in this cluster, as `load_config(**settings)` takes them."""
        conf = {"driver.host": LOOPBACK, "executor.memory": "512m", "executor.extraJavaOptions": local_options()}
        return {"spark.master": self.url, **{f"spark.conf.spark.{key}": value for key, value in conf.items()}}

    @property
    def assignments(self) -> list[str]:
        """The same settings, as `--set` takes them."""
        return [f"{key}={value}" for key, value in self.settings.items()]

    def complete(self, workers: int = 2) -> None:
        """Start workers in place of killed ones, until so many are registered."""
        self.workers = [worker for worker in self.workers if worker.popen.poll() is None]
        while len(self.workers) < workers:
            place = str(self.folder / f"work{self.started + 1}")
            options = ["--cores", "1", "--memory", "1g", "--work-dir", place, self.url]
            with held_to([self.started]) if self.pinned else contextlib.nullcontext():
                self.workers.append(self._start("worker.Worker", f"worker{self.started + 1}", *options))
            self.started += 1
        wait_for("the workers", lambda: self._alive(self.master).count("Registering worker") >= self.started)

    def executors(self) -> list[psutil.Process]:
        """The executors' JVMs."""
        processes = [process for worker in self.workers for process in worker.members()]
        return [p for p in processes if any("CoarseGrainedExecutorBackend" in part for part in arguments_of(p))]

    def launched(self) -> int:
        """How many executors the master has started so far."""
        return self.master.errors.count("Launching executor")

    def executor_logs(self) -> str:
        """What the executors have written to standard error."""
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("work*/app-*/*/stderr"))

    def stop(self) -> None:
        """End all processes."""
        for process in (*self.workers, self.master):
            process.kill()

    def _start(self, kind: str, name: str, *options: str) -> Process:
        # As `spark-class` does, without its two scripts and the JVM that puts the command together. Several JVMs share
        # this machine, each for seconds, so a second compilation of code does not pay.
        java = [find_java() or "java", "-cp", class_path(SPARK_HOME), "-Xmx256m", *shlex.split(local_options())]
        command = [*java, *OPTIONS, f"org.apache.spark.deploy.{kind}"]
        return Process(
            [*command, "--host", LOOPBACK, "--port", "0", "--webui-port", "0", *options],
            self.folder / f"{name}.log",
            {
                "SPARK_HOME": str(SPARK_HOME),
                "SPARK_SCALA_VERSION": "2.13",  # of all Sparks from 4.0 on; a worker asks for it
                "PYSPARK_PYTHON": sys.executable,
                "SPARK_LOCAL_DIRS": str(self.folder / "local"),
                **(self.environment or {}),
            },
            inherits=self.environment is None,
        )

    def _address(self) -> str:
        address = re.search(r"spark://[\d.]+:\d+", self._alive(self.master))
        return address[0] if address else ""

    def _alive(self, process: Process) -> str:
        if process.popen.poll() is not None:
            raise HostError(f"a process of the cluster did not come up; see {process.log}:\n{process.errors[-2000:]}")
        return process.errors


@contextlib.contextmanager
def standalone(folder: str | Path, workers: int = 2) -> Iterator[Cluster]:
    """A cluster of pinned workers, which ends with the block; arguments and errors as for `Cluster`."""
    cluster = Cluster(Path(folder), pinned=True)
    try:
        cluster.complete(workers)
        yield cluster
    finally:
        cluster.stop()


@contextlib.contextmanager
def slowed(worker: psutil.Process, share: float) -> Iterator[None]:
    """Let a worker's Python processes run only a share of the time, as on a slower machine, for a block.

    Signals stop and continue them, as `cpulimit` does. The JVM runs on, or it would count as dead.
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
        log.warning("this system holds no process to a core: a single-core run may take more")
        yield
        return
    before = os.sched_getaffinity(0)
    usable = sorted(before)
    os.sched_setaffinity(0, {usable[core % len(usable)] for core in cores})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def wait_for(what: str, look: Callable[[], T], patience: float = PATIENCE) -> T:
    """Poll until the answer is true, and return it.

    Raises:
        TimeoutError: it was not within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {patience:.0f} s for {what}")
        time.sleep(POLL)
    return answer


def arguments_of(process: psutil.Process | None) -> list[str]:
    """A process's command line; empty where it has ended meanwhile."""
    try:
        return process.cmdline() if process else []
    except psutil.Error:
        return []


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


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
    """The processes in which tasks run: all below a worker that are no JVM."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in worker.children(recursive=True) if "python" in p.name()]
    return []


def _signal(members: list[psutil.Process], name: str) -> None:
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            getattr(member, name)()
