"""Wall time, processor time and peak memory of a command with all processes that it starts, the JVM included."""

import json
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

    Processor time is summed over what each process was last seen with, because Spark's workers end without anyone
    waiting for them, and what the system keeps for waited-for children lacks theirs.
    """
    began, started, peak, seconds, children = time.perf_counter(), time.time(), 0.0, {}, {}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        root = psutil.Process(process.pid)
        while process.poll() is None:
            tree = _tree(root)
            seconds.update({pid: cpu for pid, _, _, cpu, _ in tree})
            children.update(
                {pid: (name, start - root.create_time()) for pid, name, start, *_ in tree if pid != root.pid}
            )
            peak = max(peak, sum(megabytes for *_, megabytes in tree))
            time.sleep(POLL_SECONDS)
        wall = time.perf_counter() - began
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{errors.read()[-3000:]}")
        answer = json.loads(output.read().strip().splitlines()[-1])
    return Measurement(wall, sum(seconds.values()), peak, answer, started, list(children.values()))


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
