"""conf/yarn.sh and conf/kubernetes.sh against stubs of spark-submit and kubectl: what they ask for and answer.

`test_yarn.py` runs the first one on a real YARN.
"""

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from conf import submission
from helpers.config import PROJECT, load_config, parse_assignments
from helpers.errors import ConfigError, HostError
from helpers.session import spark_cause

LAKE = "abfss://c@a.dfs.core.windows.net"
LOCATIONS = [f"{LAKE}/photos", f"{LAKE}/model", f"{LAKE}/out"]
SUMMARY = '{"images": 3, "ok": 3}'
RECORD = 'printf "%s\\n" "$@" >> "$CALLS/${0##*/}"\n'
KUBECTL = """case "$*" in
  *"get serviceaccount"*) [ -z "${NO_ACCOUNT:-}" ] || { echo "$NO_ACCOUNT" >&2; exit 1; } ;;
  *"can-i create pods --as"*) echo "${DRIVER_MAY:-yes}" ;;
  *can-i*) echo yes ;;
  *"logs --follow"*) printf '07:00:00 2 images\\n%s\\n' "$LAST"; touch "$CALLS/ended" ;;
  *"get pods --selector"*) echo "$PODS" ;;
  *"get pod "*)
    [ -z "${PENDING:-}" ] || [ -e "$CALLS/waited" ] || { printf "%s" "$PENDING"; touch "$CALLS/waited"; exit; }
    [ -e "$CALLS/ended" ] && echo "$ENDED" || echo "$BEGUN" ;;
  *"get events"*) echo "$EVENTS" ;;
  *config*) echo https://found:6443 ;;
esac
"""


