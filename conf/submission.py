"""Submit to a cluster with spark-submit, follow the run, and answer as a local run does: summary, errors, exit code.

    python conf/submission.py OPTION ... submit.py run ...      what yarn.sh and kubernetes.sh call
    python conf/submission.py --prepare LOCATION ARCHIVE        Spark and the archive, where YARN's nodes reach them

In client mode the driver is a process of this machine, and its answer is the answer. In cluster mode spark-submit knows
whether the driver has failed, and no more: the summary is in the driver's log, read by `kubectl` or YARN's own client.
`--conf NAME=VALUE` may stand after the application too, where users of the scripts write it.
"""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pyspark

from helpers.config import CONF
from helpers.errors import ConfigError, HostError, RunError, UserError, first_line
from helpers.session import YARN_DIAGNOSTICS, spark_cause

SPARK_HOME = Path(pyspark.__file__).parent
LOG = f"-Dlog4j2.configurationFile={(CONF / 'log4j2.properties').as_uri()}"
# Of a JVM that only submits, unless the user has options: its compiler and collector would cost more than they save.
BRIEF = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
POLL_SECONDS = 2.0
LOOK_SECONDS = 10.0  # from one look at a run's executors to the next
PATIENCE_SECONDS = 30.0  # until a pod or an application that does not start is told of, and again
LAG_SECONDS = 6.0  # after which a pod whose log has ended says that it has ended too
LOGS_SECONDS = 60.0  # in which YARN has gathered the logs of an application that has ended
# What Kubernetes says of a container that no waiting mends.
HOPELESS = {"ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError"}
YARN_STATE = re.compile(r"Application report for (application_\w+) \(state: (\w+)\)")
NO_SESSION = 13  # what Spark makes of any exit code of a driver that ended before it had a session
# By Spark's master of the application; by YARN where the driver ended before it had a session.
YARN_STATUS = re.compile(r"exited with\s+(?:status|exitCode:) (\d+)")


def main(arguments: list[str]) -> int:
    """Submit, follow, and return the exit code of the driver."""
    if arguments[:1] == ["--prepare"]:
        prepare(*arguments[1:])
        return 0
    arguments, values = arranged(arguments)
    if "--archives" in values:
        check_archive(values["--archives"].partition("#")[0])
    if values["--deploy-mode"] == "client":
        run_client(arguments, values["spark.pyspark.python"])
    check_locations(arguments)
    if values["--master"].startswith("k8s://"):
        return Kubernetes(values).run(arguments)
    return run_on_yarn(arguments)


