"""Wall time, processor time and peak memory of a command with all processes that it starts, the JVM included."""

import json
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_SECONDS = 0.5  # looking costs processor time too


@dataclass(frozen=True)
class Measurement:
    """Seconds and megabytes of one command; `answer` is the JSON of its last line.

    It was `started` so many seconds after 1970. `children` are the processes that it started: their names, and when, in
    seconds after it.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_megabytes: float
    answer: dict
    started: float
    children: list[tuple[str, float]]


def measure(command: list[str]) -> Measurement:
    """Run a command and watch its process tree; raises RuntimeError if it fails.

    Processor time is what the system keeps for waited-for children, or the sum over what each process was last seen
    with, if that is more: Spark's workers end without anyone waiting for them.
    """
    began, started, peak, seconds, children = time.perf_counter(), time.time(), 0.0, {}, {}
    before = _waited_for()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        root = psutil.Process(process.pid)
        while not _ends(process):
            tree = _tree(root)
            seconds.update({pid: cpu for pid, _, _, cpu, _ in tree})
            children.update(
                {pid: (name, start - root.create_time()) for pid, name, start, *_ in tree if pid != root.pid}
            )
            peak = max(peak, sum(megabytes for *_, megabytes in tree))
        wall = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{errors.read()[-3000:]}")
        answer = json.loads(output.read().strip().splitlines()[-1])
    return Measurement(
        wall, max(sum(seconds.values()), _waited_for() - before), peak, answer, started, list(children.values())
    )


def _ends(process: subprocess.Popen) -> bool:
    """Whether it ends before it is time to look."""
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _waited_for() -> float:
    """Processor seconds of all ended children, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _tree(root: psutil.Process) -> list[tuple[int, str, float, float, float]]:
    """Each process: number, name, start, processor seconds, and proportional set size, which divides shared pages."""
    found = []
    for process in [root, *root.children(recursive=True)]:
        try:
            name, times = process.name(), process.cpu_times()
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile
        kilobytes = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
        found.append((process.pid, name, process.create_time(), times.user + times.system, kilobytes / 1024))
    return found
