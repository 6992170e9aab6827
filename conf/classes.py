"""An archive of Spark's classes for the JVM, made at set-up: `python conf/classes.py`.

A small job's start mostly goes into the JVM's reading and verification of thousands of classes from Spark's jars. An
archive of them in the JVM's own form (class-data sharing, JEP 350) halves that time. An archive belongs to one Java and
one set of jars. The JVM ignores an archive of others, or a damaged one, by itself.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import pipeline
from helpers.config import load_config
from helpers.errors import HostError
from helpers.java import ARCHIVE, check_java
from helpers.session import get_spark


def make_archive() -> None:
    """Archive the classes that a small run of this project loads; takes some seconds.

    Raises:
        HostError: there is no usable Java, or its JVM made no archive; says what it wrote instead.
    """
    check_java()
    with tempfile.TemporaryDirectory(dir=ARCHIVE.parent) as folder:
        unfinished = Path(folder, ARCHIVE.name)
        # The JVM writes the archive when it ends, so it has a process of its own. It ends after the process that
        # started it, and holds the pipe open until then.
        command = [sys.executable, __file__, str(unfinished)]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not unfinished.exists():
            raise HostError(f"no archive of Spark's classes was made:\n{process.stdout[-2000:]}")
        unfinished.replace(ARCHIVE)


def _load(archive: str) -> None:
    """Do with Spark what a run does, in a JVM that writes an archive when it ends."""
    options = f'-XX:+UseSerialGC "-XX:ArchiveClassesAtExit={archive}"'
    config = load_config("local", spark={"conf": {"spark.driver.extraJavaOptions": options}})
    spark = get_spark(config)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "any.jpg").write_bytes(b"which only a later stage decodes")
        pipeline.ingest(spark, folder, config).collect()
    spark.stop()


if __name__ == "__main__":
    try:
        _load(sys.argv[1]) if sys.argv[1:] else make_archive()
    except HostError as error:
        sys.exit(str(error))