def arranged(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Spark's options ahead of the application, those after it included, and their values by name."""
    place = _application(arguments)
    options, application = arguments[:place], arguments[place:]
    while "--conf" in application:
        at = application.index("--conf")
        options += application[at : at + 2]
        if len(application[at : at + 2]) < 2:
            raise ConfigError("--conf takes NAME=VALUE, for example --conf spark.yarn.queue=images")
        del application[at : at + 2]
    pairs = list(zip(options[::2], options[1::2], strict=True))
    settings = dict(value.partition("=")[::2] for name, value in pairs if name == "--conf")
    return options + application, {**settings, **{name: value for name, value in pairs if name != "--conf"}}


def check_archive(archive: str) -> None:
    """Refuse an archive that is not there.

    Raises:
        HostError: it is a path, and there is no such file.
    """
    if not urlsplit(archive).scheme and not Path(archive).is_file():
        raise HostError(f"there is no archive {archive}: make it with `make pack`")


def check_locations(arguments: list[str]) -> None:
    """Refuse paths that mean something on this machine alone.

    Raises:
        ConfigError: a location is a relative path.
    """
    _, command, *rest = arguments[_application(arguments) :]
    if command != "run":  # what a program's arguments mean, it knows
        return
    for name, value in zip(rest, rest[1:], strict=False):
        relative = not value.startswith("/") and not re.match(r"[a-zA-Z][\w+.-]+:", value)
        if name in ("--source", "--model", "--output") and relative:
            raise ConfigError(f"{name} {value}: a relative path, and the driver runs elsewhere; write it in full")


def run_client(arguments: list[str], python: str) -> NoReturn:
    """Become the driver, which starts Spark itself; spark-submit would mix its errors into its answer.

    Args:
        arguments: Spark's options, the application and what it takes.
        python: the interpreter of the executors.
    """
    place = _application(arguments)
    options = {"PYSPARK_SUBMIT_ARGS": shlex.join([*arguments[:place], "pyspark-shell"]), "PYSPARK_PYTHON": python}
    os.execve(sys.executable, [sys.executable, *arguments[place:]], {**os.environ, **options})


def run_on_yarn(arguments: list[str]) -> int:
    """Submit, tell what the application waits for, and show the driver's log once it has ended.

    Raises:
        HostError: the application was refused.
        RunError: the driver was lost.
    """
    told_so_far: deque[str] = deque(maxlen=2000)
    application, state, told = "", "", time.monotonic()
    with _spark_submit(arguments, client_level="info") as process:
        for line in process.stderr:
            told_so_far.append(line)
            match = YARN_STATE.search(line)
            if match and (match[2] != state or (state == "ACCEPTED" and time.monotonic() - told > PATIENCE_SECONDS)):
                application, state, told = match[1], match[2], time.monotonic()
                waits = "; it waits for the queue, or for its files" if state == "ACCEPTED" else ""
                print(f"{application}: {state.lower()}{waits}", file=sys.stderr)
    text = "".join(told_so_far)
    if not application:
        raise HostError(f"YARN refused the run: {spark_cause(text)}")
    status = YARN_STATUS.findall(text)
    code = 0 if not process.returncode else int(status[-1]) if status else None
    logs = _yarn_logs(application) if _gathers_logs() else {}
    if not logs:
        print(f"{application}: YARN has not gathered its log (yarn.log-aggregation-enable)", file=sys.stderr)
    # YARN's driver writes what Python says of errors beside its answer, which is the last line.
    lines = [line for name in ("stderr", "stdout") for line in logs.get(name, "").splitlines() if line.strip()]
    *said, last = lines or [""]
    for line in said:
        print(line, file=sys.stderr)
    if code == NO_SESSION and last.startswith("error: "):
        code = 2
    if code not in (0, 1, 2) or (code == 1 and not last.startswith("{")):
        print(last, file=sys.stderr)
        found = YARN_DIAGNOSTICS.findall(text) or re.findall(r"Application diagnostics message: (.+)", text)
        why = first_line(found[-1]) if found else "it was killed, or its node was lost"
        raise RunError(f"{application}: the driver did not end well: {why}")
    _tell_last(last, code)
    return code


def _gathers_logs() -> bool:
    """Whether the cluster keeps the logs of applications that have ended, as its configuration on this machine says."""
    site = Path(os.environ.get("HADOOP_CONF_DIR", ""), "yarn-site.xml")
    text = site.read_text(encoding="utf-8") if site.is_file() else ""
    return bool(re.search(r"<name>\s*yarn\.log-aggregation-enable\s*</name>\s*<value>\s*true", text))


def _yarn_logs(application: str) -> dict[str, str]:
    """The driver's log by its files' names; nothing where YARN has not gathered them in time.

    Raises:
        HostError: Hadoop's command is not here; Spark's own jars lack what reads logs.
    """
    yarn = shutil.which("yarn")
    if not yarn:
        raise HostError(
            f"the driver's answer is in its log, which `yarn logs` shows, and there is no yarn on the PATH: \
{application} has ended, and has written its results and records"
        )
    command = [yarn, "logs", "-applicationId", application, "-log_files", "stdout,stderr"]
    deadline = time.monotonic() + LOGS_SECONDS
    while True:
        _, *parts = re.split(r"^Container: (\S+) on .*$", _output(command), flags=re.MULTILINE)
        # The first container of an application is its driver's.
        driver = "".join(text for name, text in zip(parts[::2], parts[1::2], strict=True) if name.endswith("_000001"))
        files = re.findall(r"^LogType:(\w+)\n(?:Log[^\n]*\n)*?LogContents:\n(.*?)^End of LogType:", driver, re.M | re.S)
        if files or time.monotonic() > deadline:
            return dict(files)
        time.sleep(POLL_SECONDS)


class Kubernetes:
    """A run in a namespace, followed with `kubectl`.

    Args:
        values: Spark's options and settings by name.

    Raises:
        HostError: there is no kubectl, or the cluster lacks what a run needs.
    """

    def __init__(self, values: dict[str, str]):
        self.account = values["spark.kubernetes.authenticate.driver.serviceAccountName"]
        self.image = values["spark.kubernetes.container.image"]
        self.namespace = values["spark.kubernetes.namespace"]
        self.pod = f"{values.get('--name', 'spark-vision')}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        self.server = values["--master"].removeprefix("k8s://")
        if not shutil.which("kubectl"):
            raise HostError("there is no kubectl on the PATH, by which the driver's log is read: install it")
        self._check()

    def _check(self) -> None:
        account = self._kubectl("get", "serviceaccount", self.account)
        if account.returncode:
            raise HostError(spark_cause(account.stderr.strip().splitlines()[-1]))
        who = f"system:serviceaccount:{self.namespace}:{self.account}"
        for name, user in {"you": [], f"the service account {self.account}": ["--as", who]}.items():
            # Whoever may not ask for others learns it from the driver.
            if self._kubectl("auth", "can-i", "create", "pods", *user).stdout.strip() == "no":
                role = f"--clusterrole=edit --serviceaccount={self.namespace}:{self.account}"
                role = role if user else "--clusterrole=edit --user=NAME"
                raise HostError(
                    f"{name} may not create pods in the namespace {self.namespace}: "
                    f"kubectl create rolebinding spark --namespace {self.namespace} {role}"
                )

    def run(self, arguments: list[str]) -> int:
        """Submit, follow the driver's pod to its end, and return its exit code.

        Raises:
            HostError: the API server refused the run, or the pod cannot start.
            RunError: the driver was lost.
        """
        ours = ["spark.kubernetes.submission.waitAppCompletion=false", f"spark.kubernetes.driver.pod.name={self.pod}"]
        ours += [f"spark.kubernetes.executor.label.spark-vision-driver={self.pod}"]
        options = [part for setting in ours for part in ("--conf", setting)]
        with _spark_submit([*options, *arguments]) as process:
            text = process.stderr.read()
        if process.returncode:
            raise HostError(f"Kubernetes refused the run: {spark_cause(text)}")
        print(f"pod {self.pod}: submitted", file=sys.stderr)
        self._await_start()
        ended = threading.Event()
        watch = threading.Thread(target=self._watch_executors, args=(ended,), daemon=True)
        watch.start()
        last = ""
        for line in self._log():
            print(last, end="", file=sys.stderr)
            last = line
        ended.set()
        watch.join()
        code, reason = self._end()
        if code not in (0, 1, 2):
            print(last, end="", file=sys.stderr)
            raise RunError(f"the driver's pod {self.pod} did not end by itself: {reason}; what is finished is kept")
        _tell_last(last.rstrip("\n"), code)
        return code

    def _await_start(self) -> None:
        started = told = time.monotonic()
        known = ""
        while True:
            pod = self._json("get", "pod", self.pod)
            if pod.get("status", {}).get("phase") != "Pending":
                return
            if reason := _hopeless(pod):
                message = self._warning(self.pod) or reason
                self._kubectl("delete", "pod", self.pod, "--wait=false")
                raise HostError(f"the driver's pod cannot start (image {self.image}): {message}; correct that")
            obstacle = _obstacle(pod)
            if obstacle not in ("", known) or time.monotonic() - told > PATIENCE_SECONDS:
                told, known = time.monotonic(), obstacle
                message = obstacle or self._warning(self.pod) or "no event says why"
                print(f"pod {self.pod}: waits since {told - started:.0f} s: {message}", file=sys.stderr)
            time.sleep(POLL_SECONDS)

    def _watch_executors(self, ended: threading.Event) -> None:
        """Tell why executors do not start: at once what Kubernetes knows, and again as long as some do not."""
        told, known = time.monotonic(), ""
        while not ended.wait(LOOK_SECONDS):
            pods = self._json("get", "pods", "--selector", f"spark-vision-driver={self.pod}").get("items", [])
            waiting = [pod for pod in pods if pod["status"].get("phase") == "Pending"]
            obstacle = next(filter(None, map(_obstacle, waiting)), "")
            if waiting and (obstacle not in ("", known) or time.monotonic() - told > PATIENCE_SECONDS):
                told, known = time.monotonic(), obstacle
                if message := obstacle or self._warning(waiting[0]["metadata"]["name"]):
                    print(f"{len(waiting)} of {len(pods)} executors wait: {message}", file=sys.stderr)

    def _log(self) -> Iterator[str]:
        """The lines of the driver's log until its end, whatever becomes of a connection."""
        since: list[str] = []
        while True:
            command = self._command("logs", "--follow", self.pod, *since)
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                yield from process.stdout or ()
            broken = time.monotonic()
            while time.monotonic() - broken < LAG_SECONDS:
                if self._json("get", "pod", self.pod).get("status", {}).get("phase") != "Running":
                    return
                time.sleep(POLL_SECONDS)
            since = [f"--since={time.monotonic() - broken:.0f}s"]

    def _end(self) -> tuple[int | None, str]:
        """The driver's exit code, and what Kubernetes calls its end; none of a pod that is gone."""
        pod = self._json("get", "pod", self.pod)
        states = [status.get("state", {}) for status in pod.get("status", {}).get("containerStatuses", [])]
        ended = next((state["terminated"] for state in states if "terminated" in state), {})
        return ended.get("exitCode"), ended.get("reason", "it is gone")

    def _warning(self, pod: str) -> str:
        """What the last warning about a pod says."""
        chosen = f"involvedObject.name={pod},type=Warning"
        events = self._json("get", "events", "--field-selector", chosen, "--sort-by", ".lastTimestamp").get("items", [])
        messages = [event.get("message", "") for event in events]
        # What follows a cause only names a state, such as `Error: ErrImagePull`.
        useful = [message for message in messages if message and not re.fullmatch(r"Error: \w+", message)]
        return first_line(useful[-1]) if useful else ""

    def _json(self, *arguments: str) -> dict[str, Any]:
        answer = self._kubectl(*arguments, "--output", "json").stdout
        return json.loads(answer) if answer else {}

    def _kubectl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command(*arguments), capture_output=True, text=True, check=False)

    def _command(self, *arguments: str) -> list[str]:
        return ["kubectl", "--server", self.server, "--namespace", self.namespace, *arguments]


