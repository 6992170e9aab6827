"""How two processes share the tests."""

import re
import runpy
import subprocess
import sys

from helpers.config import PROJECT

HOOKS = runpy.run_path(str(PROJECT / "conftest.py"))
FILES = ("tests/test_rle.py", "tests/test_boundary.py")


def test_the_tests_of_a_file_run_in_one_process():
    (line,) = [line for line in (PROJECT / "Makefile").read_text().splitlines() if "--numprocesses" in line]
    flags = line.partition("pytest")[2].rstrip("\\").split()
    command = [sys.executable, "-m", "pytest", "--verbose", *flags, *FILES]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    for file in FILES:
        assert len(set(re.findall(rf"\[(gw\d)\].* {file}::", ran.stdout))) == 1, ran.stdout


def test_every_name_that_the_order_knows_is_of_something():
    notebooks = [path.name for path in (PROJECT / "notebooks").glob("*.ipynb")]
    assert all(any(name.startswith(number) for name in notebooks) for number in HOOKS["ALONE"])
    assert all((PROJECT / "tests" / name).exists() for name in (*HOOKS["SLOW"], *HOOKS["SHARED"]))
    assert f"def {HOOKS['AFTER_NOTEBOOKS']}(" in (PROJECT / "tests" / "test_connect.py").read_text()
