"""One way to a Spark session on every host, with `helpers` importable in its tasks.

Differences between hosts live in `conf/` and here. Only DataFrame calls that Spark Connect has are used.
"""

import hashlib
import os
import re
import sys
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.config import PROJECT, Config
from helpers.errors import HostError, first_line
from helpers.java import check_java, local_options

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

_shipped: "weakref.WeakKeyDictionary[SparkSession, str]" = weakref.WeakKeyDictionary()


def get_spark(config: Config) -> "SparkSession":
    """Return the host's session, or make one, and ship `helpers` to its executors.

    Raises:
        HostError: Java is missing or too old, or the cluster does not answer.
    """
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName(config.spark.app_name)
    if config.spark.mode == "connect":
        builder = builder.remote(config.spark.master)
    elif config.spark.mode in ("local", "cluster"):
        check_java()
        # Workers run the interpreter that runs the driver, not the first python3 on the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = builder.master(_master(config))
        for key, value in _classic_settings(config).items():
            builder = builder.config(key, value)
    for key, value in config.spark.conf.items():
        builder = builder.config(key, value)
    try:
        spark = builder.getOrCreate()
    except Exception as error:
        raise HostError(f"no Spark session from {config.spark.master}: {first_line(error)}") from error
    new = spark not in _shipped
    ship_helpers(spark)
    if new and config.spark.mode == "local":
        _start_workers(spark)
    return spark


def get_slots(spark: "SparkSession") -> int:
    """How many tasks run at once."""
    local = local_slots(spark)
    if local is not None:
        return local
    from pyspark.sql.functions import spark_partition_id

    # A range is divided by the cluster's default parallelism, which Spark Connect has no call to ask for.
    return spark.range(1_000_000).select(spark_partition_id()).distinct().count()


def local_slots(spark: "SparkSession") -> int | None:
    """How many tasks run at once in local mode; None on a cluster, whose size may change meanwhile."""
    local = re.fullmatch(r"local(?:\[\s*(\d+|\*)\s*(?:,.*)?\])?", spark.conf.get("spark.master", "") or "")
    if local is None:
        return None
    cores = len(os.sched_getaffinity(0)) if local[1] == "*" else int(local[1] or 1)
    return max(1, cores // int(spark.conf.get("spark.task.cpus", "1") or 1))


def spark_schema(schema: "pa.Schema") -> "StructType":
    """The Spark schema of an Arrow schema."""
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(schema)


def spark_failure(error: Exception) -> str:
    """The one line that says what went wrong in a failed Spark job: the project's own error where there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if re.match(r"helpers\.errors\.\w+: ", line)]
    python = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Expired|Exit): ", line)]
    crashed = [text[0] for text in re.finditer(r"Python\s+worker exited unexpectedly[^.\n]*", str(error))]
    found = (ours or python or crashed or lines or [type(error).__name__])[-1 if ours or python else 0]
    return re.sub(r"^helpers\.errors\.\w+: ", "", found)


def ship_helpers(spark: "SparkSession") -> None:
    """Make `import helpers` work in the tasks of this session; a second call ships nothing."""
    archive = pack_helpers()
    if _shipped.get(spark) != archive.name:
        spark.addArtifacts(str(archive), pyfile=True)
        _shipped[spark] = archive.name


def pack_helpers() -> Path:
    """Zip the package; its content is in its name, so that an edited package is another archive."""
    files = sorted((PROJECT / "helpers").rglob("*.py"))
    content = [(str(file.relative_to(PROJECT)), file.read_bytes()) for file in files]
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    archive = Path(tempfile.gettempdir()) / f"spark-vision-{os.getuid()}" / f"helpers-{digest}.zip"
    if not archive.exists():
        archive.parent.mkdir(mode=0o700, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=archive.parent, delete=False) as unfinished,
            zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as package,
        ):
            for file in files:
                package.write(file, file.relative_to(PROJECT))
        Path(unfinished.name).replace(archive)
    return archive


def _start_workers(spark: "SparkSession") -> None:
    """Have a Python worker in each slot import what a run needs, and the JVM load the classes of a run's plan.

    All of it is start-up, which the first run of a fresh session would else wait for with every core idle.
    """
    import pyarrow as pa

    from helpers.task import pass_through

    slots = local_slots(spark) or 1
    table = pa.table({"partition": pa.array(range(slots), pa.int32())})
    frame = spark.createDataFrame(table).repartitionById(slots, "partition")
    frame.mapInArrow(pass_through, frame.schema).collect()


def _master(config: Config) -> str:
    # local[N] tries each task once; local[N,F] tries it F times, as a cluster does.
    local = re.fullmatch(r"local(?:\[([^,\]]+)\])?", config.spark.master)
    return f"local[{local[1] or 1},{config.spark.task_attempts}]" if local else config.spark.master


def _classic_settings(config: Config) -> dict[str, str]:
    log4j = f"-Dlog4j2.configurationFile={(PROJECT / 'conf' / 'log4j2.properties').as_uri()}"
    options = f"{log4j} {local_options()}" if config.spark.mode == "local" else log4j
    return {
        "spark.driver.memory": config.spark.driver_memory,
        "spark.driver.extraJavaOptions": options,
        "spark.task.maxFailures": str(config.spark.task_attempts),
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # Rows with an image's bytes are large: what crosses to Python at once is bounded in both.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "1000",
        "spark.sql.execution.arrow.maxBytesPerBatch": str(16 * 2**20),
        "spark.sql.session.timeZone": "UTC",
    }
