"""Some mutants of images, videos and manifests on every run; and the fuzzer sees what a task would suffer from."""

import sys
from pathlib import Path

import fuzz
import pytest
from fuzz import CORPUS, TARGETS, watch

from helpers.images.boundary import UnreadableImageError
from helpers.memory import resident_megabytes

MUTANTS = {"images": 500, "videos": 250, "manifests": 400}
SEED = 5

# Another program's targets, each number of which does one of these things.
FAULTY = """
import os, sys, time
sys.path[:0] = [{tests!r}, {project!r}]
import fuzz

def check(content):
    number = int(content)
    if number == 3:
        os.abort()
    if number == 5:
        raise ZeroDivisionError("division by zero")
    if number == 7:
        kept.append(b"1" * (fuzz.MEGABYTES * 2**20))
        kept.clear()
    if number == 11:
        time.sleep(100)

kept = []
fuzz.SECONDS = {seconds}
fuzz.mutants = lambda target, seed, start: ((number, str(number).encode()) for number in range(start, sys.maxsize))
fuzz.TARGETS = {{"faulty": (list, check)}}
sys.exit(fuzz.main())
"""


@pytest.mark.parametrize("target", TARGETS)
def test_no_mutant_does_more_than_become_an_error(target):
    report = watch(target, SEED, MUTANTS[target])
    assert report.findings == []
    assert report.mutants == sum(report.kinds.values()) == MUTANTS[target]
    assert min(report.kinds["good"], report.mutants - report.kinds["good"]) > MUTANTS[target] / 20


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_was_found_once_is_an_error_or_good(path, monkeypatch):
    # Of a worker that has nothing else in memory; this process may have much.
    monkeypatch.setattr(fuzz, "MEGABYTES", fuzz.MEGABYTES + int(resident_megabytes()))
    content = path.read_bytes()
    assert len(content) < 4096
    check = TARGETS["videos" if path.suffix == ".mp4" else "images"][1]
    if path.name == "late_stream.mp4":
        check(content)
    else:
        with pytest.raises(UnreadableImageError):
            check(content)


def test_a_mutant_follows_from_its_number():
    for target in TARGETS:
        several = [content for _, content in zip(range(30), fuzz.mutants(target, 7, 0), strict=False)]
        assert len({content for _, content in several}) > 20
        assert next(fuzz.mutants(target, 7, 20)) == several[20]
        assert next(fuzz.mutants(target, 8, 20)) != several[20]


def test_the_fuzzer_sees_a_process_that_dies_takes_memory_or_does_not_come_back(tmp_path, monkeypatch):
    program, tests = tmp_path / "faulty.py", Path(__file__).parent
    program.write_text(FAULTY.format(tests=str(tests), project=str(tests.parent), seconds=6))
    monkeypatch.setattr(fuzz, "PROGRAM", str(program))
    monkeypatch.setattr(fuzz, "SECONDS", 6)
    report = watch("faulty", SEED, 20)
    found = dict(report.findings)
    assert sorted(found) == [3, 5, 7, 11]
    assert found[3] == "the process ended with -6"
    assert found[5] == "ZeroDivisionError: division by zero"
    assert "MB of memory" in found[7] and found[11] == "more than 6 s"
    assert report.mutants == 20


def test_findings_are_shown_with_what_reproduces_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    report = fuzz.Report("manifests", 7, 100, [(4, "crashed"), (9, "crashed"), (11, "slow")])
    fuzz.show(report, set())
    contents = [content for _, content in zip(range(12), fuzz.mutants("manifests", 7, 0), strict=False)]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {contents[4][1], contents[11][1]}
    printed = capsys.readouterr().out
    assert printed.count("crashed") == printed.count("slow") == 1 and sys.executable not in printed
