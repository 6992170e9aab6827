"""One way to a Spark session on every host, with `helpers` importable in its tasks.

Differences between hosts live in `conf/` and here. Only DataFrame calls that Spark Connect has are used.
"""

import atexit
import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from helpers.config import CONF, PACKAGE, PROJECT, Config
from helpers.errors import HostError, first_line
from helpers.java import Jvm, check_java, find_java, jvm_command, local_options
from helpers.memory import name_process
from helpers.redaction import redact
from helpers.temporary import user_folder

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

log = logging.getLogger(__name__)

SESSION_SETTINGS = {
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    # Rows with an image's bytes are large: what crosses to Python at once is bounded in both.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
    "spark.sql.execution.arrow.maxBytesPerBatch": str(16 * 2**20),
    "spark.sql.session.timeZone": "UTC",
}
# Without Spark's page, which takes a moment to start, and without need of a host name that resolves.
ON_THIS_MACHINE = {
    "spark.ui.enabled": "false",
    "spark.driver.host": "localhost",
    "spark.driver.bindAddress": "127.0.0.1",
}
# Settings and variables of such a name are hidden in Spark's pages and event log; its own default knows fewer.
REDACTED_NAMES = "(?i)secret|password|passwd|pwd|token|credential|signature|sas|key"
PACKAGES_REMEDY = "the workers lack packages of requirements.txt; install them on every worker, or send them along: \
`make pack`, then --set spark.environment=out/pack/vision.tar.gz"
CAUSE = re.compile(r"^(?:Caused by: |Exception in thread \"main\" |: )?(?:[\w$]+\.)+[\w$]*(?:Exception|Error): (?=\S)")
# How YARN tells why an application failed, beside which attempt it was.
YARN_DIAGNOSTICS = re.compile(r"Failing this attempt\.Diagnostics: (?:\[[^\]]*\]\s*)?(\S.*)")
CAUSE_REMEDIES = {
    r"unknown queue": "name one that is there: --conf spark.yarn.queue=NAME",
    r"cannot submit applications to queue": "ask for the right to, or name another: --conf spark.yarn.queue=NAME",
    r"namespaces .* not found": "create it with `kubectl create namespace`, or set NAMESPACE",
    r"serviceaccounts? .*not found": "create it with `kubectl create serviceaccount`, or set ACCOUNT",
    r"[Ff]orbidden|cannot \w+ resource": "give the account the role: kubectl create rolebinding spark \
--clusterrole=edit --serviceaccount=NAMESPACE:ACCOUNT, or --user=NAME",
}
PATIENCE_SECONDS = 30.0  # in which nothing is said while a run waits for its first executor
DAEMON = "helpers.pipeline.daemon"  # which this machine's workers are forked from
PYTHONPATH = "spark.executorEnv.PYTHONPATH"
UNPACKED = "environment"  # the folder of a packed environment in an executor's working directory
NO_CATALOG = "Sail's catalog ends with its session; set spark.mode=local, which needs Java"
SAIL_REMEDY = "install it with `pip install pysail==0.7.2`, or set spark.mode=local, which needs Java"

_told: "weakref.WeakKeyDictionary[SparkSession, int]" = weakref.WeakKeyDictionary()  # executors, where some lack
_shipped: "weakref.WeakKeyDictionary[SparkSession, str]" = weakref.WeakKeyDictionary()
_jvm: Jvm | None = None  # which `get_spark` is to connect to
_sail_slots: "weakref.WeakKeyDictionary[SparkSession, int]" = weakref.WeakKeyDictionary()  # of sessions on Sail


@contextlib.contextmanager
def starting(config: Config) -> Iterator[None]:
    """Have the JVM of a local session start beside the block, for `get_spark`; it ends where the block fails.

    Raises:
        HostError: `spark.master` is no address of a master, or has a user or password in it.
    """
    global _jvm
    check_master(config)
    config = with_mode(config)
    if config.spark.mode == "local" and (command := jvm_command(_settings(config))):
        _jvm = Jvm(command)
    try:
        yield
    except BaseException:
        if _jvm:
            _jvm.end()
            _jvm = None
        raise


