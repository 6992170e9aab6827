"""Any Python file as the ranks of a training in Spark tasks: what it is told, what comes back, and what is repeated."""

import contextlib
import io
import json
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from helpers.errors import ConfigError, HostError, TrainingError
from helpers.training import launch, train_on_spark

# The attempt of this rank, which it counts in a file of its own.
COUNTED = """
import os, sys
rank = int(os.environ["RANK"])
open(f"{sys.argv[1]}-{rank}", "a").write("x")
attempt = len(open(f"{sys.argv[1]}-{rank}").read())
"""


@pytest.fixture
def program(tmp_path):
    """Writes a program, which imports nothing of this project, and returns its path."""

    def write(text: str, name: str = "program.py") -> Path:
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    return write


def attempts_of(tmp_path: Path) -> list[int]:
    """How often each rank was started."""
    return [len(path.read_text()) for path in sorted(tmp_path.glob("attempts-[01]"))]


def test_a_program_is_told_its_place_and_its_last_line_is_the_result(spark, program):
    program("NUMBER = 1", "sibling.py")
    program("", "package/__init__.py")
    program("NUMBER = 2", "package/inner/deep.py")
    program("", "package/inner/__init__.py")
    file = program(
        """
        import json, os, socket, sys, time, helpers, sibling
        from package.inner.deep import NUMBER
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        told = [[os.environ[name] for name in names], sys.argv[1:], __name__, __file__]
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ["RANK"] == "0":
            with socket.create_server(("", place[1])) as server, server.accept()[0].makefile() as other:
                ranks = [told, json.load(other)]
            print(json.dumps({"no": "result"}))
            print(json.dumps({"ranks": ranks, "numbers": [sibling.NUMBER, NUMBER]}))
            print("after it", file=sys.stderr)
        else:
            while (other := socket.socket()).connect_ex(place):
                time.sleep(0.01)
            other.sendall(json.dumps(told).encode())
        """
    )
    result = train_on_spark(spark, file, ["--images", 5, "a b"], processes=2)
    assert result is not None and result["numbers"] == [1, 2]
    for rank, (places, arguments, name, path) in enumerate(result["ranks"]):
        assert places == [str(rank), str(rank), "2", "2"]
        assert (arguments, name, Path(path).name) == (["--images", "5", "a b"], "__main__", "program.py")


@pytest.mark.parametrize("line", ["", "print('{not JSON')", "print([1])"])
def test_a_program_that_leaves_nothing_gives_none(spark, program, capsys, line):
    assert train_on_spark(spark, program(f"print('done')\n{line}"), processes=1) is None
    assert capsys.readouterr().out.splitlines()[0] == "done"


def test_what_rank_0_prints_is_shown_while_it_runs(spark, program, tmp_path, monkeypatch):
    file = program(
        """
        import os, sys
        rank = int(os.environ["RANK"])
        print("line of rank", rank)
        while rank == 0 and not os.path.exists(sys.argv[1]):  # until the driver has seen it
            pass
        print("a warning", file=sys.stderr)
        """
    )

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if "line of rank" in text:
                (tmp_path / "seen").touch()
            return super().write(text)

    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    train_on_spark(spark, file, [tmp_path / "seen"])
    assert screen.getvalue() == "line of rank 0\na warning\n"


def test_what_rank_0_prints_is_shown_at_the_end_where_tasks_do_not_reach_the_driver(
    spark, program, monkeypatch, capsys
):
    monkeypatch.setattr(launch._Console, "open", lambda *_: contextlib.nullcontext())
    file = program("for number in range(3):\n    print('line', number)\nprint('{\"a\": 1}')")
    assert train_on_spark(spark, file, processes=1) == {"a": 1}
    assert capsys.readouterr().out == "line 0\nline 1\nline 2\n"


@pytest.mark.parametrize(
    ("failure", "processes", "message"),
    [
        ("raise ValueError('no good')", 2, r"failed with ValueError: no good\n\nTraceback.*program\.py"),
        ("sys.exit('no such folder')", 1, r"failed with exit status 1\n\n.*no such folder"),
        ("import missing", 1, r"failed with ModuleNotFoundError: No module named 'missing'"),
    ],
)
def test_a_failing_rank_is_reported_in_its_own_words_and_not_started_again(
    spark, program, tmp_path, failure, processes, message
):
    last = processes - 1
    file = program(f"{COUNTED}\nif rank == {last}:\n    {failure}")
    with pytest.raises(TrainingError, match=f"(?s)rank {last} of {processes} {message}") as error:
        train_on_spark(spark, file, [tmp_path / "attempts"], processes=processes)
    assert attempts_of(tmp_path) == [1] * processes
    assert "runpy" not in str(error.value)  # the program's own frames


