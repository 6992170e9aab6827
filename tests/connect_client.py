"""A client of Spark Connect in a process of its own, because none holds a classic and a Connect session at once."""

import contextlib
import io
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from helpers import pipeline
from helpers.cli import main
from helpers.config import Config, load_config
from helpers.errors import TrainingError
from helpers.session import get_slots, get_spark, local_slots, set_where_allowed
from helpers.training import train_on_spark

PATIENCE = 300  # seconds

_remote = ""


@contextlib.contextmanager
def client_process(remote: str) -> Iterator[Callable[..., Any]]:
    """A function that runs another one there; `remote` is the server's address."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _configure, (remote,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(PATIENCE)


def settings(**overrides: Any) -> Config:
    return load_config("local", **{"spark.mode": "connect", "spark.master": _remote, **overrides})


def run_stages(source: str, model: str, reader: str) -> Any:
    """The stages one by one: the predictions as a table."""
    config = settings(reader=reader)
    spark = get_spark(config)
    assert get_spark(config) is spark
    assert type(spark).__module__ == "pyspark.sql.connect.session"
    assert local_slots(spark) is None and get_slots(spark) == 2
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    images = pipeline.ingest(spark, source, config)
    outputs = pipeline.infer(pipeline.preprocess(images, model, config), model, config)
    return pipeline.postprocess(outputs, model, config).toArrow()


def set_what_is_refused() -> str:
    """A setting that a server refuses; returns what is told of it."""
    with _errors_of_process() as errors:
        logging.basicConfig(level=logging.INFO, force=True)
        set_where_allowed(get_spark(settings()), {"spark.executor.memory": "1g"})
    return errors[0]


def call(*arguments: str) -> tuple[int, str, str]:
    """The command line over the server: exit code, answer, and all that the process writes to standard error."""
    answer = io.StringIO()
    options = ["--profile", "local", "--set", "spark.mode=connect", "--set", f"spark.master={_remote}"]
    with contextlib.redirect_stdout(answer), _errors_of_process() as errors:
        code = main([arguments[0], *options, *arguments[1:]])
    return code, answer.getvalue(), errors[0]


def train(program: str) -> tuple[Any, str, str]:
    """A training that ends well, and one that does not: the result, the error, and what was printed."""
    printed, spark = io.StringIO(), get_spark(settings())
    with contextlib.redirect_stdout(printed):
        result = train_on_spark(spark, program, ["well"], processes=2)
        try:
            train_on_spark(spark, program, ["badly"], processes=2)
        except TrainingError as error:
            return result, str(error).splitlines()[0], printed.getvalue()
    raise AssertionError("the second training has ended without an error")


def _configure(remote: str) -> None:
    global _remote
    _remote = remote


@contextlib.contextmanager
def _errors_of_process() -> Iterator[list[str]]:
    """What comes to standard error in a block, that of libraries and of the log too; there when the block has ended."""
    errors: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield errors
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            errors.append(file.read().decode(errors="replace"))
