"""Rules that every file keeps. Each test first asserts that it found something to look at."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from helpers.config import PROJECT

EXECUTOR_MODULES = ["pipeline.stages", "pipeline.task", "pipeline.reading", "images.decoding", "images.video", "tasks"]
EXECUTOR_MODULES += ["bundle.runtime", "redaction", "temporary", "memory", "options"]
EXECUTOR_MODULES += ["storage", "storage.adls", "storage.objects", "storage.credentials", "storage.prefetch"]
EXECUTOR_MODULES += ["storage.uris", "training.shards", "training.rank", "pipeline.pyfunc", "pipeline.daemon"]
# From the top down; a room uses rooms of floors below only. Modules of the lowest floor may use one another.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"doctor", "training", "export", "planning"},
    {"pipeline"},
    {"tracking"},
    {"tasks"},
    {"yolact"},
    {"bundle"},
    {"images"},
    {"session", "storage"},
    {"config", "errors", "java", "memory", "metrics", "options", "partitioning", "redaction", "temporary"},
]
HEAVY = {"torch", "deltalake", "torchvision", "pydantic", "onnx", "nncf", "matplotlib", "tensorboard", "mlflow"}
NOT_IN_CONNECT = {"SparkContext", "sparkContext", "_sc", "_jvm", "_jsc", "_jdf", "_jsparkSession"}
NOT_IN_CONNECT |= {"rdd", "RDD", "parallelize", "foreachPartition"}
NOT_ON_SERVERLESS = {"cache", "persist", "unpersist"}  # of a DataFrame
MACHINE_PATH = re.compile(r"(?<![\w.\-/])/(?:root|work|home|tmp)/[\w.]")
SMALLER = {"limit", "agg", "count", "distinct", "first", "head", "take", "sample", "groupBy", "summary", "describe"}
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def files() -> list[Path]:
    """What git has or would have, the ignored left out."""
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    return [PROJECT / name for name in names if name and (PROJECT / name).is_file()]


@cache
def notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path: Path) -> list[dict]:
    cells = [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]
    assert cells
    return cells


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def source(cell: dict) -> str:
    """The cell's Python, its magics left out."""
    return "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!")))


def sources() -> dict[str, str]:
    """Python of helpers, by its place there, and of the notebooks and their programs."""
    found = {}
    for root in (PROJECT / "helpers", PROJECT / "notebooks"):
        modules = [path for path in files() if root in path.parents and path.suffix == ".py"]
        found |= {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in modules}
    for path in NOTEBOOKS:
        found[path.name] = "\n".join(source(cell) for cell in code_cells(path))
    return found


def test_modules_of_the_executors_import_nothing_heavy():
    script = f"""
import importlib, sys
for name in {EXECUTOR_MODULES}:
    importlib.import_module("helpers." + name)
    print(name, *sorted({HEAVY} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == EXECUTOR_MODULES


def test_the_driver_of_a_run_imports_no_openvino():
    """Which would hold up the start: only tasks load models."""
    script = "import sys, helpers.cli, helpers.pipeline.driver as d; print(d.run.__name__, 'openvino' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["run", "False"]


def test_importing_the_package_imports_nothing_else():
    script = """
import sys
before = set(sys.modules)
import helpers
print(*sorted(name for name, module in sys.modules.items() if module and name not in before))  # None: kept out
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [name for name in answer.stdout.split() if not name.startswith("__editable__")] == ["helpers"]


def attributes(text: str) -> set[str]:
    """Of objects: `functools.cache` is no attribute of a DataFrame."""
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if getattr(node.value, "id", "") != "functools"}


