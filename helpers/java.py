"""The Java that Spark runs on: whether there is one, and how it is started.

python -m helpers.java    which Java Spark will start; exits with 1 and the remedy if there is none
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.errors import HostError

MINIMUM_JAVA = 17
JAVA_REMEDY = "install it with `apt-get install openjdk-17-jre-headless` (Debian), `brew install openjdk@17` (macOS) \
or from adoptium.net, and set JAVA_HOME if it is not on the PATH"

ARCHIVE = Path(sys.prefix, "spark-classes.jsa")  # made by `conf/classes.py`


def local_options() -> str:
    """Options of a JVM that is master and executor in one."""
    # Short jobs on few cores: the optimizing compiler and the parallel collector start threads that cost more
    # processor time than they save, because the images are worked on in Python, not in the JVM.
    options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    return f'{options} "-XX:SharedArchiveFile={ARCHIVE}"' if ARCHIVE.exists() else options


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
        description = version[1] if version else answer.strip()
        raise HostError(f"Spark needs Java {MINIMUM_JAVA} or newer, and {java} is {description}: {JAVA_REMEDY}.")
    return version[1]


if __name__ == "__main__":
    try:
        print(check_java())
    except HostError as error:
        sys.exit(str(error))