def test_ranks_that_wait_for_a_failed_one_are_stopped(spark, program, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.0)
    file = program(f"{COUNTED}\nif rank == 1:\n    raise ValueError('first')\nimport time\ntime.sleep(600)")
    started = time.monotonic()
    with pytest.raises(TrainingError, match="rank 1 of 2 failed with ValueError: first"):
        train_on_spark(spark, file, [tmp_path / "attempts"])
    assert time.monotonic() - started < 60


def test_a_killed_rank_is_started_again_as_part_of_the_same_run(spark, program, tmp_path, caplog):
    file = program(
        f"""{COUNTED}
open(f"{{sys.argv[1]}}-run-{{attempt}}-{{rank}}", "w").write(os.environ["TORCHELASTIC_RUN_ID"])
if attempt == 1:
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    if rank == 1:
        os.kill(os.getpid(), 9)
    dist.all_reduce(torch.ones(1))  # rank 0 fails here, because its peer is gone
print('{{"attempt": %d}}' % attempt)
"""
    )
    assert train_on_spark(spark, file, [tmp_path / "attempts"]) == {"attempt": 2}
    assert (
        "a rank was lost, going on from the newest checkpoint: rank 1 of 2 was lost: signal 9 (SIGKILL)" in caplog.text
    )
    assert attempts_of(tmp_path) == [2, 2]
    assert len({path.read_text() for path in tmp_path.glob("attempts-run-*")}) == 1


def test_a_rank_that_is_lost_again_and_again_is_given_up(spark, program, tmp_path):
    file = program(f"{COUNTED}\nos.kill(os.getpid(), 9)")
    with pytest.raises(TrainingError, match="rank 0 of 1 was lost: signal 9"):
        train_on_spark(spark, file, [tmp_path / "attempts"], processes=1, attempts=3)
    assert attempts_of(tmp_path) == [3]


def test_a_failure_after_a_checkpoint_is_no_repetition_and_is_started_again(spark, program, tmp_path, caplog):
    file = program(
        f"""{COUNTED}
from helpers.training import Checkpoints, join_group
import torch
with join_group() as group:
    network = torch.nn.Linear(1, 1)
    checkpoints = Checkpoints(sys.argv[1] + "-checkpoints", group, {{"network": network}}, {{}}, resume=False)
    progress = checkpoints.restore()
    if attempt <= 2:
        progress.add_step({{"loss": 0.0}})
        checkpoints.save(progress)
    raise OSError("the storage is away")
"""
    )
    with pytest.raises(TrainingError, match="OSError: the storage is away"):
        train_on_spark(spark, file, [tmp_path / "attempts"], processes=1)
    assert attempts_of(tmp_path) == [3]  # the third came no further than the second
    assert "newest checkpoint of step 1:" in caplog.text and "newest checkpoint of step 2:" in caplog.text


def test_a_rank_ends_with_the_task_that_started_it(spark, program, tmp_path):
    """Else one would go on beside its successor, and write checkpoints too."""
    file = program(
        f"""{COUNTED}
import time
open(f"{{sys.argv[1]}}-pid-{{attempt}}-{{rank}}", "w").write(str(os.getpid()))
while attempt == 1:
    if os.path.exists(f"{{sys.argv[1]}}-pid-1-{{1 - rank}}") and rank == 1:
        os.kill(os.getppid(), 9)
    time.sleep(0.1)
"""
    )
    train_on_spark(spark, file, [tmp_path / "attempts"])
    assert attempts_of(tmp_path) == [2, 2]
    for path in tmp_path.glob("attempts-pid-1-*"):
        assert not psutil.pid_exists(int(path.read_text()))


def test_too_few_slots_are_an_error_at_once(spark, program):
    with pytest.raises(HostError, match="3 processes need 3 task slots.*Spark has 2"):
        train_on_spark(spark, program(""), processes=3)


def test_a_program_that_is_not_there_is_an_error_at_once(spark, tmp_path):
    with pytest.raises(ConfigError, match="there is no program .*gone.py"):
        train_on_spark(spark, tmp_path / "gone.py")


def test_a_gpu_that_spark_does_not_have_is_an_error_at_once(spark, program):
    with pytest.raises(HostError, match="no GPU"):
        train_on_spark(spark, program(""), use_gpu=True)


def test_each_rank_of_a_host_has_a_gpu_of_its_own(monkeypatch):
    """Two hosts of two GPUs each, as Spark describes them to the third task."""
    hosts = ["a:1", "b:1", "b:2", "a:2"]
    told = [
        {"host": host[0], "port": port, "gpu": gpu} for host, port, gpu in zip(hosts, range(4), "0145", strict=True)
    ]
    context = SimpleNamespace(
        partitionId=lambda: 2,
        getTaskInfos=lambda: [SimpleNamespace(address=host) for host in hosts],
        resources=lambda: {"gpu": SimpleNamespace(addresses=["1"])},
        allGather=lambda message: [json.dumps(one) for one in [*told[:2], json.loads(message), told[3]]],
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,4")  # the executor's own
    environment = launch._Task(b"", "", (), True, "")._environment(context)
    assert {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "2",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("a", "0")
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,4"