def names_in(text: str) -> set[str]:
    """Attributes and imports, attributes named to `getattr` as text included."""
    nodes = list(ast.walk(ast.parse(text)))
    named = attributes(text) | {
        alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return named | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_nothing_is_used_that_spark_connect_or_serverless_lacks():
    found = sources()
    assert {"pipeline/driver.py", "yolact/network.py", "programs/search.py", "studies/samples.py"} <= set(
        found
    ) and len(found) > len(NOTEBOOKS) + 10
    for name, text in found.items():
        assert not names_in(text) & NOT_IN_CONNECT, name
        assert not attributes(text) & NOT_ON_SERVERLESS, name


@pytest.mark.parametrize(
    "text", ["spark.sparkContext", "frame.rdd.map(f)", "getattr(spark, '_jvm')", "from pyspark import SparkContext"]
)
def test_the_search_for_what_spark_connect_lacks_finds_it(text):
    assert names_in(text) & NOT_IN_CONNECT
    assert not names_in("from functools import partial; spark.createDataFrame(table)") & NOT_IN_CONNECT


def imported(text: str) -> set[str]:
    """The top-level names of all imports, those within functions included."""
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def paths_in(text: str) -> list[str]:
    """Texts that name the folder of notebooks, docstrings left out."""
    tree = ast.parse(text)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [c.value for c in constants if isinstance(c.value, str) and re.search(r"\bnotebooks(/|$)", c.value)]


def test_helpers_know_nothing_of_the_notebooks():
    places = [PROJECT / "notebooks", PROJECT / "notebooks" / "programs"]
    theirs = {path.stem for place in places for path in place.iterdir() if path.suffix in ("", ".py")} | {"notebooks"}
    assert {"programs", "studies", "fashion_mnist", "train_yolact", "yolact", "search"} <= theirs
    modules = {name: text for name, text in sources().items() if (PROJECT / "helpers" / name).is_file()}
    assert len(modules) > 50
    for name, text in modules.items():
        assert not imported(text) & theirs, name
        assert not paths_in(text), name


@pytest.mark.parametrize("text", ["def f():\n    from yolact.losses import match", "import studies.figures as f"])
def test_the_search_for_imports_of_notebooks_finds_them(text):
    assert imported(text) & {"yolact", "studies"}
    assert not imported("from helpers.yolact import build\nfrom . import studies") & {"yolact", "studies"}


def rooms(text: str) -> set[str]:
    """The folders and modules right below `helpers` that are imported, those within functions and annotations too."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("helpers.")}


def upward(room: str, others: set[str]) -> set[str]:
    """The rooms that are not on a floor below; the lowest floor's modules may use one another."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    lowest = len(FLOORS) - 1
    return {other for other in others - {room} if floor[other] <= floor[room] < lowest or floor[other] < floor[room]}


def test_imports_only_run_down():
    modules = {Path(name): text for name, text in sources().items() if (PROJECT / "helpers" / name).is_file()}
    homes = {path: path.parts[0].removesuffix(".py") for path in modules if path != Path("__init__.py")}
    assert set(homes.values()) == {name for names in FLOORS for name in names}
    found = {str(path): upward(room, rooms(modules[path])) for path, room in homes.items()}
    assert {path: others for path, others in found.items() if others} == {}


def test_the_search_for_imports_that_run_up_finds_them():
    text = "from helpers import cli\ndef f():\n    from helpers.pipeline.task import Task\n    import helpers.errors"
    assert rooms(text) == {"cli", "pipeline", "errors"}
    assert upward("images", rooms(text)) == {"cli", "pipeline"} and upward("config", {"errors"}) == set()
    assert upward("pipeline", {"export", "planning", "training"}) == {"export", "planning", "training"}


def test_the_search_for_paths_of_notebooks_finds_them():
    assert paths_in("PROJECT / 'notebooks'") and paths_in("f'{root}/notebooks/programs/x.py'")
    assert not paths_in('"""What notebooks/programs has."""') and not paths_in("'notebook 01 makes one'")


def test_what_a_run_reaches_imports_no_torch(samples, bundle_uri, tmp_path):
    script = """
import sys
sys.modules.update({name: None for name in ("torch", "torchvision", "onnx", "nncf", "optuna", "sklearn")})
from helpers.cli import main
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", script, "run", "--source", str(samples), "--model", bundle_uri]
    command += ["--output", str(tmp_path / "out"), "--set", "pictures=2", "--set", "spark.master=local[1]"]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (
        json.loads(answer.stdout.splitlines()[-1])["ok"] == 60 and len(list((tmp_path / "out/pictures").iterdir())) == 2
    )


def texts_of(path: Path) -> str:
    """A file's text; of a notebook sources and textual outputs, because encoded pictures hold any characters."""
    if path.suffix != ".ipynb":
        return path.read_bytes().decode("utf-8", "replace")
    parts = []
    for cell in notebook(path)["cells"]:
        parts += cell["source"]
        for output in cell.get("outputs", []):
            parts += output.get("text", []), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))
    return "\n".join("".join(part) for part in parts)