def _tell_last(line: str, code: int) -> None:
    """The last line of a driver's log: the summary of a run that has ended, or an error."""
    print(line, file=sys.stdout if code in (0, 1) and line.startswith("{") else sys.stderr)


def _hopeless(pod: dict[str, Any]) -> str:
    """Why a pod cannot start; empty where it may."""
    states = [status.get("state", {}) for status in pod.get("status", {}).get("containerStatuses", [])]
    reasons = [state["waiting"].get("reason", "") for state in states if "waiting" in state]
    return next((reason for reason in reasons if reason in HOPELESS), "")


def _obstacle(pod: dict[str, Any]) -> str:
    """What keeps a pod from starting, as its status says long before an event is due; empty where nothing does yet."""
    status = pod.get("status", {})
    unplaced = [part for part in status.get("conditions", []) if part.get("reason") == "Unschedulable"]
    waits = [state.get("state", {}).get("waiting", {}) for state in status.get("containerStatuses", [])]
    unpulled = [state for state in waits if state.get("reason") == "ErrImagePull"]
    return next((first_line(part["message"]) for part in unplaced + unpulled if part.get("message")), "")


def prepare(location: str, archive: str) -> None:
    """Put Spark's jars and the archive of `make pack` where every node can read and keep them.

    Raises:
        ConfigError: the location is a path of this machine.
        HostError: there is no archive, or Hadoop cannot write there.
    """
    if not urlsplit(location).scheme:
        raise ConfigError(f"{location}: name a location that every node reaches, such as hdfs:///spark-vision")
    check_archive(archive)
    with tempfile.TemporaryDirectory() as folder:
        libraries = Path(folder, "spark.zip")
        with zipfile.ZipFile(libraries, "w", zipfile.ZIP_STORED) as package:
            for jar in sorted((SPARK_HOME / "jars").glob("*.jar")):
                package.write(jar, jar.name)
        files = [libraries.as_uri(), Path(archive).resolve().as_uri()]
        # YARN shares what everybody may read among the users of a node.
        readable = ["org.apache.hadoop.fs.FsShell", "-D", "fs.permissions.umask-mode=022"]
        for name, *rest in (["mkdir", "-p", location], ["put", "-f", *files, location]):
            answer = _spark_class(*readable, f"-{name}", *rest)
            if failed := [line for line in answer.splitlines() if line.startswith(f"{name}: ")]:
                raise HostError(f"{location} cannot be prepared: {first_line(failed[0])}")
    print(f"PREPARED={location} conf/yarn.sh SOURCE MODEL OUTPUT")


