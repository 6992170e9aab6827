"""The four stages on Spark: one at a time for looking at, or fused in one pass for production.

    ingest -> preprocess -> infer -> postprocess        DataFrames, for a notebook
    run                                                 the same code, fused; results written by the tasks

the run
    driver       the functions above, a run's models, and what its tasks share
    runs         a run from slice to slice, and what it tells
sources and the plan
    listing      which files are images, what of them is settled, and the plan
    sources      tables as sources
    arrivals     new files as a source
    readers      who reads the files
a task's work
    task         the stages fused, results written
    stages       the stages as functions of record batches
    reading      files, frames and members: which there are, and their bytes
    views        tiles of images, crops of detections, several models
    daemon       the process that a machine's workers are forked from
    sail         what differs on an engine without a JVM
    pyfunc       a bundle as a model of MLflow, in its tasks
what a run writes
    results      exactly-once results: the table's log and commits
    folders      the files of results, staged and committed
    table        the Delta table that they are in
    catalog      the same results in a table of Spark's
    schemas      the columns of all of this
    rows         keys of results, and comparisons of them
    records      what a run took
    drift        how predictions are distributed
the report
    report       the page of results, annotated pictures
    survey       results counted, and a sample chosen
    exports      results in the formats of other tools

Executors import modules of this package, so importing it imports nothing.
"""

from importlib import import_module
from typing import Any

DRIVER = {"RunSummary", "infer", "ingest", "make_task", "model_identity", "postprocess", "preprocess", "read_results"}
DRIVER |= {"run", "run_frame"}


def __getattr__(name: str) -> Any:
    if name in DRIVER:
        return getattr(import_module("helpers.pipeline.driver"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