def choose_mode(config: Config, *uses: str) -> tuple[str, str]:
    """Return the `spark.mode` of a session and why, where `auto` leaves it open.

    Args:
        config: settings.
        uses: the locations of a run, if the session is for one; what others ask of it may be anything.
    """
    spark = config.spark
    if spark.mode != "auto":
        return spark.mode, "it is set"
    if not find_spec("pysail"):
        return "local", "pysail is not installed"
    if _local_cores(spark.master) is None:
        return "local", "spark.master names a cluster"
    if spark.conf:
        return "local", f"{next(iter(spark.conf))} is a setting of Spark"
    if uses:
        reasons = [
            f"{use.partition(':')[0]}: needs Spark itself" for use in uses if re.match("table:|cloudFiles:", use)
        ]
        return ("local", reasons[0]) if reasons else ("sail", "pysail is installed")
    return ("local", "it can do anything") if find_java() else ("sail", "there is no Java")


def with_mode(config: Config, *uses: str) -> Config:
    """The settings with the mode of `choose_mode`."""
    mode, _ = choose_mode(config, *uses)
    return config.model_copy(update={"spark": config.spark.model_copy(update={"mode": mode})})


def get_spark(config: Config) -> "SparkSession":
    """Return the host's session, or make one, and ship `helpers` to its executors.

    Raises:
        HostError: Java is missing or too old, or the cluster does not answer.
    """
    from pyspark.sql import SparkSession

    config = with_mode(config)
    builder = SparkSession.builder.appName(config.spark.app_name)
    check_master(config)
    if config.spark.mode == "connect":
        check_answers(config.spark.master)
        builder = builder.remote(_master(config))
    elif config.spark.mode == "sail":
        builder = builder.remote("sc://127.0.0.1:{1}".format(*_start_sail().listening_address))
    elif config.spark.mode in ("local", "cluster"):
        builder = builder.master(_master(config))
    own_jvm = _has_own_jvm(config)
    if own_jvm and not _jvm:
        check_java()
    for key, value in _settings(config).items():
        builder = builder.config(key, value)
    gateway = _jvm.gateway if _jvm else {}
    try:
        with warnings.catch_warnings(), _variables(gateway):
            if _is_local_connect(config):
                # The server has taken them when it was started; its first session then cannot take them once more.
                warnings.filterwarnings("ignore", "Failed to set", UserWarning)
            spark = builder.getOrCreate()
    except Exception as error:
        message = spark_cause(str(error).replace(config.spark.master, shown_master(config)))
        raise HostError(f"no Spark session from {shown_master(config)}: {message}") from None
    if config.spark.mode == "sail":
        _sail_slots[spark] = _count_slots(_local_cores(config.spark.master) or "*")
        if threading.current_thread() is threading.main_thread():
            # The server ends itself on Ctrl-C, and its client would look for it for ten minutes. So only Python hears.
            signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        return spark
    if not own_jvm:
        set_where_allowed(spark, SESSION_SETTINGS)
    ship_helpers(spark)
    return spark


