"""Run an ordinary Python program in Spark tasks, as the ranks of one training.

A barrier stage starts all tasks at the same time. Each task runs the program in a process of its own, tells it its
place among the ranks as torchrun does, and gives back a row that says what came of it. So an error is a value with its
own traceback, nothing is read out of logs, and hosts need no folder in common.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from helpers.errors import ConfigError, HostError, TrainingError, first_line
from helpers.redaction import redact
from helpers.session import keep_archive, local_slots, ship_helpers, spark_failure, spark_schema, zip_files
from helpers.training import rank

if TYPE_CHECKING:
    from pyspark import BarrierTaskContext
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

# How the exchange of gradients fails in a rank whose peer is gone: it is not what went wrong.
PEER_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection refused|[Tt]imed? ?out", re.ASCII)
# How Spark names the loss of an executor, or of the Python worker in it.
TASK_LOST = re.compile(r"ExecutorLostFailure|Python worker exited unexpectedly|TaskKilled|worker lost", re.ASCII)
POLL_SECONDS = 1.0  # from one look at the other ranks, which takes Spark another second, to the next
GRACE_SECONDS = 10.0  # for the other ranks to say what they know, once one has failed
LINES, LAST_LINES = 1000, 40  # of a rank's output: kept, and shown for a failure that left no traceback
OUTCOME = pa.schema({"outcome": pa.string()})


def train_on_spark(
    spark: "SparkSession",
    program: str | Path,
    arguments: Sequence[str] = (),
    processes: int = 2,
    use_gpu: bool = False,
    attempts: int = 4,
) -> dict[str, Any] | None:
    """Run a program once in each of several Spark tasks, which train one network together.

    The program is any Python file. It runs as `__main__` with `sys.argv`, and with RANK, LOCAL_RANK, WORLD_SIZE,
    LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment. It can import `helpers`, and the modules and
    packages of its own folder. The driver shows what rank 0 prints while it runs.

    Args:
        spark: the session; all ranks run at the same time, so it needs that many free slots.
        program: the path of the file on the driver.
        arguments: of its command line; paths in them are the tasks'.
        processes: how many ranks.
        use_gpu: give each rank a GPU: LOCAL_RANK is the number of its device.
        attempts: how often to start all ranks before giving up. They are started again when one of them was lost
            (killed, or its host with it), or failed after `Checkpoints` has saved a checkpoint; what would fail in the
            same way again is not repeated.

    Returns:
        The last JSON object that rank 0 prints on a line of its own; None where it prints none.

    Raises:
        ConfigError: there is no such program, or an argument holds a secret.
        HostError: Spark has too few slots, or no GPUs to give.
        TrainingError: a rank failed, the last time; the message holds its own traceback.
    """
    path = Path(program).resolve()
    if not path.is_file():
        raise ConfigError(f"there is no program {path}: name a Python file")
    arguments = tuple(map(str, arguments))
    for place, argument in enumerate(arguments, start=1):
        if redact(argument) != argument:
            raise ConfigError(
                f"argument {place} of the program holds a secret, which Spark's plan would show: let the program read "
                "it from its environment (MLFLOW_TRACKING_PASSWORD for MLflow's server)"
            )
    _check_resources(spark, processes, use_gpu)
    ship_helpers(spark)
    task = _Task(_pack(path), path.name, arguments, use_gpu, secrets.token_hex(8), GRACE_SECONDS)
    for left in reversed(range(attempts)):
        try:
            return _attempt(spark, task, processes)
        except _AttemptError as error:
            if not left or not error.again:
                raise TrainingError(str(error)) from error.__cause__
            step = f" of step {error.step}" if error.step else ""
            log.warning("a rank was lost, going on from the newest checkpoint%s: %s", step, first_line(error))
    raise ValueError("attempts must be at least 1")


def ship_siblings(spark: "SparkSession", program: str | Path) -> None:
    """Make the modules and packages in a program's folder, and `helpers`, importable in the tasks of a session."""
    ship_helpers(spark)
    spark.addArtifacts(str(keep_archive("siblings", _pack(Path(program).resolve()))), pyfile=True)


class _AttemptError(Exception):
    """All ranks have ended without a result; `again` tells whether to start them once more."""

    def __init__(self, message: str, again: bool, step: str | None = None):
        super().__init__(message)
        self.again, self.step = again, step