@dataclass
class Stubs:
    """A folder of stubs, and what they were called with."""

    folder: Path

    def write(self, name: str, script: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{RECORD}{script}")
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Another `pyspark` than the real one stands first on Python's path, and another kubectl."""
        given = {"CALLS": str(self.folder / "calls"), "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}"}
        given["PYTHONPATH"] = f"{self.folder}{os.pathsep}{PROJECT}"
        command = ["sh", str(PROJECT / "conf" / script), *arguments]
        environment = {**os.environ, **given, **environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def calls(self, name: str) -> list[str]:
        path = self.folder / "calls" / name
        return path.read_text().splitlines() if path.exists() else []


def pod(phase: str, unplaced: str = "", **state: object) -> str:
    conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": unplaced}]
    status = {"phase": phase, "containerStatuses": [{"state": state}], "conditions": conditions if unplaced else []}
    return json.dumps({"metadata": {"name": "p"}, "status": status})


def ended(code: int) -> dict[str, str]:
    """What a driver leaves that has run."""
    return {"BEGUN": pod("Running"), "ENDED": pod("Succeeded", terminated={"exitCode": code}), "LAST": SUMMARY}


@pytest.fixture
def stubs(tmp_path, monkeypatch) -> Stubs:
    made = Stubs(tmp_path)
    (tmp_path / "calls").mkdir()
    (tmp_path / "pyspark").mkdir()
    (tmp_path / "pyspark" / "__init__.py").touch()
    made.write("pyspark/bin/spark-submit", "exit 0\n")
    made.write("kubectl", KUBECTL)
    monkeypatch.setenv("IMAGE", "registry/image")
    for name in ("API", "DEPLOY", "MASTER", "PREPARED", "ARCHIVE", "HADOOP_CONF_DIR"):
        monkeypatch.delenv(name, raising=False)
    return made


def settings_of(calls: list[str], name: str = "--conf") -> dict[str, str]:
    return dict(value.partition("=")[::2] for option, value in pairwise(calls) if option == name)


@pytest.mark.parametrize("recipe", ["yarn.sh", "kubernetes.sh"])
def test_a_recipe_without_its_arguments_says_how_it_is_used(recipe):
    answer = subprocess.run(["sh", PROJECT / "conf" / recipe], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert f"conf/{recipe} SOURCE MODEL OUTPUT" in answer.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_the_driver_on_kubernetes_answers_by_its_log_and_its_exit_code(stubs, code):
    answer = stubs.run("kubernetes.sh", *LOCATIONS, **ended(code))
    assert (answer.returncode, answer.stdout) == (code, f"{SUMMARY}\n"), answer.stderr
    assert "07:00:00 2 images\n" in answer.stderr and SUMMARY not in answer.stderr


def test_a_mistake_of_the_driver_on_kubernetes_is_told_as_an_error(stubs):
    answer = stubs.run("kubernetes.sh", *LOCATIONS, **{**ended(2), "LAST": "error: no such model"})
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.endswith("error: no such model\n")


def test_a_driver_that_was_killed_is_no_success(stubs):
    killed = pod("Failed", terminated={"exitCode": 137, "reason": "OOMKilled"})
    answer = stubs.run("kubernetes.sh", *LOCATIONS, **{**ended(0), "ENDED": killed, "LAST": "07:00:01 the last"})
    assert (answer.returncode, answer.stdout) == (1, "")
    last, error = answer.stderr.splitlines()[-2:]
    assert last == "07:00:01 the last" and "OOMKilled" in error


def test_settings_of_spark_and_of_the_project_may_stand_in_any_order_after_the_locations(stubs):
    further = ["--conf", "spark.kubernetes.node.selector.disk=ssd", "--set", "pictures=3", "--conf", "spark.a=b c"]
    assert stubs.run("kubernetes.sh", *LOCATIONS, *further, DRIVER_HEAP="3g", **ended(0)).returncode == 0
    calls = stubs.calls("spark-submit")
    application = calls.index("local:///opt/vision/conf/submit.py")
    assert "--conf" not in calls[application:]
    settings = settings_of(calls)
    assert settings["spark.kubernetes.node.selector.disk"] == "ssd" and settings["spark.a"] == "b c"
    assert settings["spark.driver.memory"] == "3g"
    assert settings["spark.pyspark.driver.python"] == "/opt/vision/bin/python"
    assert calls[calls.index("--master") + 1] == "k8s://https://found:6443"
    chosen = [value for option, value in pairwise(calls) if option == "--set"]
    assert chosen == ["spark.master=k8s://https://found:6443", f"paths.runs={LAKE}/out/runs", "pictures=3"]
    assert load_config("cluster", **parse_assignments(chosen)).paths.runs == f"{LAKE}/out/runs"


def test_dashboards_go_where_a_setting_says(stubs):
    assert stubs.run("kubernetes.sh", *LOCATIONS, "--set", "paths.runs=/lake/runs", **ended(0)).returncode == 0
    calls = stubs.calls("spark-submit")
    chosen = [value for option, value in pairwise(calls) if option == "--set"]
    assert load_config("cluster", **parse_assignments(chosen)).paths.runs == "/lake/runs"


def test_a_missing_service_account_is_told_before_spark_starts(stubs):
    missing = 'Error from server (NotFound): serviceaccounts "spark" not found'
    said = f"E1129 memcache.go:265] what kubectl tells beside it\n{missing}"
    answer = stubs.run("kubernetes.sh", *LOCATIONS, NO_ACCOUNT=said)
    assert answer.returncode == 2 and not stubs.calls("spark-submit")
    assert answer.stderr.count("\n") == 1 and answer.stderr.startswith(f"error: {missing}: ")
    assert "kubectl create serviceaccount" in answer.stderr


def test_a_missing_role_is_told_before_spark_starts(stubs):
    answer = stubs.run("kubernetes.sh", *LOCATIONS, DRIVER_MAY="no", NAMESPACE="vision")
    assert answer.returncode == 2 and not stubs.calls("spark-submit")
    assert "--clusterrole=edit --serviceaccount=vision:spark" in answer.stderr


def test_an_image_that_cannot_be_pulled_ends_the_run_and_its_pod(stubs):
    waiting = {"BEGUN": pod("Pending", waiting={"reason": "ImagePullBackOff"})}
    event = {"message": 'Failed to pull image "registry/image": not found'}
    others = [{"message": "Error: ErrImagePull"}, {"message": "Error: ImagePullBackOff"}, {"reason": "Starting"}]
    answer = stubs.run("kubernetes.sh", *LOCATIONS, **waiting, EVENTS=json.dumps({"items": [event, *others]}))
    assert answer.returncode == 2
    assert event["message"] in answer.stderr.splitlines()[-1]
    assert "delete" in stubs.calls("kubectl")


@pytest.fixture
def follower(stubs, monkeypatch) -> submission.Kubernetes:
    """One that has no patience, in this process."""
    monkeypatch.setenv("CALLS", str(stubs.folder / "calls"))
    monkeypatch.setenv("PATH", f"{stubs.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(submission, "SPARK_HOME", stubs.folder / "pyspark")
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("EVENTS", "{}")
    monkeypatch.setenv("PODS", "{}")
    values = {
        "spark.kubernetes.authenticate.driver.serviceAccountName": "spark",
        "spark.kubernetes.container.image": "image",
        "spark.kubernetes.namespace": "default",
        "--master": "k8s://https://host",
    }
    return submission.Kubernetes(values)


FULL = "0/3 nodes are available: 3 Insufficient memory."


def test_a_driver_that_cannot_be_scheduled_is_told_of_at_once_and_waited_for(follower, monkeypatch, capfd):
    for name, value in {**ended(0), "PENDING": pod("Pending", FULL), "EVENTS": "{}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(submission, "PATIENCE_SECONDS", 600.0)
    assert follower.run(["submit.py"]) == 0
    answer = capfd.readouterr()
    assert answer.out == f"{SUMMARY}\n"
    assert f"pod {follower.pod}: waits since 0 s: {FULL}\n" in answer.err


def test_what_events_say_of_a_pod_is_told_when_it_has_waited(follower, monkeypatch, capfd):
    event = {"message": 'MountVolume.SetUp failed for volume "key": secret "key" not found'}
    for name, value in {**ended(0), "PENDING": pod("Pending"), "EVENTS": json.dumps({"items": [event]})}.items():
        monkeypatch.setenv(name, value)
    assert follower.run(["submit.py"]) == 0
    assert f"pod {follower.pod}: waits since 0 s: {event['message']}\n" in capfd.readouterr().err


def test_the_first_failure_to_pull_an_image_is_told(follower, monkeypatch, capfd):
    """Kubernetes tries again, so the run goes on until that has failed too."""
    failed = {"reason": "ErrImagePull", "message": "failed to pull: lookup registry: no such host\n..."}
    for name, value in {**ended(0), "PENDING": pod("Pending", waiting=failed), "EVENTS": "{}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(submission, "PATIENCE_SECONDS", 600.0)
    assert follower.run(["submit.py"]) == 0
    assert "waits since 0 s: failed to pull: lookup registry: no such host\n" in capfd.readouterr().err


@pytest.mark.parametrize("patience", [0.0, 600.0])
def test_executors_that_cannot_be_scheduled_are_told_of_at_once(follower, monkeypatch, capfd, patience):
    pods = [json.loads(pod("Running")), json.loads(pod("Pending", FULL))]
    monkeypatch.setenv("PODS", json.dumps({"items": pods}))
    monkeypatch.setattr(submission, "PATIENCE_SECONDS", patience)
    looks = iter([False, False, True])
    follower._watch_executors(SimpleNamespace(wait=lambda seconds: next(looks)))
    # Once, and again only where patience has run out.
    assert capfd.readouterr().err == f"1 of 2 executors wait: {FULL}\n" * (1 if patience else 2)


def test_a_broken_connection_is_no_end_of_the_log(stubs, follower, monkeypatch):
    """The API server closes it after some hours, and where the kubelet rotates the log."""
    monkeypatch.setattr(submission, "LAG_SECONDS", 0.05)
    monkeypatch.setenv("BEGUN", pod("Running"))
    monkeypatch.setenv("ENDED", pod("Succeeded"))
    first, then = 'touch "$CALLS/broken"; echo first', 'touch "$CALLS/ended"; echo last'
    logs = f'*"logs --follow"*) if [ -e "$CALLS/broken" ]; then {then}; else {first}; fi ;;\n'
    stubs.write("kubectl", KUBECTL.replace('*"logs --follow"*)', f'{logs}*"never"*)'))
    assert list(follower._log()) == ["first\n", "last\n"]
    assert [call for call in stubs.calls("kubectl") if call.startswith("--since=")] == ["--since=0s"]


def test_a_refusal_of_the_api_server_is_one_sentence(stubs):
    refusal = """Exception in thread "main" io.fabric8.kubernetes.client.KubernetesClientException: Failure executing: \
POST at: https://h:6443/api/v1/namespaces/nope/pods. Message: namespaces "nope" not found. Received status: Status(x)"""
    stubs.write("pyspark/bin/spark-submit", f"cat >&2 <<'END'\n{refusal}\n\tat a.b(c)\nEND\nexit 1\n")
    answer = stubs.run("kubernetes.sh", *LOCATIONS)
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].endswith(
        'namespaces "nope" not found: create it with `kubectl create namespace`, or set NAMESPACE'
    )
    assert "\tat " not in answer.stderr


def test_the_driver_on_yarn_runs_from_the_archive_too(stubs):
    stubs.write("pyspark/bin/spark-submit", "echo 'Application report for application_1_1 (state: FINISHED)' >&2\n")
    queue = ["--conf", "spark.yarn.queue=q"]
    answer = stubs.run("yarn.sh", *LOCATIONS, *queue, DEPLOY="cluster", PREPARED="hdfs:///p")
    assert answer.returncode == 0, answer.stderr
    calls = stubs.calls("spark-submit")
    settings = settings_of(calls)
    assert settings["spark.pyspark.python"] == "./environment/bin/python"
    assert settings["spark.yarn.queue"] == "q" and settings["spark.yarn.archive"] == "hdfs:///p/spark.zip"
    assert calls[calls.index("--archives") + 1] == "hdfs:///p/vision.tar.gz#environment"
    assert f"paths.runs={LAKE}/out/runs" in calls


def asked_of_python(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The command line that yarn.sh gives the project's Python, which is a stub here."""
    for name in ("conf", ".venv/bin"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(PROJECT / "conf" / "yarn.sh", folder / "conf")
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = ["sh", str(folder / "conf" / "yarn.sh"), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_run_with_its_driver_here_keeps_its_dashboards_here(tmp_path):
    command = asked_of_python(tmp_path, *LOCATIONS)
    assert command[command.index("--archives") + 1] == f"{tmp_path}/out/pack/vision.tar.gz#environment"
    assert not [part for part in command if part.startswith("paths.runs=")]


def test_a_training_on_kubernetes_runs_a_program_of_the_pods(stubs):
    """Its arguments are its own, also where they look like relative locations, and its result is the answer."""
    program = ["--processes", "3", "/opt/vision/notebooks/programs/search.py", "--model", "resnet", "--epochs", "2"]
    answer = stubs.run("kubernetes.sh", "train", *program, "--conf", "spark.a=b", API="https://h", **ended(0))
    assert (answer.returncode, answer.stdout) == (0, f"{SUMMARY}\n"), answer.stderr
    calls = stubs.calls("spark-submit")
    application = calls.index("local:///opt/vision/conf/submit.py")
    expected = ["train", "--profile", "cluster", "--set", "spark.master=k8s://https://h", *program]
    assert calls[application + 1 :] == expected
    assert settings_of(calls)["spark.a"] == "b"


def test_a_training_takes_the_packages_of_the_nodes(tmp_path):
    command = asked_of_python(
        tmp_path, "train", "--processes", "3", "program.py", "--epochs", "2", PYTHON="/opt/python3"
    )
    assert "--archives" not in command and settings_of(command)["spark.pyspark.python"] == "/opt/python3"
    application = command.index(f"{tmp_path}/conf/submit.py")
    expected = ["train", "--profile", "cluster", "--set", "spark.master=yarn", "--processes", "3", "program.py"]
    assert command[application + 1 :] == [*expected, "--epochs", "2"]


def test_the_driver_on_this_machine_is_a_process_of_its_own_python(monkeypatch):
    """Which keeps its answer and its errors apart, and its exit code."""
    became = []

    def become(*call):
        became.append(call)
        raise SystemExit

    monkeypatch.setattr(os, "execve", become)
    options = ["--master", "yarn", "--deploy-mode", "client", "--conf", "spark.pyspark.python=./environment/bin/python"]
    with pytest.raises(SystemExit):
        submission.main([*options, "/p/submit.py", "run", "--set", "a=b c", "--conf", "spark.x=1 2"])
    ((python, command, environment),) = became
    assert command == [python, "/p/submit.py", "run", "--set", "a=b c"]
    assert shlex.split(environment["PYSPARK_SUBMIT_ARGS"]) == [*options, "--conf", "spark.x=1 2", "pyspark-shell"]
    assert environment["PYSPARK_PYTHON"] == "./environment/bin/python"


@pytest.mark.parametrize("said", ["User application exited with status", "AM Container for x exited with  exitCode:"])
@pytest.mark.parametrize(("code", "last", "answered"), [(0, SUMMARY, True), (1, SUMMARY, True), (2, "error: x", False)])
def test_the_answer_of_a_driver_on_yarn_is_that_of_the_run(stubs, code, last, answered, said):
    def container(number: int, errors: str, answer: str) -> str:
        files = {"stderr": errors, "stdout": answer}
        parts = [f"LogType:{n}\nLogLength:9\nLogContents:\n{f}\n\nEnd of LogType:{n}\n***\n" for n, f in files.items()]
        return f"Container: container_1_1_01_00000{number} on host_1\nLogAggregationType: AGGREGATED\n" + "\n".join(
            parts
        )

    log = container(2, "an executor", "here") + container(1, "Java here", f"07:00 here\n{last}")
    stubs.write("yarn", f"cat <<'END'\n{log}END\n")
    site = "<property><name>yarn.log-aggregation-enable</name>\n<value>true</value></property>"
    (stubs.folder / "yarn-site.xml").write_text(site)
    report = "Application report for application_1_1 (state: FINISHED)"
    if code:
        report += (
            f"\n12:00:00 ERROR Client: Application diagnostics message: User application exited with status {code}"
        )
    stubs.write("pyspark/bin/spark-submit", f"cat >&2 <<'END'\n{report}\nEND\nexit {min(code, 1)}\n")
    places = {"PREPARED": "hdfs:///p", "HADOOP_CONF_DIR": str(stubs.folder)}
    answer = stubs.run("yarn.sh", *LOCATIONS, DEPLOY="cluster", **places)
    assert (answer.returncode, answer.stdout) == (code, f"{last}\n" if answered else ""), answer.stderr
    assert answer.stderr.splitlines()[1:3] == ["Java here", "07:00 here"]
    assert (last in answer.stderr) != answered


def test_where_hadoops_command_is_missing_the_error_says_what_it_is_for(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HostError, match="no yarn on the PATH: application_1_1 has ended"):
        submission._yarn_logs("application_1_1")


def test_a_driver_on_yarn_that_was_killed_is_no_success(stubs):
    report = """Application report for application_1_1 (state: KILLED)
12:00:00 ERROR Client: Application diagnostics message: Application killed by user."""
    stubs.write("pyspark/bin/spark-submit", f"cat >&2 <<'END'\n{report}\nEND\nexit 1\n")
    answer = stubs.run("yarn.sh", *LOCATIONS, DEPLOY="cluster", PREPARED="hdfs:///p")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "killed by user" in answer.stderr.splitlines()[-1]


def test_a_jvm_that_only_submits_is_a_brief_one_and_asks_no_name_service(stubs, monkeypatch):
    stubs.write("pyspark/bin/spark-submit", 'echo "$SPARK_LOCAL_HOSTNAME $SPARK_SUBMIT_OPTS" >> "$CALLS/options"\n')
    for name in ("SPARK_LOCAL_HOSTNAME", "SPARK_SUBMIT_OPTS"):
        monkeypatch.delenv(name, raising=False)
    for own in ("", "-XX:+UseParallelGC"):
        assert stubs.run("kubernetes.sh", *LOCATIONS, **ended(0) | {"SPARK_SUBMIT_OPTS": own}).returncode == 0
    first, second = (line.split() for line in stubs.calls("options"))
    assert first[:3] == ["localhost", *submission.BRIEF.split()]
    # Java refuses two collectors.
    assert second[:2] == ["localhost", "-XX:+UseParallelGC"] and not set(submission.BRIEF.split()) & set(second)


def test_a_relative_path_is_refused_where_the_driver_runs_elsewhere(stubs):
    answer = stubs.run("yarn.sh", "/photos", "/model", "out", DEPLOY="cluster", PREPARED="hdfs:///p")
    assert answer.returncode == 2 and not stubs.calls("spark-submit")
    assert "--output out: a relative path" in answer.stderr


@pytest.mark.parametrize("arguments", [[*LOCATIONS], ["--prepare", "hdfs:///place"]])
def test_an_archive_that_was_not_made_has_a_remedy(stubs, arguments):
    answer = stubs.run("yarn.sh", *arguments, ARCHIVE="/nowhere/vision.tar.gz")
    assert answer.returncode == 2 and not stubs.calls("spark-submit")
    assert answer.stderr == "error: there is no archive /nowhere/vision.tar.gz: make it with `make pack`\n"


def test_a_conf_without_a_value_is_named():
    with pytest.raises(ConfigError, match="--conf takes NAME=VALUE"):
        submission.arranged(["--master", "yarn", "submit.py", "run", "--conf"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "An error occurred while calling None.org.apache.spark.api.java.JavaSparkContext.\n"
            ": org.apache.spark.SparkException: External scheduler cannot be instantiated\n\tat a.b(c)\n"
            "Caused by: a.KubernetesClientException: Failure executing: GET at: https://h/pods. Message: pods is "
            'forbidden: it cannot get resource "pods". Received status: Status(x)\n\t... 3 more',
            'pods is forbidden: it cannot get resource "pods": give the account the role: ',
        ),
        (
            "An error occurred while calling None.org.apache.spark.api.java.JavaSparkContext.\n"
            ": org.apache.hadoop.yarn.exceptions.YarnException: submitted to unknown queue: q\n\tat a.b(c)",
            "submitted to unknown queue: q: name one that is there: --conf spark.yarn.queue=NAME",
        ),
        (
            "An error occurred while calling None.org.apache.spark.api.java.JavaSparkContext.\n"
            ": org.apache.spark.SparkException: Application a_1 failed 1 times due to AM Container for b_1 exited "
            "with  exitCode: -1000\nFailing this attempt.Diagnostics: [2026-11-29 10:00:00.000]File file:/a does "
            "not exist\nFor more detailed output, check the application tracking page\n\tat a.b(c)",
            "Application a_1 failed 1 times due to AM Container for b_1 exited with  exitCode: -1000: "
            "File file:/a does not exist",
        ),
        ("[JAVA_GATEWAY_EXITED] Java ended.\nMore of it", "[JAVA_GATEWAY_EXITED] Java ended."),
    ],
)
def test_the_last_cause_of_a_failure_is_told_with_its_remedy(text, message):
    assert spark_cause(text).startswith(message)
    assert "\n" not in spark_cause(text)