def _spark_class(*arguments: str) -> str:
    """What a class of Spark's or Hadoop's prints."""
    return _output([str(SPARK_HOME / "bin" / "spark-class"), *arguments])


def _output(command: list[str]) -> str:
    """What a command prints on both of its streams."""
    environment = {**os.environ, "SPARK_HOME": str(SPARK_HOME), "SPARK_SUBMIT_OPTS": _java_options()}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, env=environment, text=True, check=False, **pipes).stdout


@contextlib.contextmanager
def _spark_submit(arguments: list[str], client_level: str = "error") -> Iterator[Any]:
    """spark-submit with its errors in a pipe; YARN's client tells at the level `info` what becomes of a run."""
    environment = {**os.environ, "SPARK_HOME": str(SPARK_HOME)}
    brief = "" if os.environ.get("SPARK_SUBMIT_OPTS") else f"{BRIEF} "  # Java refuses two collectors
    environment["SPARK_SUBMIT_OPTS"] = f"{brief}{_java_options()} -Dsubmission.level={client_level}"
    # Spark asks the name service for this machine's name, and waits for it where that does not answer.
    environment.setdefault("SPARK_LOCAL_HOSTNAME", "localhost")
    command = [str(SPARK_HOME / "bin" / "spark-submit"), *arguments]
    with subprocess.Popen(command, env=environment, stdout=sys.stderr, stderr=subprocess.PIPE, text=True) as process:
        yield process


def _application(arguments: list[str]) -> int:
    """Where Spark's options end."""
    return next(i for i, argument in enumerate(arguments) if argument.endswith("submit.py"))


def _java_options() -> str:
    return f"{os.environ.get('SPARK_SUBMIT_OPTS', '')} {LOG}".strip()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        print("the run goes on in the cluster; end it there", file=sys.stderr)
        sys.exit(130)