def test_no_path_of_one_machine_is_in_any_file():
    looked_at = [
        path for path in files() if PROJECT / "tests" not in path.parents and path.suffix not in (".png", ".jpg")
    ]
    assert len(looked_at) > 30 and PROJECT / "helpers" / "config.py" in looked_at
    found = {}
    for path in looked_at:
        if match := MACHINE_PATH.search(text := texts_of(path)):
            found[str(path.relative_to(PROJECT))] = text[match.start() : match.start() + 60]
    assert found == {}


@pytest.mark.parametrize("text", ["see /work/x", "'/root/.cache'", "file:/tmp/a", "(/home/me)"])
def test_the_search_for_machine_paths_finds_them(text):
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("https://host/home/me and out/tmp/a and /usr/share")


def test_there_are_as_many_notebooks_as_the_readme_lists():
    rows = re.findall(
        r"^\| \[(\w+)\]\((notebooks/[\w/]+\.ipynb)\) \|", (PROJECT / "README.md").read_text(), re.MULTILINE
    )
    assert rows
    assert len(NOTEBOOKS) >= len(rows)
    for name, link in rows:
        assert Path(link).stem == name and (PROJECT / link).is_file()


def test_links_in_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (PROJECT / "README.md").read_text())
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (PROJECT / link).exists()] == []


@each_notebook
def test_the_kernel_is_python3_whoever_made_the_notebook(path):
    assert notebook(path)["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook(path)["nbformat"] == 4


@each_notebook
def test_every_cell_was_executed_and_none_failed(path):
    for cell in code_cells(path):
        assert cell["execution_count"] is not None or "nbval-skip" in tags(cell), source(cell)
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"], source(cell)


@each_notebook
def test_a_notebook_was_executed_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in code_cells(path) if cell["execution_count"] is not None]
    assert counts and counts == sorted(set(counts))


@each_notebook
def test_a_notebook_begins_with_its_title_and_what_it_needs_and_produces(path):
    first = notebook(path)["cells"][0]
    assert first["cell_type"] == "markdown" and "".join(first["source"]).startswith("# ")
    beginning = "\n".join("".join(c["source"]) for c in notebook(path)["cells"][:3] if c["cell_type"] == "markdown")
    assert "needs" in beginning.lower() and "produces" in beginning.lower()


@each_notebook
def test_the_first_code_cell_is_the_bootstrap(path):
    first = code_cells(path)[0]
    assert "nbval-skip" in tags(first)
    assert len(source(first).splitlines()) <= 10
    assert "COLAB_RELEASE_TAG" in source(first) and "DATABRICKS_RUNTIME_VERSION" in source(first)


@each_notebook
def test_one_cell_holds_the_parameters_each_explained(path):
    cells = [cell for cell in code_cells(path) if "parameters" in tags(cell)]
    assert len(cells) == 1
    values = [line for line in source(cells[0]).splitlines() if re.match(r"[A-Z_]+ = ", line)]
    assert values and all("  # " in line for line in values)


@each_notebook
def test_imports_are_in_one_place(path):
    importing = [cell for cell in code_cells(path) if re.search(r"^(from|import) ", source(cell), re.MULTILINE)]
    assert importing in (code_cells(path)[:1], code_cells(path)[:2])


@each_notebook
def test_cells_are_short_and_functions_shorter(path):
    for cell in code_cells(path):
        lines = [line for line in source(cell).splitlines() if not re.match(r"(from|import) ", line)]
        assert len(lines) <= 15, source(cell)
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert node.end_lineno - node.lineno < 5, node.name
            assert not (isinstance(node, ast.ImportFrom) and node.names[0].name == "*")


@each_notebook
def test_no_whole_frame_is_collected(path):
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("collect", "toPandas"):
                called = {
                    n.func.attr
                    for n in ast.walk(node.func.value)
                    if isinstance(n, ast.Call) and hasattr(n.func, "attr")
                }
                assert called & SMALLER, ast.unparse(node)


@each_notebook
def test_a_notebook_ends_with_assertions_that_print_nothing(path):
    last = code_cells(path)[-1]
    asserts = [node for node in ast.parse(source(last)).body if isinstance(node, ast.Assert)]
    assert len(asserts) >= 3
    assert last["outputs"] == [] and "nbval-skip" not in tags(last)


@each_notebook
def test_a_notebook_is_small(path):
    assert path.stat().st_size <= 300 * 1024


def test_there_are_notebooks():
    assert NOTEBOOKS
