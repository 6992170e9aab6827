"""How two processes share the tests."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.config import PROJECT

HOOKS = runpy.run_path(str(PROJECT / "conftest.py"))
TESTS = "import pytest\n\n\n@pytest.mark.parametrize('number', range(20))\ndef test(number):\n    pass\n"
PARAMETERS = {"tags": ["parameters"]}


def test_the_tests_of_a_file_or_of_files_that_share_a_process_run_in_one_process(tmp_path):
    """Files of their own, because those of the project import for seconds."""
    shutil.copy(PROJECT / "conftest.py", tmp_path)
    shared = HOOKS["SHARED"]
    groups = [["test_one.py"], ["test_two.py"]]
    groups += [[file for file in shared if shared[file] == group] for group in sorted({*shared.values()})]
    for file in sum(groups, []):
        (tmp_path / file).write_text(TESTS)
    (line,) = [line for line in (PROJECT / "Makefile").read_text().splitlines() if "--numprocesses" in line]
    flags = line.partition("pytest")[2].rstrip("\\").split()
    command = [sys.executable, "-m", "pytest", "--verbose", *flags, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    for group in groups:
        processes = [re.findall(rf"\[(gw\d)\].* {file}::", ran.stdout) for file in group]
        assert [len(of_file) for of_file in processes] == [20] * len(group), ran.stdout
        assert len(set(sum(processes, []))) == 1, ran.stdout


def test_every_name_that_the_order_knows_is_of_something():
    notebooks = [path.name for path in (PROJECT / "notebooks").glob("*.ipynb")]
    assert all(any(name.startswith(number) for name in notebooks) for number in HOOKS["ALONE"])
    assert all((PROJECT / "tests" / name).exists() for name in (*HOOKS["SLOW"], *HOOKS["SHARED"]))


def executed(stem: str, source: str) -> dict[str, Any]:
    """The variables that a notebook's cell `parameters` leaves in a test, if that is its source."""
    item = SimpleNamespace(path=Path(f"{stem}.ipynb"), cell=SimpleNamespace(source=source, metadata=PARAMETERS))
    HOOKS["pytest_collection_modifyitems"]([item])
    variables: dict[str, Any] = {}
    exec(item.cell.source, variables)
    return variables


def test_notebooks_leave_what_they_make_in_a_test_apart(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HELPERS_PATHS__RUNS": "elsewhere"})
    paths = executed("04_ingest", "from helpers.config import load_config\npaths = load_config('local').paths")["paths"]
    assert paths.models == str(PROJECT / "out/tested/models") and paths.results == str(PROJECT / "out/tested/results")
    assert paths.runs == str(PROJECT / "elsewhere")  # `test_connect` says where


def test_a_size_is_set_for_tests_only_where_the_notebook_says_one(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    for stem, sizes in HOOKS["SIZES"].items():
        cells = json.loads((PROJECT / "notebooks" / f"{stem}.ipynb").read_text())["cells"]
        (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
        names = {
            target.id
            for line in ast.parse("".join(cell["source"])).body
            for target in ast.walk(line)
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
        }
        assert sizes.keys() <= names
        values = executed(stem, "")
        assert {name: values[name] for name in sizes} == sizes