def _check_resources(spark: "SparkSession", processes: int, use_gpu: bool) -> None:
    if use_gpu and int(spark.conf.get("spark.task.resource.gpu.amount", "0") or 0) < 1:
        remedy = "set spark.task.resource.gpu.amount on a cluster that has GPUs, or use_gpu=False"
        raise HostError(f"use_gpu=True, and Spark gives its tasks no GPU: {remedy}")
    slots = local_slots(spark)
    if slots is not None and slots < processes:
        raise HostError(
            f"{processes} processes need {processes} task slots at the same time, and Spark has {slots}: "
            f"train with at most {slots}, or start the session with spark.master=local[{processes}]"
        )


def _pack(program: Path) -> bytes:
    """A zip archive of the program with the Python files of its folder, packages included."""
    packages = [file.parent for file in program.parent.glob("*/__init__.py")]
    files = {program, *program.parent.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))}
    return zip_files(files, program.parent)


def _attempt(spark: "SparkSession", task: "_Task", processes: int) -> dict[str, Any] | None:
    with _Console.open(spark, task.run) as console:
        listening = dataclasses.replace(task, console=console.place if console else None)
        ranks = spark.range(0, processes, 1, processes).mapInArrow(listening, spark_schema(OUTCOME), barrier=True)
        try:
            rows = ranks.collect()
        except Exception as error:
            raise _AttemptError(spark_failure(error), bool(TASK_LOST.search(str(error)))) from error
    outcomes = sorted((json.loads(row.outcome) for row in rows), key=lambda outcome: outcome["rank"])
    unseen = outcomes[0]["printed"] - (console.shown if console else 0)
    for line in outcomes[0]["lines"][-unseen:] if unseen > 0 else ():
        print(line, flush=True)
    if failure := _explain_failure(outcomes):
        raise failure
    return outcomes[0]["result"]


def _explain_failure(outcomes: list[dict[str, Any]]) -> _AttemptError | None:
    """Return what went wrong first; None if every rank has finished."""
    failed = sorted((outcome for outcome in outcomes if outcome["code"]), key=lambda outcome: outcome["ended"])
    if not failed:
        return None
    step = next((outcome["step"] for outcome in outcomes if outcome["step"]), None)
    own = [outcome for outcome in failed if outcome["code"] > 0 and not PEER_LOST.search(outcome["error"])]
    killed = [outcome for outcome in failed if outcome["code"] < 0]
    first = (own or killed or failed)[0]  # the others have only seen that it is gone
    why = f"rank {first['rank']} of {len(outcomes)} {'failed with' if own else 'was lost:'} {first['error']}"
    output = first["traceback"] or "\n".join(first["lines"][-LAST_LINES:])
    return _AttemptError(f"{why}\n\n{output}", again=not own or step is not None, step=step)


class _Console(socketserver.ThreadingTCPServer):
    """Shows on the driver what rank 0 prints, as it comes."""

    daemon_threads = True

    def __init__(self, host: str, run: str):
        super().__init__((host, 0), _ConsoleHandler)
        self.place, self.run = (host, self.server_address[1]), run
        self.shown, self.ended = 0, threading.Event()

    @classmethod
    @contextlib.contextmanager
    def open(cls, spark: "SparkSession", run: str) -> Iterator["_Console | None"]:
        """Listen for the length of a block; None where tasks would not reach this process."""
        # In classic Spark executors reach the driver there; a client of Spark Connect may be on another machine.
        host = spark.conf.get("spark.driver.host", "")
        try:
            console = cls(host, run) if host else None
        except OSError:
            console = None
        with console or contextlib.nullcontext():
            if console:
                threading.Thread(target=console.serve_forever, daemon=True).start()
            try:
                yield console
                if console and console.shown:
                    console.ended.wait(GRACE_SECONDS)  # for lines that are still under way
            finally:
                if console:
                    console.shutdown()


class _ConsoleHandler(socketserver.StreamRequestHandler):
    server: _Console

    def handle(self) -> None:
        lines = (line.decode(errors="replace").rstrip("\n") for line in self.rfile)
        if next(lines, None) != self.server.run:  # a stranger's lines are not shown
            return
        for line in lines:
            print(line, flush=True)
            self.server.shown += 1
        self.server.ended.set()


