import os
import subprocess
import sys
import time

import psutil
import pytest

from helpers.errors import RunError
from helpers.java import local_options
from helpers.pipeline.records import read_runs, read_tasks
from studies.cluster import held_to, slowed, standalone
from studies.sweep import sweep

BURNER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_a_sweep_on_a_cluster_leaves_records_and_no_process(samples, bundle_uri, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_SUBMIT_OPTS", local_options())
    run = {"source": str(samples), "model": bundle_uri, "output": str(tmp_path / "out"), "partitioning.partitions": 3}
    with standalone(tmp_path / "cluster", workers=1) as cluster:
        processes = [psutil.Process(worker.popen.pid) for worker in cluster.workers]
        assert len(processes) == 1
        assert all(len(os.sched_getaffinity(thread.id)) == 1 for thread in processes[0].threads())
        slow = {**run, "output": str(tmp_path / "slow"), "slowed": (processes[0].pid, 0.1)}
        sweep({**cluster.settings, "paths.runs": str(tmp_path / "runs")}, [run, slow])
    assert not any(process.is_running() for process in processes)
    (made,) = read_runs(str(tmp_path / "out")).to_dict("records")
    assert made["master"] == cluster.url and (made["images"], made["workers"]) == (64, 1)
    tasks = read_tasks(str(tmp_path / "out"))
    assert len(tasks) == 3 and tasks["process"].nunique() == tasks["executor"].nunique() == 1
    assert (tasks["load_seconds"] == 0).all()  # of the run that warms up, which is not among these
    slowed = read_tasks(str(tmp_path / "slow"))
    assert slowed["cpu_seconds"].sum() < 0.5 * slowed["seconds"].sum()  # two threads in a tenth of the time


def test_what_is_started_on_a_core_stays_there_and_nothing_else_does():
    usable = sorted(os.sched_getaffinity(0))
    say = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    for cores, expected in [([0], usable[:1]), ([len(usable)], usable[:1]), (range(9), usable), ([-1], usable[-1:])]:
        with held_to(cores):
            answer = subprocess.run(say, capture_output=True, text=True, check=True).stdout
        assert answer == f"{expected}\n"
        assert sorted(os.sched_getaffinity(0)) == usable
    with pytest.raises(RuntimeError), held_to([0]):
        raise RuntimeError
    assert sorted(os.sched_getaffinity(0)) == usable


def test_a_sweep_that_fails_says_why(tmp_path):
    run = {"source": str(tmp_path / "gone"), "model": str(tmp_path), "output": str(tmp_path / "out")}
    with pytest.raises(RunError, match=r"local\[1\] failed(.|\n)*no model bundle"):
        sweep({"spark.master": "local[1]"}, [run])


def test_a_slowed_worker_gets_a_share_of_the_processor_and_all_of_it_afterwards():
    workers = [psutil.Popen([sys.executable, "-c", BURNER]) for _ in range(2)]
    try:
        burners = [_child(worker) for worker in workers]

        def burnt(seconds: float) -> float:
            """What the first burns of what the second does meanwhile."""
            before = [sum(burner.cpu_times()[:2]) for burner in burners]
            time.sleep(seconds)
            after = [sum(burner.cpu_times()[:2]) for burner in burners]
            return (after[0] - before[0]) / (after[1] - before[1])

        with slowed(workers[0], share=0.2):
            assert burnt(1.5) < 0.6
        assert burners[0].status() != psutil.STATUS_STOPPED
        assert burnt(1.5) > 0.6
    finally:
        for worker in workers:
            for process in [*worker.children(recursive=True), worker]:
                process.kill()
            worker.wait()


def _child(worker: psutil.Process) -> psutil.Process:
    deadline = time.monotonic() + 30
    while not (children := worker.children()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return children[0]
