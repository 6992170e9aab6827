import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import pyspark
import pytest

from helpers import java, memory, session
from helpers import temporary as temporary_module
from helpers.config import PROJECT, load_config
from helpers.errors import HostError
from helpers.java import check_java
from helpers.session import (
    PACKAGES_REMEDY,
    check_answers,
    expected_slots,
    get_slots,
    local_slots,
    pack_helpers,
    shown_master,
    spark_failure,
)


def install_java(folder: Path, answer: str) -> Path:
    """A JAVA_HOME whose java prints a version."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{answer}\nEND\n")
    java.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ('openjdk version "17.0.12" 2024-07-16', "17.0.12"),
        ('java version "21" 2023-09-19 LTS', "21"),
        ('openjdk version "25-ea" 2025-09-16', "25-ea"),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "17.0.1" 2021-10-19', "17.0.1"),
    ],
)
def test_a_java_that_will_do_is_reported(monkeypatch, tmp_path, line, version):
    monkeypatch.setenv("JAVA_HOME", str(install_java(tmp_path, line)))
    assert check_java() == version


@pytest.fixture
def no_java_home(monkeypatch):
    """Neither a variable nor a package says where Java is."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java, "JAVA_PACKAGE", "not_there==1")


def test_java_is_found_on_the_path_without_java_home(no_java_home, monkeypatch, tmp_path):
    home = install_java(tmp_path, 'openjdk version "99.1"')
    monkeypatch.setenv("PATH", f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert check_java() == "99.1"


def assert_one_sentence_with_remedy(message: str) -> None:
    assert "\n" not in message
    assert "Java 17 or newer" in message and "apt-get install openjdk-17-jre-headless" in message


def test_java_missing_from_the_path_has_a_remedy(no_java_home, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="no java on the PATH") as error:
        check_java()
    assert_one_sentence_with_remedy(str(error.value))


def test_a_java_home_that_leads_nowhere_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "gone"))
    with pytest.raises(HostError, match=f"JAVA_HOME is {tmp_path}/gone") as error:
        check_java()
    assert_one_sentence_with_remedy(str(error.value))


@pytest.mark.parametrize(
    ("line", "found"), [('openjdk version "11.0.24" 2024-07-16', "11.0.24"), ('java version "1.8.0_292"', "1.8.0_292")]
)
def test_a_java_that_is_too_old_is_named_with_its_version(monkeypatch, tmp_path, line, found):
    monkeypatch.setenv("JAVA_HOME", str(install_java(tmp_path, line)))
    with pytest.raises(HostError) as error:
        check_java()
    assert found in str(error.value) and str(tmp_path) in str(error.value)
    assert_one_sentence_with_remedy(str(error.value))


def test_a_java_that_prints_something_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("JAVA_HOME", str(install_java(tmp_path, "Please install a Java runtime.")))
    with pytest.raises(HostError, match="Please install"):
        check_java()


@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_a_java_that_cannot_be_started_is_refused(monkeypatch, tmp_path, mode):
    java = install_java(tmp_path, "") / "bin" / "java"
    java.write_bytes(b"\x7fELF of another machine")
    java.chmod(mode)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(HostError) as error:
        check_java()
    assert str(tmp_path) in str(error.value)


@pytest.fixture
def temporary(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def project(monkeypatch, tmp_path) -> Path:
    """Another project with one module."""
    monkeypatch.setattr(session, "PACKAGE", tmp_path / "helpers")
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers" / "__init__.py").write_text("")
    (tmp_path / "helpers" / "one.py").write_text("VALUE = 1\n")
    return tmp_path / "helpers"


def names_in(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as package:
        assert package.testzip() is None
        return sorted(package.namelist())


def test_the_shipped_archive_has_every_module(temporary):
    modules = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "helpers").rglob("*.py"))
    assert "helpers/pipeline/stages.py" in modules
    assert names_in(pack_helpers()) == modules


def test_the_same_package_is_the_same_archive(temporary, monkeypatch, tmp_path):
    first = pack_helpers()
    written = first.stat().st_mtime_ns
    assert pack_helpers() == first and first.stat().st_mtime_ns == written
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    assert pack_helpers() != first and pack_helpers().name == first.name
    assert list(first.parent.iterdir()) == [first]


def test_an_edited_package_is_another_archive(temporary, project):
    first = pack_helpers()
    (project / "one.py").write_text("VALUE = 2\n")
    second = pack_helpers()
    assert second.name != first.name
    with zipfile.ZipFile(second) as package:
        assert package.read("helpers/one.py") == b"VALUE = 2\n"


