"""What tests share: one Spark session, the data set, pictures as users have them, and a model bundle."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dfs_facade
import object_stores
import pytest
from delta_spark import delta_process
from dfs_facade import DfsFacade
from pyspark.sql import SparkSession

import fashion_data
from conf import pack
from helpers.config import Config, load_config
from helpers.pipeline.table import Table
from helpers.session import get_spark
from helpers.storage import open_storage
from studies.samples import write_images, write_samples


def pytest_collection_modifyitems(items):
    """Where the tests' session is to be Sail's, keep those that have a session, and need no more than Sail has."""
    if os.environ.get("HELPERS_SPARK__MODE") == "sail":
        items[:] = [item for item in items if "spark" in item.fixturenames and not item.get_closest_marker("spark")]


@pytest.fixture(scope="session")
def spark():
    session = get_spark(load_config("local", **{"spark.master": "local[2]"}))
    yield session
    session.stop()


@pytest.fixture(scope="session")
def fashion_mnist_root() -> str:
    root = load_config("local").paths.data
    fashion_data.download(root)
    return root


@pytest.fixture(scope="session")
def config() -> Config:
    return load_config("local", **{"spark.master": "local[2]"})


@pytest.fixture(scope="session")
def two_ranks(spark, fashion_mnist_root, tmp_path_factory) -> dict[str, tuple[str, dict[str, Any]]]:
    """Folder and result of each training in two Spark tasks; the files that take them are one group (`Groups`)."""
    from trainings import train_together

    return train_together(spark, fashion_mnist_root, tmp_path_factory.mktemp("two_ranks"))


@pytest.fixture(scope="session")
def samples(fashion_mnist_root, tmp_path_factory) -> Path:
    """60 good images of several formats and sizes, and 4 files that are no images."""
    return write_samples(fashion_mnist_root, str(tmp_path_factory.mktemp("samples")))


@pytest.fixture(scope="session")
def test_images(fashion_mnist_root, tmp_path_factory) -> Path:
    """The 10,000 test images as PNG files."""
    return write_images(fashion_mnist_root, str(tmp_path_factory.mktemp("test_set")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained fashion_cnn, the same in every session."""
    import torch

    from fashion_mnist import FashionCNN

    path = tmp_path_factory.mktemp("checkpoint") / "untrained.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(FashionCNN().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def bundle_uri(checkpoint, tmp_path_factory) -> str:
    """That network as an fp32 bundle."""
    from helpers.export.conversion import export

    folder = str(tmp_path_factory.mktemp("bundle"))
    export("fashion_cnn", checkpoint, open_storage(folder))
    return folder


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Path:
    """What `make pack` writes, once for the processes that share the tests; nothing is compressed, which takes long."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "pack.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packed = folder / "pack" / "vision.tar.gz"
        return packed if packed.exists() else pack.pack(packed, compression=0)


@pytest.fixture(scope="session")
def delta(tmp_path_factory) -> Iterator[Callable[..., Any]]:
    """Runs a function in a process with Delta Lake; the files whose tests do are one group (`Groups`)."""
    with delta_process(tmp_path_factory.mktemp("delta")) as run_there:
        yield run_there


@pytest.fixture(scope="session", autouse=True)
def runs_apart(tmp_path_factory):
    """Keep the dashboards of the tests' runs out of the project's own, in this process and its children."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HELPERS_PATHS__RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


@pytest.fixture(scope="session")
def dfs(tmp_path_factory) -> Iterator[DfsFacade]:
    """ADLS Gen2 on loopback; its key is in the environment of this process and of its children, as `ADLS_KEY`."""
    why = dfs_facade.missing()
    if why and not (os.environ.get("CI") or os.environ.get("REQUIRE_AZURITE")):
        pytest.skip(why)
    assert not why, why
    with (
        pytest.MonkeyPatch.context() as environment,
        dfs_facade.start_azurite(tmp_path_factory.mktemp("azurite")) as upstream,
    ):
        environment.setenv("ADLS_KEY", dfs_facade.KEY)
        facade = DfsFacade(upstream)
        yield facade
        facade.stop()


@pytest.fixture(scope="session")
def adls_settings(dfs) -> dict[str, str]:
    """What a configuration needs to reach it."""
    return {"storage.endpoint": dfs.endpoint, "storage.credential": "env:ADLS_KEY"}


@pytest.fixture
def adls_container(dfs) -> Iterator[str]:
    """The address of a container of a test's own, without its end."""
    name = dfs.make_container()
    yield f"abfss://{name}@{dfs_facade.ACCOUNT}.dfs.core.windows.net"
    dfs.delete_container(name)


@pytest.fixture
def adls_root(adls_container) -> str:
    """A folder, which is not there yet, in a container of its own."""
    return f"{adls_container}/a folder"


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> Iterator[object_stores.S3]:
    """S3 on loopback; its key is in the environment of this process and of its children, as `S3_KEY`."""
    with pytest.MonkeyPatch.context() as environment, object_stores.start_s3(tmp_path_factory.mktemp("s3")) as server:
        environment.setenv("S3_KEY", server.credential)
        yield server


@pytest.fixture(scope="session")
def s3_settings(s3) -> dict[str, str]:
    """What a configuration needs to reach it."""
    return {"storage.endpoint": s3.relay.endpoint, "storage.credential": "env:S3_KEY"}


@pytest.fixture
def s3_root(s3) -> str:
    """A folder, which is not there yet, in a bucket of its own."""
    return f"s3://{s3.make_bucket()}/a folder"


@pytest.fixture
def here(spark, s3, monkeypatch) -> SparkSession:
    """The session for runs over a server that this process stands before; its workers have the keys of both servers."""
    for name, key in {"ADLS_KEY": dfs_facade.KEY, "S3_KEY": s3.credential}.items():
        monkeypatch.setitem(spark.sparkContext.environment, name, key)
    # The library lets no thread of this process go on while it asks for it, so that nobody would answer.
    monkeypatch.setattr(Table, "history", lambda *_: [])
    return spark
