"""Spark with Delta Lake in a process of its own, because a process has one JVM and this one's has no Delta."""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.config import CONF, Config, load_config
from helpers.java import local_options
from helpers.session import get_spark

POM = """<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>tests</groupId><artifactId>delta</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>io.delta</groupId><artifactId>delta-spark_4.1_2.13</artifactId><version>4.1.0</version>
  </dependency></dependencies>
</project>
"""
LIBRARIES = Path(sys.prefix, "delta")  # Delta Lake's and all that it names, once per environment
JARS = ("delta-spark", "delta-storage", "unitycatalog-client")  # Spark has the others

# Half of Spark's time for tables of a few rows: a plan is run once, so that code made for it does not pay; checksums
# and permissions of local files are a process each.
FAST = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.shuffle.partitions": "1",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.databricks.delta.stats.collect": "false",
    "spark.databricks.delta.stats.skipping": "false",
    "spark.hadoop.fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
    "spark.hadoop.fs.AbstractFileSystem.file.impl": "org.apache.hadoop.fs.local.RawLocalFs",
}
LOG_SETTINGS = (CONF / "log4j2.properties").as_uri()
FOR_LONG = "-Xmn128m -XX:ReservedCodeCacheSize=200m"  # this JVM does not end after one run: less garbage collection

_spark_conf: dict[str, str] = {}


@contextlib.contextmanager
def delta_process(folder: Path) -> Iterator[Callable[..., Any]]:
    """A function that runs another one there, where `settings` and `session` are Spark's with Delta."""
    conf = {
        "spark.jars": ",".join(map(str, _jars())),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.streaming.schemaInference": "true",  # which Auto Loader needs no word for
        **FAST,
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={LOG_SETTINGS} {local_options()} {FOR_LONG}",
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _configure, (conf,)) as pool:
        yield lambda function, *arguments, **named: pool.submit(function, *arguments, **named).result()
        pool.submit(_stop).result()


def settings(**overrides: Any) -> Config:
    """Those of the process with Delta."""
    values = {"spark.master": "local[2]", "pictures": 0, "postprocess.top_k": 1, "spark.conf": _spark_conf}
    return load_config("local", **{**values, **overrides})


def session():
    return get_spark(settings())


def _configure(conf: dict[str, str]) -> None:
    _spark_conf.update(conf)


def _stop() -> None:
    session().stop()


def _jars() -> list[Path]:
    """Delta Lake's jars, which Maven knows how to get through any proxy or mirror of this machine."""
    if not shutil.which("mvn"):
        why = "Delta Lake's jars come by Maven, and there is no mvn here"
        if not os.environ.get("CI"):
            pytest.skip(why)
        raise AssertionError(why)
    kept = LIBRARIES / hashlib.sha256(POM.encode()).hexdigest()[:12]  # another version is another folder
    LIBRARIES.mkdir(exist_ok=True)
    with (LIBRARIES / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=LIBRARIES) as folder:
                Path(folder, "pom.xml").write_text(POM)
                command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"]
                answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
                assert answer.returncode == 0, answer.stdout + answer.stderr
                Path(folder, "jars").rename(kept)
    jars = [jar for jar in kept.iterdir() if jar.name.startswith(JARS)]
    assert len(jars) == len(JARS), jars
    return jars