@dataclasses.dataclass(frozen=True)
class _Task:
    """One rank, as a function of Arrow batches; it runs in the task."""

    files: bytes  # a zip archive
    program: str  # its name there
    arguments: tuple[str, ...]
    use_gpu: bool
    run: str
    grace: float = GRACE_SECONDS
    console: Any = None  # address and port

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import BarrierTaskContext

        for _ in batches:
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcome = self._run(BarrierTaskContext.get(), Path(folder))
        yield pa.RecordBatch.from_pylist([{"outcome": json.dumps(outcome)}], schema=OUTCOME)

    def _run(self, context: "BarrierTaskContext", folder: Path) -> dict[str, Any]:
        zipfile.ZipFile(io.BytesIO(self.files)).extractall(folder / "program")
        program, failure, note = folder / "program" / self.program, folder / "failure.json", folder / "checkpoint"
        number = context.partitionId()
        child = subprocess.Popen(
            [sys.executable, "-m", rank.__name__, str(failure), str(program), *self.arguments],
            env={**os.environ, **self._environment(context), rank.CHECKPOINT_NOTE: str(note), rank.RUN_ID: self.run},
            stdin=subprocess.PIPE,  # the rank ends when this is closed, which it is when this process ends
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output = _Output(child, self.console if number == 0 else None, self.run)
            ended = _wait(child, context, self.grace)
        finally:
            child.kill()
            child.wait()
        code = child.returncode
        ending = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit status {code}"
        left = {"error": ending, "traceback": "", "ended": ended}
        if failure.exists():
            left |= json.loads(failure.read_text())
        step = note.read_text() if note.exists() else None
        return {"rank": number, "code": code, "step": step, **left, **output.finish(code)}

    def _environment(self, context: "BarrierTaskContext") -> dict[str, str]:
        number = context.partitionId()
        with socket.socket() as free:
            free.bind(("", 0))
            own = {"host": context.getTaskInfos()[number].address.rpartition(":")[0], "port": free.getsockname()[1]}
        if self.use_gpu:
            address, devices = context.resources()["gpu"].addresses[0], os.environ.get("CUDA_VISIBLE_DEVICES")
            own["gpu"] = devices.split(",")[int(address)] if devices else address  # Spark counts those that it sees
        ranks = _gather(context, own)
        neighbors = [place for place, other in enumerate(ranks) if other["host"] == own["host"]]
        environment = {
            "RANK": number,
            "LOCAL_RANK": neighbors.index(number),
            "WORLD_SIZE": len(ranks),
            "LOCAL_WORLD_SIZE": len(neighbors),
            "MASTER_ADDR": ranks[0]["host"],
            "MASTER_PORT": ranks[0]["port"],
            # Spark's files reach its Python workers, but not the processes that these start.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONUNBUFFERED": 1,
        }
        if self.use_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(ranks[place]["gpu"] for place in neighbors)
        return {name: str(value) for name, value in environment.items()}


class _Output:
    """What a rank prints. A line that may be its result is held back until another such line follows."""

    def __init__(self, child: subprocess.Popen, console: Any, run: str):
        self.lines: deque[str] = deque(maxlen=LINES)
        self.printed, self.result, self.connection = 0, "", None
        with contextlib.suppress(OSError):
            if console:
                self.connection = socket.create_connection(console, timeout=GRACE_SECONDS)
                self.connection.sendall(f"{run}\n".encode())
        self.reader = threading.Thread(target=self._read, args=(child.stdout,), daemon=True)
        self.reader.start()

    def finish(self, code: int) -> dict[str, Any]:
        """What the driver gets to know of it, once the rank has ended with an exit status."""
        self.reader.join(GRACE_SECONDS)  # what the rank has started may hold its output open
        result = None
        with contextlib.suppress(ValueError):
            result = json.loads(self.result) if code == 0 else None
        if self.result and result is None:
            self._take(self.result)
        if self.connection:
            self.connection.close()
        return {"result": result, "lines": list(self.lines), "printed": self.printed}

    def _read(self, stream: IO[bytes]) -> None:
        for content in stream:
            line = content.decode(errors="replace").rstrip("\r\n")
            if line.startswith("{"):
                line, self.result = self.result, line
                if not line:
                    continue
            self._take(line)

    def _take(self, line: str) -> None:
        self.lines.append(line)
        self.printed += 1
        try:
            if self.connection:
                self.connection.sendall(f"{line}\n".encode())
        except OSError:
            self.connection = None  # the driver gets the rest with the outcome


def _gather(context: "BarrierTaskContext", value: Any) -> list[Any]:
    """Every rank's value. A single rank has no other to ask, which takes Spark a second each time."""
    if len(context.getTaskInfos()) == 1:
        return [value]
    return [json.loads(other) for other in context.allGather(json.dumps(value))]


def _wait(child: subprocess.Popen, context: "BarrierTaskContext", grace: float) -> float:
    """Wait until every rank has ended, and return when this one has; once one has failed, the others are stopped."""
    deadline, ended = float("inf"), 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(POLL_SECONDS)
            ended = ended or time.time()
        codes = _gather(context, child.poll())
        if None not in codes:
            return ended
        if any(codes):
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            child.kill()