def test_a_renamed_module_is_another_archive(temporary, project):
    assert names_in(pack_helpers()) == ["helpers/__init__.py", "helpers/one.py"]
    (project / "one.py").rename(project / "two.py")
    assert names_in(pack_helpers()) == ["helpers/__init__.py", "helpers/two.py"]


def plant(folder: Path) -> None:
    """What an attacker leaves who knows the name of this user's folder, and the name of the archive to come."""
    name = pack_helpers().name
    shutil.rmtree(folder)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with zipfile.ZipFile(folder / name, "w") as package:
        package.writestr("helpers/__init__.py", "print('planted')\n")


def as_another_user(folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be another user")
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    folder.chmod(0o755)


def as_a_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.with_name("elsewhere").chmod(0o700)
    folder.symlink_to(folder.with_name("elsewhere"), target_is_directory=True)


def as_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


TAKEN = [as_another_user, as_a_link, as_a_file, lambda folder: folder.chmod(0o770), lambda folder: folder.chmod(0o777)]


@pytest.mark.parametrize("take", TAKEN)
def test_code_that_another_user_has_planted_in_the_temporary_folder_is_never_shipped(temporary, project, take):
    folder = temporary / f"spark-vision-{os.geteuid()}"
    plant(folder)
    take(folder)
    before = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    archive = pack_helpers()
    assert archive.parent != folder and archive.parent.stat().st_mode & 0o077 == 0
    with zipfile.ZipFile(archive) as package:
        assert package.read("helpers/__init__.py") == b""
    assert before == (sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [])
    assert temporary_module.user_folder() is None


@pytest.mark.parametrize("content", [b"", b"PK", b"anything else"])
def test_an_archive_that_is_not_what_it_should_be_is_made_anew(temporary, project, content):
    archive = pack_helpers()
    made = archive.read_bytes()
    archive.write_bytes(content)
    assert pack_helpers() == archive and archive.read_bytes() == made


def test_the_archive_depends_on_the_modules_alone(temporary, project):
    archive = pack_helpers()
    os.utime(project / "one.py", (0, 10**9))
    (project / "one.py").chmod(0o777)
    archive.unlink()
    assert pack_helpers() == archive


def test_the_users_own_folder_is_nobody_elses_whatever_the_umask(temporary):
    before = os.umask(0)
    try:
        folder = temporary_module.user_folder()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert temporary_module.user_folder() == folder


class FakeSpark:
    """A session of which only the settings are asked; another master needs another Java process."""

    def __init__(self, **settings: str):
        self.settings = {key.replace("_", "."): value for key, value in settings.items()}

    @property
    def conf(self):
        return self

    def get(self, key: str, default: str | None = None) -> str | None:
        return self.settings.get(key, default)


@pytest.mark.parametrize(
    ("master", "slots"), [("local", 1), ("local[1]", 1), ("local[2]", 2), ("local[16]", 16), ("local[3,4]", 3)]
)
def test_a_local_masters_slots_are_in_its_name(master, slots):
    assert get_slots(FakeSpark(spark_master=master)) == slots


def test_a_local_star_has_a_slot_for_each_core_this_process_may_use():
    assert get_slots(FakeSpark(spark_master="local[*,4]")) == len(os.sched_getaffinity(0))


def test_a_system_that_tells_no_affinity_has_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert session.count_cores() == os.cpu_count()


def test_a_task_of_several_cores_takes_several_slots():
    assert get_slots(FakeSpark(spark_master="local[8]", spark_task_cpus="2")) == 4
    assert get_slots(FakeSpark(spark_master="local[1]", spark_task_cpus="2")) == 1


@pytest.mark.parametrize("master", ["spark://host:7077", "yarn", "k8s://https://host", "", "local-cluster[2,1,1024]"])
def test_a_clusters_slots_are_not_guessed_from_its_name(master):
    assert local_slots(FakeSpark(spark_master=master)) is None


def test_what_a_process_with_a_session_starts_finds_the_package_with_its_settings(spark):
    code = f"import sys; sys.path[:] = {sys.path!r}; from helpers.config import load_config; load_config('local')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_sessions_slots_are_what_spark_itself_says(spark):
    from pyspark.sql.functions import spark_partition_id

    assert get_slots(spark) == spark.range(1_000_000).select(spark_partition_id()).distinct().count() == 2


def on_cluster(monkeypatch, cores: int, **settings: str) -> FakeSpark:
    """A session of a cluster on which executors with so many cores have come."""
    monkeypatch.setattr(session, "_cores", lambda spark: cores)
    return FakeSpark(spark_master="yarn", **settings)


def test_a_plan_goes_by_the_executors_that_came_and_says_so_once(monkeypatch, caplog):
    asked = {"spark_executor_instances": "4", "spark_executor_cores": "2"}
    spark = on_cluster(monkeypatch, 6, **asked)
    assert get_slots(spark) == get_slots(spark) == 6
    assert [record.getMessage() for record in caplog.records] == ["3 of 4 executors came; the plan goes by these"]
    monkeypatch.setattr(session, "_cores", lambda spark: 4)
    assert get_slots(spark) == 4 and "2 of 4 executors" in caplog.text
    caplog.clear()
    assert get_slots(on_cluster(monkeypatch, 8, **asked)) == 8 and not caplog.records


def test_a_task_of_several_cores_takes_several_slots_of_a_cluster_too(monkeypatch, caplog):
    spark = on_cluster(monkeypatch, 8, spark_executor_instances="2", spark_executor_cores="4", spark_task_cpus="2")
    assert (get_slots(spark), expected_slots(spark)) == (4, 4) and not caplog.records


def test_slots_that_may_come_later_are_expected(monkeypatch, caplog):
    assert expected_slots(FakeSpark(spark_master="yarn", spark_executor_instances="4", spark_executor_cores="2")) == 8
    assert expected_slots(FakeSpark(spark_master="local[2]", spark_executor_instances="4")) == 0
    assert expected_slots(FakeSpark(spark_master="spark://host:7077")) == 0
    dynamic = {"spark_dynamicAllocation_enabled": "true", "spark_dynamicAllocation_maxExecutors": "10"}
    spark = on_cluster(monkeypatch, 2, spark_executor_instances="3", spark_executor_cores="2", **dynamic)
    assert (get_slots(spark), expected_slots(spark)) == (2, 20) and not caplog.records


def test_a_cluster_without_an_executor_is_not_waited_for_in_silence(monkeypatch):
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.01)
    told = threading.Event()
    monkeypatch.setattr(session.log, "warning", lambda message, *values: told.set())
    monkeypatch.setattr(session, "_cores", lambda spark: 2 if told.wait(60) else 0)
    assert get_slots(FakeSpark(spark_master="yarn")) == 2


