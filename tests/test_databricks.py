"""The bundle by Databricks' own models of it, and what the project asks of a Databricks runtime, which is faked."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from databricks.bundles.jobs import Job
from databricks.bundles.volumes import Volume
from test_house_rules import NOTEBOOKS, files

from conf.bootstrap import _pins
from conf.pack import packages
from helpers.config import PROJECT, Config, load_config
from helpers.errors import ConfigError

TARGETS = ["dev", "prod"]
JOBS = ["notebooks", "stages_serverless"]
each_target = pytest.mark.parametrize("target", TARGETS)
each_job = pytest.mark.parametrize("job", JOBS)
# What the command line knows without a workspace; the rest is asked of one.
WORKSPACE = {"workspace.file_path": "/Workspace/files", "workspace.current_user.short_name": "someone"}


def bundle() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "databricks.yml").read_text(encoding="utf-8"))


def resolved(target: str) -> dict[str, Any]:
    """The bundle as the target has it, every `${...}` replaced; an unknown one is an error."""
    content = bundle()
    chosen = content["targets"][target]
    known = {f"var.{name}": variable["default"] for name, variable in content["variables"].items()}
    known |= {f"var.{name}": value for name, value in chosen.get("variables", {}).items()}
    known |= {"bundle.name": content["bundle"]["name"], "bundle.target": target, **WORKSPACE}

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item) for item in value]
        if isinstance(value, str) and (whole := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return replace(known[whole[1]])
        return (
            re.sub(r"\$\{([\w.]+)\}", lambda m: str(replace(known[m[1]])), value) if isinstance(value, str) else value
        )

    return {**replace(content["resources"]), "target": replace(chosen)}


def tasks(job: str) -> list[dict[str, Any]]:
    return bundle()["resources"]["jobs"][job]["tasks"]


def local_files(job: str) -> list[str]:
    return [
        task.get("notebook_task", {}).get("notebook_path") or task["spark_python_task"]["python_file"]
        for task in tasks(job)
    ]


def test_the_bundle_has_its_targets_and_nothing_unknown():
    content = bundle()
    assert set(content) == {"bundle", "variables", "resources", "targets", "sync"}
    assert list(content["targets"]) == TARGETS
    assert [target["mode"] for target in content["targets"].values()] == ["development", "production"]
    assert [name for name, target in content["targets"].items() if target.get("default")] == ["dev"]
    for target in content["targets"].values():
        assert set(target.get("variables", {})) <= set(content["variables"])
    assert all(set(variable) == {"description", "default"} for variable in content["variables"].values())


@each_target
def test_databricks_own_models_accept_every_resource(target):
    resources = resolved(target)
    assert list(resources["jobs"]) == JOBS
    for content in resources["jobs"].values():
        assert Job.from_dict(content).as_dict()["name"] == content["name"]
    assert Volume.from_dict(resources["volumes"]["data"]).as_dict()["volume_type"] == "MANAGED"


@pytest.mark.parametrize("wrong", [{"task": []}, {"tasks": [{"task_key": "a", "notebook": "b"}]}])
def test_those_models_refuse_what_they_do_not_know(wrong):
    content = resolved("dev")["jobs"]["notebooks"]
    with pytest.raises(ValueError, match="Unexpected field"):
        Job.from_dict({**content, **wrong})


@each_target
def test_every_variable_is_used_and_none_is_left(target):
    text = (PROJECT / "databricks.yml").read_text(encoding="utf-8")
    for name in bundle()["variables"]:
        assert f"${{var.{name}}}" in text, name
    assert "${" not in str(resolved(target))


@each_target
@each_job
def test_data_and_results_lie_in_the_volume_that_the_bundle_makes(target, job):
    resources = resolved(target)
    volume = resources["volumes"]["data"]
    root = f"/Volumes/{volume['catalog_name']}/{volume['schema_name']}/{volume['name']}/"
    parameters = {parameter["name"]: parameter["default"] for parameter in resources["jobs"][job]["parameters"]}
    assert {f"paths.{name}" for name in load_config("databricks").paths.model_dump()} == set(parameters) - {"source"}
    assert all(value.startswith(root) for value in parameters.values())


@each_job
def test_every_file_is_there_and_deployed(job):
    known = {str(path.relative_to(PROJECT)) for path in files()}
    assert local_files(job) and set(local_files(job)) <= known
    assert not [path for path in local_files(job) if path.startswith("tests/")]


def test_the_tasks_are_the_ordered_notebooks_and_then_the_command():
    # 08 starts clusters of its own on the machine where it runs, which Databricks has others for.
    expected = [str(path.relative_to(PROJECT)) for path in NOTEBOOKS if not path.name.startswith("08")]
    assert local_files("notebooks") == [*expected, "conf/submit.py"]
    assert local_files("stages_serverless") == [
        *(e for e in expected if re.search("/0[4-7]_", e)),
        "conf/submit.py",
    ]


@each_job
def test_a_task_waits_for_the_one_before(job):
    keys = [task["task_key"] for task in tasks(job)]
    assert [task.get("depends_on") for task in tasks(job)] == [None, *([{"task_key": key}] for key in keys[:-1])]


def test_each_task_has_its_compute():
    classic = bundle()["resources"]["jobs"]["notebooks"]
    assert {task["job_cluster_key"] for task in classic["tasks"]} == {
        c["job_cluster_key"] for c in classic["job_clusters"]
    }
    serverless = bundle()["resources"]["jobs"]["stages_serverless"]
    assert "job_clusters" not in serverless
    keys = {environment["environment_key"] for environment in serverless["environments"]}
    assert {task["environment_key"] for task in serverless["tasks"] if "spark_python_task" in task} == keys


def test_packages_have_the_versions_of_the_requirements():
    jobs = bundle()["resources"]["jobs"]
    libraries = [
        library["pypi"]["package"] for task in jobs["notebooks"]["tasks"] for library in task.get("libraries", [])
    ]
    dependencies = jobs["stages_serverless"]["environments"][0]["spec"]["dependencies"]
    assert set(libraries) < set(dependencies)
    # What the runtime has is not replaced; that of clusters has more than serverless.
    needed = {*packages(), "vl-convert-python"} - {"numpy", "pyarrow", "pandas"}
    assert needed == {library.partition("==")[0] for library in dependencies}
    of_clusters = {"pydantic", "PyYAML", "tqdm", "psutil", "tensorboard"}
    assert needed - of_clusters == {library.partition("==")[0] for library in libraries}
    assert set(dependencies) <= {pin for _, pin in _pins()}


def test_the_runtime_is_the_one_of_our_spark():
    (pin,) = [pin for name, pin in _pins() if name == "pyspark"]
    assert bundle()["variables"]["runtime"]["default"].startswith("18.") and "==4.1." in pin


@each_job
def test_the_python_task_reads_parameters_that_there_are(job):
    (task,) = [task for task in tasks(job) if "spark_python_task" in task]
    arguments = task["spark_python_task"]["parameters"]
    read = re.findall(r"\{\{job\.parameters\.\[?([\w.]+)\]?\}\}", " ".join(arguments))
    defined = {parameter["name"] for parameter in bundle()["resources"]["jobs"][job]["parameters"]}
    assert read and set(read) <= defined


def test_the_python_task_is_the_command(samples, bundle_uri, tmp_path):
    """As Databricks executes it: compiled from its path, without `__file__`, by a process in another folder."""
    (task,) = [task for task in tasks("notebooks") if "spark_python_task" in task]
    values = {
        "source": str(samples),
        "paths.models": str(tmp_path),
        "paths.results": str(tmp_path),
        "paths.runs": str(tmp_path / "runs"),
    }
    arguments = [
        re.sub(r"\{\{job\.parameters\.\[?([\w.]+)\]?\}\}", lambda m: values[m[1]], a)
        for a in task["spark_python_task"]["parameters"]
    ]
    (tmp_path / "fashion_cnn-int8").symlink_to(bundle_uri)
    file = PROJECT / task["spark_python_task"]["python_file"]
    program = (
        "import sys; name = sys.argv.pop(1); sys.argv[0] = name; exec(compile(open(name).read(), name, 'exec'), {})"
    )
    command = [sys.executable, "-P", "-c", program, str(file), *arguments, "--set=spark.master=local[2]"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert '"images": 64' in answer.stdout.splitlines()[-1]
    assert (tmp_path / "job" / "results").is_dir()


def test_its_mistakes_end_the_task(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["submit.py", "run", "--source=/no", "--model=/no", "--output=/no"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROJECT / "conf" / "submit.py"))
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def widgets(monkeypatch) -> dict[str, str]:
    """The widgets of a Databricks notebook, by a `dbutils` as it has it."""
    values: dict[str, str] = {}
    dbutils = SimpleNamespace(widgets=SimpleNamespace(getAll=lambda: values))
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(user_ns={"dbutils": dbutils}))
    monkeypatch.delenv("HELPERS_PATHS__RUNS", raising=False)
    monkeypatch.setenv("DATABRICKS_RUNTIME_VERSION", "18")
    return values


def test_a_widget_overrides_the_profile_and_an_argument_the_widget(widgets):
    assert load_config().paths.data == "/Volumes/main/default/spark_vision/data"
    widgets |= {"paths.data": "/Volumes/a/b/c/data", "pictures": "3", "resume": "false", "postprocess.top_k": "2"}
    config = load_config()
    assert (config.profile, config.paths.data, config.pictures, config.resume) == (
        "databricks",
        "/Volumes/a/b/c/data",
        3,
        False,
    )
    assert config.postprocess == {"top_k": 2}
    assert load_config(pictures=5).pictures == 5


def test_empty_and_foreign_widgets_are_left_alone(widgets):
    before = load_config()
    widgets |= {"paths.data": "", "source": "/Volumes/x", "my widget": "1", "profile": "local"}
    assert load_config() == before


def test_a_wrong_widget_is_named(widgets):
    widgets["paths.date"] = "/Volumes/a"
    with pytest.raises(ConfigError, match=r"paths\.date.*the widgets.*paths\.data"):
        load_config()


@each_target
def test_the_jobs_parameters_are_settings_the_widgets_take(widgets, target):
    widgets |= {p["name"]: p["default"] for p in resolved(target)["jobs"]["notebooks"]["parameters"]}
    config: Config = load_config()
    assert config.paths.results == widgets["paths.results"]


def test_notebooks_are_committed_with_their_outputs_from_databricks():
    lines = (PROJECT / ".databricks" / "commit_outputs").read_text().splitlines()
    (pattern,) = [line for line in lines if line and not line.startswith("#")]
    assert sorted(PROJECT.glob(pattern)) == NOTEBOOKS
    assert PROJECT / ".databricks" / "commit_outputs" in files()


def test_the_cluster_profile_of_databricks_names_the_bundles_volume():
    text = Path(PROJECT / "conf" / "databricks.yaml").read_text()
    assert f"/Volumes/main/default/{bundle()['variables']['volume']['default']}/data" in text
