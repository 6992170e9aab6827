"""The four stages on Spark: one at a time for looking at, or fused in one pass for production.

    ingest -> preprocess -> infer -> postprocess        DataFrames, for a notebook
    run                                                 the same code, fused; results written by the tasks

    driver       these, their results, and what a run's tasks share      on the driver
    models       bundles, parameters, names in the results     on the driver
    sources      tables as sources                             on the driver
    listing      which files are images, and the plan          on the driver
    known        what of it an earlier run has found settled   on the driver
    frames       videos to frames                              in tasks, and on the driver
    readers      who reads the files                           on the driver
    stages       the stages as functions of record batches     in tasks
    views        tiles of images, crops of detections, and
                 several models                            in tasks
    pyfunc       a bundle as a model of MLflow                 in its tasks, and anywhere
    task         the stages fused, results written             in tasks
    results      exactly-once results                          on the driver
    table        the Delta table that they are in              on the driver
    catalog      the same results in a table of Spark's        on the driver
    records      what a run took                               on the driver
    survey       results counted, and a sample chosen          on the driver
    report       the page of results                           on the driver
    exports      results in the formats of other tools         on the driver

Executors import modules of this package, so importing it imports nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from helpers.pipeline.driver import (  # noqa: F401
        RunSummary,
        infer,
        ingest,
        make_task,
        model_identity,
        postprocess,
        preprocess,
        read_results,
        run,
        run_frame,
    )

DRIVER = {"RunSummary", "infer", "ingest", "make_task", "model_identity", "postprocess", "preprocess", "read_results"}
DRIVER |= {"run", "run_frame"}


def __getattr__(name: str) -> Any:
    if name in DRIVER:
        return getattr(import_module("helpers.pipeline.driver"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