def test_two_tasks_at_once_are_two_processes(spark):
    tasks = spark.range(2, numPartitions=2).mapInArrow(memory.name_process, "process string")
    assert len({row.process for row in tasks.collect()}) == 2
    tasks = spark.range(2, numPartitions=1).mapInArrow(memory.name_process, "process string")
    assert len({row.process for row in tasks.collect()}) == 1


def test_the_session_is_set_up_as_the_configuration_says(spark, config):
    for key, value in config.spark.conf.items():
        assert spark.conf.get(key) == value
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    assert session._master(config) == "local[2,4]"
    assert os.environ["PYSPARK_PYTHON"] == sys.executable


# As Spark 4.1 words them, in classic sessions and in Connect alike.
PYTHON_FAILURE = """
  An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "/opt/helpers/bundle/manifest.py", line 93, in read
    content = self.storage.read(name)
ValueError: the first of several

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/opt/helpers/pipeline/task.py", line 65, in __call__
    raise BundleError("x")
{error}
"""
WORKER_CRASH = """An error occurred while calling o84.collectToPython.
: org.apache.spark.SparkException: Job aborted due to stage failure: Task 1 in stage 1.0 failed 1 times, most recent \
failure: Lost task 1.0 in stage 1.0 (TID 3) (192.0.2.2 executor driver): org.apache.spark.SparkException: Python \
worker exited unexpectedly (crashed). Consider setting 'faulthandler.enabled' for the better traceback.
\tat org.apache.spark.api.python.BasePythonRunner$ReaderIterator$$anonfun$1.applyOrElse(PythonRunner.scala:678)
\tat java.base/java.lang.Thread.run(Thread.java:840)
Caused by: java.io.EOFException
\tat java.base/java.io.DataInputStream.readInt(DataInputStream.java:386)
\t... 21 more

Driver stacktrace:
\tat org.apache.spark.scheduler.DAGScheduler.$anonfun$abortStage$2(DAGScheduler.scala:2910)
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("helpers.errors.BundleError: /models/x/model.bin is damaged", "/models/x/model.bin is damaged"),
        (
            "ModuleNotFoundError: No module named 'cv2'",
            f"ModuleNotFoundError: No module named 'cv2': {PACKAGES_REMEDY}",
        ),
        ("MemoryError: out of memory", "MemoryError: out of memory"),
        ("MemoryError", "MemoryError"),
        ("pyarrow.lib.ArrowInvalid: offset overflow\n\tat java.Thread", "pyarrow.lib.ArrowInvalid: offset overflow"),
    ],
)
def test_the_line_that_matters_is_found_in_a_long_spark_message(error, line):
    assert spark_failure(RuntimeError(PYTHON_FAILURE.format(error=error))) == line


def test_the_projects_own_error_goes_before_what_it_led_to():
    chain = (
        "helpers.errors.BundleError: the cause\n\nDuring handling of it, another exception occurred:\n\nValueError: y"
    )
    assert spark_failure(RuntimeError(PYTHON_FAILURE.format(error=chain))) == "the cause"


def test_a_worker_that_was_killed_is_said_to_have_crashed():
    message = spark_failure(RuntimeError(WORKER_CRASH))
    assert "Python worker exited unexpectedly" in message and "\n" not in message


@pytest.mark.parametrize(("text", "line"), [("just words\nmore", "just words"), ("", "RuntimeError")])
def test_a_message_of_another_kind_gives_its_first_line(text, line):
    assert spark_failure(RuntimeError(text)) == line


def run_program(text: str, **environment: str) -> list[str]:
    """What a Python program says, in a process that knows of no session."""
    inherited = {name: value for name, value in os.environ.items() if name not in java.OTHERS_VARIABLES}
    command = [sys.executable, "-c", textwrap.dedent(text)]
    answer = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


@pytest.fixture
def alone(monkeypatch):
    """Without what would have Spark's launcher start the JVM, and without one that an earlier test has started."""
    monkeypatch.setattr(session, "_jvm", None)
    for name in java.OTHERS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


