"""Run a training function in Spark tasks through TorchDistributor, with errors that say what a process said.

TorchDistributor alone waits silently where slots are missing, raises nothing of what a process raised, returns the
value of any process, starts children that cannot import what the driver can, and ends with the first process that is
lost: Spark does not repeat a barrier stage that gives a result. Here each of these is dealt with.
"""

import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from helpers.errors import HostError, TrainingError, first_line
from helpers.session import local_slots, pack_helpers
from helpers.storage import Storage, open_storage
from helpers.training.checkpoints import lock_run, newest_step, remove, storage_of
from helpers.training.classifier import train
from helpers.training.workers import NOTICE, PROGRESS, RunSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

Train = Callable[[Any, str, str], dict[str, Any]]  # settings, data_root, run_dir: the result

# How the exchange of gradients fails in a process whose peer is gone: it is not what went wrong.
LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|Connection refused|[Tt]imed? ?out", re.ASCII)
LOG_LINES = 40  # of the processes' output, kept for the error of a run that left no other trace


def train_on_spark(
    spark: "SparkSession",
    settings: RunSettings,
    data_root: str,
    run_dir: str,
    processes: int,
    use_gpu: bool = False,
    train: Train = train,
    attempts: int = 4,
) -> dict[str, Any]:
    """Run a training function once in each of several Spark tasks, which train one network together.

    Args:
        spark: the session; all tasks run at the same time, so it needs that many free slots.
        settings: as for `train`; the batch is divided over the processes.
        data_root: a folder that each worker sees, or may fill.
        run_dir: a folder that the driver and the workers share.
        processes: how many tasks.
        use_gpu: give each process a GPU; gradients are then exchanged by NCCL, and computing is in mixed precision.
            (Written after the documentation: its authors have no GPU to run it on.)
        train: the function, of a module in `helpers`: that of the classifier, or `helpers.yolact.training.train`. It
            takes settings, data_root and run_dir, and leaves its result as `result.json` in run_dir.
        attempts: how often to start all processes before giving up. They go on from the last checkpoint when one of
            them was lost (killed, or its host with it), or when the run had come further than the attempt before; what
            would fail in the same way again is not repeated.

    Returns:
        What `train` returns.

    Raises:
        HostError: Spark has too few slots, or no GPUs to give.
        TrainingError: a process failed, the last time; the message holds its own traceback. Or another training is at
            work in run_dir.
    """
    _check_resources(spark, processes, use_gpu)
    settings = dataclasses.replace(settings, device="cuda" if use_gpu else "cpu")
    if not settings.resume:
        # Here too: an attempt that fails before it does so must not be followed by one that goes on from these.
        with lock_run(run_dir):
            remove(storage_of(settings, run_dir))
    step = newest_step(settings, run_dir)
    for left in reversed(range(attempts)):
        try:
            return _attempt(settings, data_root, run_dir, processes, use_gpu, train)
        except _AttemptError as error:
            reached = newest_step(settings, run_dir)
            if not left or not (error.lost or reached > step):
                raise TrainingError(str(error)) from error.__cause__
            log.warning("a training process was lost, going on after step %d: %s", reached, first_line(error))
            step, settings = reached, dataclasses.replace(settings, resume=True)
    raise ValueError("attempts must be at least 1")


class _AttemptError(Exception):
    """All processes have ended without a result; `lost` tells whether it was for want of one of them."""

    def __init__(self, message: str, lost: bool = False):
        super().__init__(message)
        self.lost = lost


def _attempt(
    settings: RunSettings, data_root: str, run_dir: str, processes: int, use_gpu: bool, train: Train
) -> dict[str, Any]:
    from pyspark.ml.torch.distributor import TorchDistributor

    storage = open_storage(run_dir)
    # What an earlier run left must not be taken for this one's.
    with lock_run(run_dir):
        for name in ["result.json", *(_failure_file(rank) for rank in range(processes))]:
            storage.delete(name)
    distributor = TorchDistributor(num_processes=processes, local_mode=False, use_gpu=use_gpu)
    output = _ProcessLog(sys.stdout)
    try:
        with contextlib.redirect_stderr(output):
            distributor.run(_rank_function(train, settings, data_root, run_dir))
    except Exception as error:
        raise _explain_failure(storage, processes, output) from error
    if not storage.exists("result.json"):
        raise TrainingError(f"the processes left no result in {run_dir}: choose a folder that all hosts share")
    return json.loads(storage.read("result.json"))


def _check_resources(spark: "SparkSession", processes: int, use_gpu: bool) -> None:
    if use_gpu and int(spark.conf.get("spark.task.resource.gpu.amount", "0") or 0) < 1:
        raise HostError(
            "use_gpu=True, and Spark gives its tasks no GPU: set spark.task.resource.gpu.amount on a cluster that has "
            "GPUs, or use_gpu=False"
        )
    slots = local_slots(spark)
    if slots is not None and slots < processes:
        raise HostError(
            f"{processes} processes need {processes} task slots at the same time, and Spark has {slots}: "
            f"train with at most {slots}, or start the session with spark.master=local[{processes}]"
        )


def _rank_function(train: Train, settings: RunSettings, data_root: str, run_dir: str) -> Callable[[], None]:
    package = pack_helpers().read_bytes()
    module, function, kind, values = (
        train.__module__,
        train.__name__,
        type(settings).__name__,
        dataclasses.asdict(settings),
    )

    # A local function is pickled by value, so the child needs nothing of ours before `helpers` is unpacked in it.
    # It carries the package because Spark's files reach its Python workers, but not the children they start.
    def run_rank() -> None:
        import importlib
        import json
        import os
        import sys
        import tempfile
        import time
        import traceback
        from pathlib import Path

        print(flush=True)  # TorchDistributor shows a process's first line twice, so let it be an empty one
        try:
            with tempfile.TemporaryDirectory() as folder:
                archive = Path(folder, "helpers.zip")
                archive.write_bytes(package)
                sys.path.insert(0, str(archive))
                trainer = importlib.import_module(module)
                getattr(trainer, function)(getattr(trainer, kind)(**values), data_root, run_dir)
        except BaseException as error:
            failure = {
                "time": time.time(),
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            Path(run_dir, f"failure-rank-{os.environ['RANK']}.json").write_text(json.dumps(failure))
            raise

    return run_rank


def _failure_file(rank: int) -> str:
    return f"failure-rank-{rank}.json"


def _explain_failure(storage: Storage, processes: int, output: "_ProcessLog") -> _AttemptError:
    names = {rank: _failure_file(rank) for rank in range(processes)}
    failures = {rank: json.loads(storage.read(name)) for rank, name in names.items() if storage.exists(name)}
    own = {rank: failure for rank, failure in failures.items() if not LOST.search(failure["error"])}
    if not own:
        # The others have only seen that it is gone.
        last = "\n".join(output.tail)
        return _AttemptError(f"a training process ended without a word; the last lines of all processes:\n{last}", True)
    rank = min(own, key=lambda rank: own[rank]["time"])
    message = f"process {rank} of {processes} failed with {own[rank]['error']}\n\n{own[rank]['traceback']}"
    return _AttemptError(message)


class _ProcessLog(io.TextIOBase):
    """Takes what TorchDistributor streams from the processes: shows the progress, keeps the last of the rest."""

    def __init__(self, progress: TextIO):
        self.progress = progress
        self.tail: deque[str] = deque(maxlen=LOG_LINES)

    def write(self, text: str) -> int:
        for line in text.splitlines():
            self.tail.append(line)
            if line.startswith((PROGRESS, NOTICE)):
                print(line, file=self.progress, flush=True)
        return len(text)