def get_slots(spark: "SparkSession") -> int:
    """How many tasks run at once, on the executors that are there; waits for the first one.

    Spark itself waits for the others, up to `spark.wait_seconds`, before it starts the first job.

    Raises:
        HostError: the workers cannot run a task.
    """
    local = local_slots(spark)
    if local is not None:
        return local
    with ThreadPoolExecutor(1) as pool:
        try:
            cores = _patiently(pool.submit(_cores, spark))
        except Exception as error:  # such as a package that the workers lack
            raise HostError(f"the workers cannot run a task: {spark_failure(error)}") from None
    slots, asked = max(1, cores // _number(spark, "spark.task.cpus", 1)), _asked_executors(spark)
    of_each = max(1, _number(spark, "spark.executor.cores", 1) // _number(spark, "spark.task.cpus", 1))
    if slots // of_each < asked and _told.get(spark) != slots // of_each:
        _told[spark] = slots // of_each
        log.warning("%d of %d executors came; the plan goes by these", slots // of_each, asked)
    return slots


def expected_slots(spark: "SparkSession") -> int:
    """How many tasks may run at once later: on executors that were asked for, or that Spark may add; 0 if unknown."""
    most = _number(spark, "spark.dynamicAllocation.maxExecutors", 0) if _is_dynamic(spark) else _asked_executors(spark)
    return most * max(1, _number(spark, "spark.executor.cores", 1) // _number(spark, "spark.task.cpus", 1))


def local_slots(spark: "SparkSession") -> int | None:
    """Return how many tasks run at once in local mode; None on a cluster, whose size may change."""
    if is_sail(spark):
        return _sail_slots[spark]
    # A Connect server may run on another machine, so that its `local` is not this one's.
    remote = type(spark).__module__.startswith("pyspark.sql.connect.")
    cores = _local_cores(spark.conf.get("spark.master", "") or "")
    if remote or cores is None:
        return None
    return max(1, _count_slots(cores) // int(spark.conf.get("spark.task.cpus", "1") or 1))


def is_sail(spark: "SparkSession") -> bool:
    """Whether tasks are threads of this process (`helpers.pipeline.sail`)."""
    return spark in _sail_slots


def _local_cores(master: str) -> str | None:
    """What stands in a `local[N]`: a number or `*`; None of another master."""
    local = re.fullmatch(r"local(?:\[\s*(\d+|\*)\s*(?:,.*)?\])?", master)
    return (local[1] or "1") if local else None


def _count_slots(cores: str) -> int:
    return count_cores() if cores == "*" else int(cores)


def count_cores() -> int:
    """Return the cores that this process may use; all cores where the system does not tell (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_where_allowed(spark: "SparkSession", settings: dict[str, str]) -> None:
    """Change settings of a session that somebody else has set up; the log tells which it keeps to itself.

    Databricks serverless refuses all but a few, and does well without ours.
    """
    from pyspark.errors import PySparkException

    for key, value in settings.items():
        try:
            spark.conf.set(key, value)
        except PySparkException:
            log.info("this Spark keeps its own %s", key)


def spark_schema(schema: "pa.Schema") -> "StructType":
    """The Spark schema of an Arrow schema."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema, prefer_timestamp_ntz=True)  # else a time without a zone would be one of UTC


def spark_failure(error: Exception) -> str:
    """Return one line that says why a Spark job failed: the project's own error if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if re.match(r"helpers\.errors\.\w+: ", line)]
    # What follows a traceback, after its indented lines, is the exception, whatever its name and whether it says more.
    python = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)+(\S.*)", str(error))
    python = python or [line for line in lines if re.match(r"[\w.]*(Error|Exception|Expired|Exit): ", line)]
    crashed = [text[0] for text in re.finditer(r"Python\s+worker exited unexpectedly[^.\n]*", str(error))]
    message = (ours or python or crashed or lines or [type(error).__name__])[-1 if ours or python else 0]
    remedy = f": {PACKAGES_REMEDY}" if re.match(r"ModuleNotFoundError|PySparkImportError", message) else ""
    return redact(re.sub(r"^helpers\.errors\.\w+: ", "", message) + remedy)


def spark_cause(text: str) -> str:
    """Return the last cause in what the JVM says of a failure, with a remedy where there is one; its first line else.

    Py4J and spark-submit begin with the call that failed, and end with what made it fail.
    """
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if CAUSE.match(line)]
    causes = [line for line in named if line.startswith("Caused by: ")] or named[:1] or [first_line(text)]
    # Kubernetes' client repeats the answer as a structure.
    message = re.sub(r"^.* Message: (.+?)\.? Received status: .*", r"\1", CAUSE.sub("", causes[-1]))
    if why := YARN_DIAGNOSTICS.search(text):
        message = f"{message.rstrip()}: {why[1]}"
    remedy = next((remedy for pattern, remedy in CAUSE_REMEDIES.items() if re.search(pattern, message)), "")
    return redact(f"{message}: {remedy}" if remedy else message)


def shown_master(config: Config) -> str:
    """The master or remote without the parameters of a remote, among which may be a token, and without a user."""
    return re.sub(r"//.*@", "//", config.spark.master.partition(";")[0].rstrip("/"))


def check_master(config: Config) -> None:
    """Refuse what Spark would repeat in its own words, which may be a secret.

    Raises:
        HostError: `spark.master` is no address of a master, or has a user or password in it.
    """
    address = config.spark.master.partition(";")[0]
    if not re.match(r"(local(-cluster)?(\[|$)|yarn$|(spark|k8s|sc)://)", address):
        raise HostError(
            "spark.master is no master: write local[N], spark://HOST:PORT, yarn, k8s://URL or sc://HOST:PORT"
        )
    if "@" in address:
        raise HostError("spark.master has a user in its address, which no master takes: leave all before the @ out")


def check_answers(remote: str) -> None:
    """Fail at once where no Connect server listens: pyspark would try again for ten minutes.

    Raises:
        HostError: nothing listens at an `sc://` address, or it is malformed.
    """
    url = urlsplit(remote)
    if url.scheme != "sc":
        return
    if ";" in url.netloc:  # pyspark's message would repeat it, with a token that may be in it
        raise HostError("spark.master lacks the slash before its parameters: sc://HOST:PORT/;NAME=VALUE")
    try:
        socket.create_connection((url.hostname or "", url.port or 15002), timeout=10).close()
    except OSError as error:
        where = f"no Spark Connect server answers at {url.hostname}:{url.port or 15002} ({error.strerror or error})"
        raise HostError(f"{where}: start one with sbin/start-connect-server.sh, or correct spark.master") from None


def find_environment(config: Config) -> str:
    """Where the packed environment of `spark.environment` is.

    Raises:
        HostError: it is a path, and there is no such file.
    """
    location = config.spark.environment or ""
    if "://" in location:
        return location
    archive = PROJECT / location
    if not archive.is_file():
        raise HostError(f"there is no packed environment {archive}: make it with `make pack`")
    return archive.as_uri()


def ship_helpers(spark: "SparkSession") -> None:
    """Make `import helpers` work in the tasks of this session; a second call ships nothing.

    Raises:
        HostError: Sail takes nothing, as it runs no trainings.
    """
    if is_sail(spark):
        raise HostError("a training on Spark's tasks needs Spark itself: set spark.mode=local, which needs Java")
    archive = pack_helpers()
    if _shipped.get(spark) != archive.name:
        spark.addArtifacts(str(archive), pyfile=True)
        # Of this process Spark does the same, where the archive, without `conf`, would hide the package it is made of
        # from what this process starts.
        sys.path[:] = [place for place in sys.path if Path(place).name != archive.name]
        _shipped[spark] = archive.name


def pack_helpers() -> Path:
    """The archive of the package."""
    return keep_archive("helpers", zip_files(PACKAGE.rglob("*.py"), PACKAGE.parent))


def keep_archive(name: str, content: bytes) -> Path:
    """Write an archive for executors to fetch; its hash is in its name, so that an edited module is in another archive.

    An archive that is there already is used only if it is the same, byte for byte.
    """
    folder = user_folder() or process_folder()
    archive = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.zip"
    if not archive.is_file() or archive.read_bytes() != content:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as unfinished:
            unfinished.write(content)
        Path(unfinished.name).replace(archive)
    return archive


def zip_files(files: Iterable[Path], root: Path) -> bytes:
    """A zip archive whose bytes depend on the files' names below the root and on their contents alone."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as package:
        for file in sorted(files):
            # Without a time, which `ZipInfo` sets to 1980.
            entry = zipfile.ZipInfo(str(file.relative_to(root)))
            package.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    return archive.getvalue()


@functools.cache
def process_folder() -> Path:
    """A folder of this process, removed when it ends."""
    folder = tempfile.mkdtemp(prefix="spark-vision-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _patiently(cores: "Future[int]") -> int:
    """The answer of a first job, and every now and then a word that it has nowhere to run."""
    started = time.monotonic()
    while True:
        try:
            return cores.result(PATIENCE_SECONDS)
        except TimeoutError:
            waited = time.monotonic() - started
            log.warning("no executor has come for %.0f s: the cluster is full, or it cannot start them", waited)


def _cores(spark: "SparkSession") -> int:
    """The cores of all executors that are there."""
    from pyspark.sql.functions import spark_partition_id

    # A range is divided by the cluster's default parallelism, which Spark Connect has no call to ask for.
    cores = spark.range(1_000_000).select(spark_partition_id()).distinct().count()
    if cores != 2 or not _has_executors(spark):
        return cores
    # Spark says two of a cluster of one core, too. Two tasks then run one after the other in one process.
    tasks = spark.range(2, numPartitions=2).mapInArrow(name_process, "process string")
    return len({row.process for row in tasks.collect()})


def _asked_executors(spark: "SparkSession") -> int:
    """How many executors Spark was told to start; 0 where it decides on their number."""
    return 0 if _is_dynamic(spark) else _number(spark, "spark.executor.instances", 0)


def _is_dynamic(spark: "SparkSession") -> bool:
    return _setting(spark, "spark.dynamicAllocation.enabled") == "true"


def _number(spark: "SparkSession", name: str, default: int) -> int:
    value = _setting(spark, name)
    return int(value) if value.isdigit() else default


@functools.cache
def _start_sail() -> Any:
    """Sail's server, started in this process, once; it ends with its object.

    Raises:
        HostError: it is not installed.
    """
    try:
        from pysail.spark import SparkConnectServer
    except ImportError:
        raise HostError(f"Sail is not installed: {SAIL_REMEDY}") from None
    os.environ.setdefault("RUST_LOG", "warn")
    os.environ.setdefault("SAIL_EXECUTION__BATCH_SIZE", "100")  # rows, which may have the bytes of an image each
    server = SparkConnectServer(ip="127.0.0.1", port=0)
    server.start(background=True)
    return server


def _setting(spark: "SparkSession", name: str) -> str:
    """A setting of executors; empty where they are another's, such as those of a runtime that hides their settings."""
    return spark.conf.get(name, "") or "" if _has_executors(spark) else ""


def _has_executors(spark: "SparkSession") -> bool:
    return bool(re.match(r"spark:|yarn|k8s:", spark.conf.get("spark.master", "") or ""))


def _is_local_connect(config: Config) -> bool:
    """Whether this process starts the Connect server itself, as pyspark does for `remote("local[2]")`."""
    return config.spark.mode == "connect" and config.spark.master.startswith("local")


def _master(config: Config) -> str:
    # local[N] tries each task once; local[N,F] tries it F times, as a cluster does.
    local = re.fullmatch(r"local(?:\[([^,\]]+)\])?", config.spark.master)
    return f"local[{local[1] or 1},{config.spark.task_attempts}]" if local else config.spark.master


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Set variables of this process's environment for the block only: nothing else that it starts is to see them."""
    os.environ |= values
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def _has_own_jvm(config: Config) -> bool:
    """Whether this process starts the JVM of its session."""
    return config.spark.mode in ("local", "cluster") or _is_local_connect(config)


def _settings(config: Config) -> dict[str, str]:
    """What Spark is told of a session."""
    own = {**_jvm_settings(config), **SESSION_SETTINGS} if _has_own_jvm(config) else {}
    return {**own, **config.spark.conf}


def _jvm_settings(config: Config) -> dict[str, str]:
    """What Spark is told where this process starts its JVM, and how its workers find their Python."""
    spark, is_cluster = config.spark, config.spark.mode == "cluster"
    log4j = f"-Dlog4j2.configurationFile={(CONF / 'log4j2.properties').as_uri()}"
    settings = {
        # Tasks take and free one batch after another. Their Arrow keeps memory for so many milliseconds, its default,
        # where the driver's gives it back at once (`helpers`).
        "spark.executorEnv.MIMALLOC_PURGE_DELAY": "10",
        "spark.driver.memory": spark.driver_memory,
        "spark.driver.extraJavaOptions": log4j if is_cluster else f"{log4j} {local_options()}",
        "spark.task.maxFailures": str(spark.task_attempts),
        "spark.ui.showConsoleProgress": "false",
        "spark.redaction.regex": REDACTED_NAMES,
    }
    if not is_cluster:
        settings |= ON_THIS_MACHINE
    else:
        # A plan goes by the executors that are there, so it pays to wait for all of them, and not for ever.
        settings["spark.scheduler.minRegisteredResourcesRatio"] = "1.0"
        settings["spark.scheduler.maxRegisteredResourcesWaitingTime"] = f"{spark.wait_seconds}s"
        # A training looks for its slots so often, for ten minutes in all: by default every 15 seconds, 40 times.
        settings["spark.scheduler.barrier.maxConcurrentTasksCheck.interval"] = "1s"
        settings["spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures"] = "600"
    if is_cluster and config.inference.device in ("GPU", "CUDA"):
        settings["spark.executor.resource.gpu.amount"] = "1"
        settings["spark.task.resource.gpu.amount"] = str(config.inference.gpu_share)
    if is_cluster and spark.environment:
        settings["spark.archives"] = f"{find_environment(config)}#{UNPACKED}"
        os.environ["PYSPARK_PYTHON"] = f"./{UNPACKED}/bin/python"
    else:
        # Workers run the interpreter that runs the driver, not the first python3 on the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if spark.mode == "local" and PYTHONPATH not in spark.conf:
        # It must find this package, which the archive of `ship_helpers` brings with the first task only.
        settings |= {"spark.python.daemon.module": DAEMON, PYTHONPATH: str(PACKAGE.parent)}
    return settings
