"""The Java that Spark runs on: whether there is one, how it is started, and an archive of Spark's classes.

    python -m helpers.hosts.java            which Java Spark will start; exits with 1 and the remedy if there is none
    python -m helpers.hosts.java archive    make the archive of this environment

Most of a small job's start is the JVM reading and verifying thousands of classes from Spark's jars. An archive of them
in the JVM's own form (class-data sharing, JEP 350) halves that. It belongs to one Java and one set of jars; the JVM
passes over an archive of others, or a damaged one, by itself.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.errors import HostError

MINIMUM_JAVA = 17
JAVA_REMEDY = "install it with `apt-get install openjdk-17-jre-headless` (Debian), `brew install openjdk@17` (macOS) \
or from adoptium.net, and set JAVA_HOME if it is not on the PATH"

ARCHIVE = Path(sys.prefix, "spark-classes.jsa")


def local_options() -> str:
    """Options of a JVM that is master and executor in one."""
    # Short jobs on few cores: the optimising compiler and the parallel collector start threads that cost more
    # processor time than they save, because the images are worked on in Python, not in the JVM.
    options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    return f'{options} "-XX:SharedArchiveFile={ARCHIVE}"' if ARCHIVE.exists() else options


def make_archive(archive: Path = ARCHIVE) -> None:
    """Archive the classes that a small run of this project's kind loads; takes some seconds.

    Raises:
        HostError: there is no usable Java, or its JVM made no archive; says what it wrote instead.
    """
    check_java()
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        unfinished = Path(folder, archive.name)
        # In a process of its own, because the JVM writes the archive when it ends. It ends after the process that
        # started it, and holds the pipe open until then.
        program = f"from helpers.hosts.java import _load_classes; _load_classes({str(unfinished)!r})"
        command = [sys.executable, "-c", program]
        process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not unfinished.exists():
            raise HostError(f"no archive of Spark's classes was made:\n{process.stdout[-2000:]}")
        unfinished.replace(archive)


def check_java() -> str:
    """Return the version of the Java that Spark will start.

    Raises:
        HostError: there is none, or it is older than Spark needs.
    """
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else shutil.which("java")
    if not java or not Path(java).exists():
        where = f"JAVA_HOME is {home}, which has no bin/java" if home else "there is no java on the PATH"
        raise HostError(f"Spark needs Java {MINIMUM_JAVA} or newer, and {where}: {JAVA_REMEDY}.")
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    except OSError as error:
        raise HostError(f"Spark needs Java, and {java} cannot be started ({error.strerror}): {JAVA_REMEDY}.") from None
    version = re.search(r'version "((\d+)[^"]*)"', answer)
    if version is None or int(version[2]) < MINIMUM_JAVA:
        found = version[1] if version else answer.strip()
        raise HostError(f"Spark needs Java {MINIMUM_JAVA} or newer, and {java} is {found}: {JAVA_REMEDY}.")
    return version[1]


def _load_classes(archive: str) -> None:
    """Start a session, which does what a run does, in a JVM that writes an archive when it ends."""
    from helpers.config import load_config
    from helpers.session import get_spark

    options = f'-XX:+UseSerialGC "-XX:ArchiveClassesAtExit={archive}"'
    get_spark(load_config("local", spark={"conf": {"spark.driver.extraJavaOptions": options}})).stop()


if __name__ == "__main__":
    try:
        make_archive() if sys.argv[1:] == ["archive"] else print(check_java())
    except HostError as error:
        sys.exit(str(error))