SETTINGS = {"spark.driver.memory": "1g", "spark.driver.extraJavaOptions": '-Da=b "-Dc=d e"', "spark.app.name": "x y"}


def test_a_jvm_is_started_as_sparks_launcher_starts_it(alone):
    command = java.jvm_command(SETTINGS)
    home = Path(pyspark.__file__).parent
    launcher = [command[0], "-cp", str(home / "jars" / "*"), "org.apache.spark.launcher.Main"]
    environment = {**os.environ, "SPARK_HOME": str(home), "SPARK_SCALA_VERSION": "2.13"}
    arguments = command[command.index("org.apache.spark.deploy.SparkSubmit") :]
    answer = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, check=True)
    theirs = answer.stdout.strip("\0\n").split("\0")
    assert theirs[1:3] == command[1:3]  # the class path
    assert set(theirs[1:]) ^ set(command[1:]) == {"--add-modules=jdk.incubator.vector"}


@pytest.mark.parametrize("name", sorted(java.OTHERS_VARIABLES))
def test_a_variable_of_sparks_launcher_is_left_to_it(alone, monkeypatch, name):
    monkeypatch.setenv(name, "set")
    assert java.jvm_command(SETTINGS) is None


@pytest.mark.parametrize("name", sorted(java.OTHERS_SETTINGS))
def test_a_setting_of_sparks_launcher_is_left_to_it(alone, name):
    assert java.jvm_command({**SETTINGS, name: "set"}) is None


@pytest.mark.parametrize(
    ("release", "starts"),
    [('JAVA_VERSION="21.0.1"', True), ('JAVA_VERSION="11.0.24"', False), ("IMPLEMENTOR=x", False), (None, False)],
)
def test_only_a_java_that_says_it_is_new_enough_is_started_ahead(alone, monkeypatch, tmp_path, release, starts):
    monkeypatch.setenv("JAVA_HOME", str(install_java(tmp_path, "")))
    if release:
        (tmp_path / "release").write_text(f"{release}\n")
    assert (java.jvm_command(SETTINGS) is not None) == starts


