"""A notebook opened from its Colab badge: nothing but the notebook is there, and numpy is loaded already."""

import json
import os
import shutil
import site
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from test_house_rules import NOTEBOOKS, code_cells, files, notebook, source

from conf import badges, bootstrap
from helpers.config import PROJECT
from helpers.errors import UserError
from helpers.java import ARCHIVE, JAVA_PACKAGE

NOT_ON_COLAB = {"tqdm", "openvino"}  # taken away from what is preinstalled: one needs numpy, and notebook 04 both
OPENED = "04_ingest.ipynb"
RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read("{name}", 4)
notebook.cells.insert(0, nbformat.v4.new_code_cell("import numpy; loaded = numpy.__version__, numpy.__file__"))
notebook.cells.append(nbformat.v4.new_code_cell("import importlib; assert importlib.reload(numpy) is numpy"))
notebook.cells.append(nbformat.v4.new_code_cell("assert (numpy.__version__, numpy.__file__) == loaded; print(*loaded)"))
NotebookClient(notebook, timeout=300).execute()
print(notebook.cells[-1].outputs[0].text)
"""
REPOSITORY = "https://github.com/someone/spark-vision.git"
APPLIED = [path for path in NOTEBOOKS if "runpy" in source(code_cells(path)[0])]


def git(*arguments: str, cwd: Path) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The project as it is now, committed, as a repository that can be cloned."""
    folder = tmp_path_factory.mktemp("origin")
    for path in files():
        target = folder / path.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    git("init", "--quiet", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "--message", "all", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def colab_python(tmp_path_factory) -> Path:
    """A fresh environment that sees this one's packages as preinstalled, but for two and the project.

    They are outside of the environment, so that no pip that runs in it can change them.
    """
    folder = tmp_path_factory.mktemp("colab")
    preinstalled = folder / "preinstalled"
    preinstalled.mkdir()
    hidden = {name for absent in NOT_ON_COLAB for name in tops(absent)}
    for item in Path(site.getsitepackages()[0]).iterdir():
        if item.name not in hidden and not item.name.startswith(("__editable__", "spark_vision")):
            (preinstalled / item.name).symlink_to(item)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    packages = next((folder / "venv" / "lib").glob("python3.*/site-packages"))
    (packages / "preinstalled.pth").write_text(f"{preinstalled}\n")
    (folder / "venv" / ARCHIVE.name).symlink_to(ARCHIVE)  # Colab has none, and a slower start
    return folder / "venv" / "bin" / "python"


def tops(package: str) -> set[str]:
    """The first parts of the paths that a package has installed."""
    from importlib.metadata import files as installed

    return {str(path).partition("/")[0] for path in installed(package) or []}


def test_a_notebook_alone_in_an_empty_folder_clones_installs_and_runs(
    repository, colab_python, fashion_mnist_root, tmp_path
):
    shutil.copy(PROJECT / "notebooks" / OPENED, tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {
        "COLAB_RELEASE_TAG": "emulated",
        "PROJECT_REPOSITORY": str(repository),
        "HELPERS_PATHS__DATA": fashion_mnist_root,
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        "PYSPARK_PYTHON": str(colab_python),
        "PIP_NO_COMPILE": "1",  # of OpenVINO the notebook imports little
    }
    answer = subprocess.run(
        [colab_python, "-c", RUN.format(name=OPENED)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-5000:]
    assert (tmp_path / "project" / "out" / "results" / "stages" / "1_images").is_dir()
    installed = {path.name for path in colab_python.parent.parent.glob("lib/python3.*/site-packages/*")}
    assert {"tqdm", "openvino"} <= installed
    assert not {name for name in installed if name.startswith(("numpy", "pandas", "pyarrow", "pyspark"))}
    assert answer.stdout.split()[0] == version("numpy")


def test_what_is_loaded_or_shared_with_the_runtime_is_fixed():
    fixed = bootstrap.find_fixed()
    for name in ("numpy", "pandas", "pytest"):  # pytest is loaded, and not of our requirements
        assert f"{name}=={version(name)}" in fixed


def test_on_databricks_packages_go_to_the_workers_too(monkeypatch, tmp_path):
    class Shell:
        def run_line_magic(self, name: str, line: str) -> None:
            calls.append((name, line))

    calls: list[tuple[str, str]] = []
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-package==1\nnumpy==0.1   # there, in another version\n")
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", requirements)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18")
    monkeypatch.setattr("IPython.get_ipython", Shell)
    assert bootstrap.install_missing() == ["no-such-package==1"]
    ((magic, line),) = calls
    assert magic == "pip" and line.startswith("install ") and line.endswith(" no-such-package==1")


def test_a_runtimes_own_spark_is_not_replaced(monkeypatch):
    installed = {name: "1" for name, _ in bootstrap._pins() if name != "pyspark"}
    monkeypatch.setattr(bootstrap, "_present", lambda: installed)
    assert bootstrap.find_missing() == []


def test_java_is_installed_where_it_is_missing(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(bootstrap, "_pip", lambda *arguments: calls.append(arguments))
    bootstrap.install_java()
    assert calls == []
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    bootstrap.install_java()
    assert calls == [("install", "--quiet", JAVA_PACKAGE)] and "JAVA_HOME" not in os.environ


@pytest.mark.parametrize("path", APPLIED, ids=lambda path: path.stem)
def test_a_notebook_has_the_badge_and_the_first_cell_of_its_repository(path):
    assert badges.apply(notebook(path), path.name, badges.repository_of(notebook(path))) == notebook(path)


def test_all_notebooks_lead_to_one_repository():
    assert len(APPLIED) >= 4
    assert len({badges.repository_of(notebook(path)) for path in APPLIED}) == 1


def test_a_repository_is_in_the_badge_and_in_the_first_cell():
    path = PROJECT / "notebooks" / OPENED
    changed = badges.apply(notebook(path), OPENED, REPOSITORY)
    title = "".join(changed["cells"][0]["source"])
    assert f"(https://colab.research.google.com/github/someone/spark-vision/blob/main/notebooks/{OPENED})" in title
    assert "https://github.com/someone/spark-vision" in source(next(c for c in changed["cells"] if "outputs" in c))
    assert badges.repository_of(changed) == "https://github.com/someone/spark-vision"
    assert badges.apply(changed, OPENED, None) == badges.apply(notebook(path), OPENED, None)
    rest = [json.dumps(cell) for cell in changed["cells"][2:]]
    assert rest == [json.dumps(cell) for cell in notebook(path)["cells"][2:]]


def test_an_address_that_colab_cannot_open_is_refused():
    with pytest.raises(UserError, match="OWNER/NAME"):
        badges.apply(notebook(NOTEBOOKS[0]), "x.ipynb", "git@example.org:me/it")