def test_a_java_home_without_java_is_not_started_ahead(alone, monkeypatch, tmp_path):
    (tmp_path / "release").write_text('JAVA_VERSION="21.0.1"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert java.jvm_command(SETTINGS) is None


def test_a_jvm_that_started_ahead_is_the_sessions_takes_archived_classes_and_its_workers_have_imported_what_they_need(
    tmp_path,
):
    assert java.ARCHIVE.exists(), "run `make setup`"
    loaded = tmp_path / "classes.log"
    options = f'{java.local_options()} "-Xlog:class+load:file={loaded}"'
    answer = run_program(f"""
        import os, sys, psutil
        import pyarrow as pa
        from helpers.config import load_config
        from helpers.session import get_spark, starting

        def look(batches):
            import pyarrow as pa
            for batch in batches:
                imported = {{"helpers.pipeline.task", "openvino", "cv2"}} <= set(sys.modules)
                daemon = " ".join(psutil.Process().parent().cmdline()[1:])
                purge = os.environ["MIMALLOC_PURGE_DELAY"]
                yield pa.RecordBatch.from_pydict({{"worker": [f"{{imported}} {{daemon}} {{purge}}"]}})

        conf = {{"spark.driver.extraJavaOptions": {options!r}}}
        config = load_config("local", spark={{"master": "local[1]", "conf": conf}})
        with starting(config):
            (ahead,) = psutil.Process().children()
        spark = get_spark(config)
        (child,) = psutil.Process().children()
        print(child == ahead, [name for name in os.environ if name.startswith("PYSPARK_GATEWAY")])
        print(spark.range(1, numPartitions=1).mapInArrow(look, "worker string").first().worker)
        rows = spark.createDataFrame(pa.table({{"partition": pa.array([0], pa.int32())}}))
        rows.repartitionById(1, "partition").mapInArrow(lambda rows: rows, rows.schema).collect()
        spark.stop()
    """)
    assert answer == ["True []", "True -m helpers.pipeline.daemon pyspark.worker 10"]
    classes = [line for line in loaded.read_text().splitlines() if " org.apache.spark.sql." in line]
    archived = [line for line in classes if "shared objects file (top)" in line]
    assert len(archived) > 0.7 * len(classes) > 2000  # what Spark generates as it runs is in no archive


def test_a_jvm_that_started_ahead_ends_with_what_was_to_be_checked_meanwhile(tmp_path):
    answer = run_program(
        """
        import psutil
        from helpers.config import load_config
        from helpers.session import starting
        try:
            with starting(load_config("local")):
                print(len(psutil.Process().children()))
                raise ValueError
        except ValueError:
            print(len(psutil.Process().children()))
        """,
        TMPDIR=str(tmp_path),
    )
    assert answer == ["1", "0"]
    assert not list(tmp_path.glob("spark-vision-*"))


def test_a_jvm_that_started_ahead_ends_with_a_process_that_does_not_use_it():
    answer = run_program("""
        from helpers.config import load_config
        from helpers.session import starting
        with starting(load_config("local")):
            pass
    """)
    assert answer == []  # which the JVM could still write to


def test_a_jvm_that_ends_ahead_of_its_session_is_told_as_ever():
    with pytest.raises(AssertionError, match="HostError: no Spark session"):
        run_program("""
            from helpers.config import load_config
            from helpers.session import get_spark, starting
            config = load_config("local", spark={"conf": {"spark.driver.extraJavaOptions": "-Xms1x"}})
            with starting(config):
                pass
            get_spark(config)
        """)


@pytest.mark.parametrize("mode", ["cluster", "connect", "databricks", "sail"])
def test_nothing_is_started_ahead_but_a_local_jvm(alone, monkeypatch, mode):
    monkeypatch.setattr(session, "Jvm", lambda command: pytest.fail("a JVM was started"))
    config = load_config(None, spark={"mode": mode, "master": "sc://host" if mode == "connect" else "local"})
    with session.starting(config):
        assert session._jvm is None
    assert not {"spark.python.daemon.module", session.PYTHONPATH} & session._settings(config).keys()


def test_without_an_archive_a_jvm_starts_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(java, "ARCHIVE", tmp_path / "none.jsa")
    assert "SharedArchiveFile" not in java.local_options()


def test_a_damaged_archive_of_classes_stops_nothing(monkeypatch, tmp_path):
    damaged = tmp_path / "damaged.jsa"
    damaged.write_bytes(b"no archive")
    monkeypatch.setattr(java, "ARCHIVE", damaged)
    command = [java.find_java(), *shlex.split(java.local_options()), "-version"]
    assert f"-XX:SharedArchiveFile={damaged}" in command
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_remote_whose_parameters_lack_their_slash_is_refused_without_showing_its_token():
    remote = "sc://host:15002;token=planted"
    with pytest.raises(HostError, match="slash") as error:
        check_answers(remote)
    assert "planted" not in str(error.value)
    config = load_config("local", **{"spark.mode": "connect", "spark.master": remote})
    assert shown_master(config) == "sc://host:15002"
