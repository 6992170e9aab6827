"""Where a run's time goes, fitted on the records of a short one (`helpers.pipeline.records`).

A task reads and decodes in its own thread while others infer. On a machine with as many tasks as cores they share one
core, and its images take what both compute together; where cores are idle they take what the longer of the two does
(processor sharing, as in queueing theory). Records tell both apart, because they have the processor's seconds beside
the clock's. Pure: numpy and pandas only.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers.errors import DataError

FEWEST_REST = 3  # tasks after their worker's first, from which a rate can be told


@dataclass(frozen=True)
class CostModel:
    """Where a run's time goes, in seconds on a slot of the calibration's speed, on a machine of one task per core."""

    session_seconds: float  # until there is a session; 0 where it exists already
    open_seconds: float  # of the driver apart from the listing: bundle, earlier results, slots, start of workers
    image_list_seconds: float  # the driver's part for an image: listing and planning
    start_seconds: float  # from the beginning of the pass until the first task is at work
    worker_seconds: float  # of each worker's first task beyond its images: loading the model, code that is used first
    task_seconds: float  # of every task beyond its images: scheduling, starting, writing
    image_seconds: float  # an image's part that is independent of its bytes: inference and post-processing
    byte_seconds: float  # a byte's part: reading, decoding and resizing
    image_bytes: float  # of a mean image
    finish_seconds: float = 0.0  # from the last task's end until the driver has all records
    log_seconds: float = 0.0  # of the driver for records, pictures and TensorBoard
    task_publish_seconds: float = 0.0  # the driver's part for each task: publishing its file
    variation: float = 0.0  # standard deviation of a task's time around this model, as a share of it
    # How much slower a task is for each other one on its machine, as a share; 0 where the records are of one number of
    # tasks a machine; and the tasks at once on a machine to which these seconds belong.
    contention: float = 0.0
    concurrency: float = 1.0
    alone: float = 1.0  # what images take a task that has idle cores beside its own, as a share of what they take else
    # The share of the images' time in which the processor worked on them; little of it where the storage was slow, or
    # the machine did other work.
    computing: float = 1.0

    @property
    def mean_image_seconds(self) -> float:
        """What a mean image takes on one slot."""
        return self.image_seconds + self.byte_seconds * self.image_bytes


def fit(runs: pd.DataFrame, tasks: pd.DataFrame) -> CostModel:
    """Fit a cost model on the records of runs of one model over like images (`records.read_runs`, `read_tasks`).

    Rates come from the stages' own times and the processor's, not from a regression of tasks that are all alike; a
    worker's first task is left out of them where there are enough others, and what it took more is the worker's start.
    Raises DataError if there is no task with an image, or the runs are of several models.
    """
    tasks = tasks[(tasks["images"] > 0) & tasks["run"].isin(runs["run"])].sort_values("begin")
    if not len(tasks):
        raise DataError("the records have no task with an image; calibrate on a run that had some to work on")
    if runs["model"].nunique() > 1:
        names = ", ".join(sorted(runs["model"].unique()))
        raise DataError(f"the records are of several models, and a cost model is of one: {names}")
    first = ~tasks.duplicated(["run", "host", "process"])
    rest = tasks[~first] if (~first).sum() >= FEWEST_REST else tasks
    at_once = tasks.groupby("run").apply(_concurrency, include_groups=False)
    spent = _spent(rest)
    total = spent.sum()
    image_seconds = (total["full"] - total["reading"]) / rest["images"].sum()
    byte_seconds = total["reading"] / max(1, rest["bytes"].sum())
    write_seconds = rest["write_seconds"].median()
    rate_only = image_seconds * tasks["images"] + byte_seconds * tasks["bytes"]
    rate_only = rate_only * total["wall"] / total["full"] + write_seconds
    beyond = (tasks["seconds"] - rate_only)[first].mean() if rest is not tasks else tasks["load_seconds"][first].mean()
    gaps = tasks["begin"] - tasks.groupby(["run", "host", "process"])["end"].shift()  # between the tasks of a worker
    per_run = tasks.groupby("run").agg(begin=("begin", "min"), end=("end", "max"), tasks=("begin", "size"))
    per_run = per_run.join(runs.set_index("run"))
    # The largest run tells best what each image and each task adds to what the driver does once.
    image_run, task_run = per_run.loc[per_run["images"].idxmax()], per_run.loc[per_run["tasks"].idxmax()]
    return CostModel(
        session_seconds=_known(runs["session_seconds"].median()),
        open_seconds=_known(runs["open_seconds"].median()),
        image_list_seconds=float(image_run["list_seconds"] / image_run["images"]),
        start_seconds=max(0.0, float(per_run["begin"].median())),
        worker_seconds=max(0.0, float(beyond)),
        task_seconds=float(write_seconds) + max(0.0, _known(gaps.median())),
        image_seconds=float(image_seconds),
        byte_seconds=float(byte_seconds),
        image_bytes=float(tasks["bytes"].sum() / tasks["images"].sum()),
        finish_seconds=max(0.0, float((per_run["pass_seconds"] - per_run["end"]).median())),
        log_seconds=_known(runs["log_seconds"].median()),
        task_publish_seconds=_known(task_run["publish_seconds"]) / float(task_run["tasks"]),
        variation=float((rest["seconds"] / rate_only.loc[rest.index]).std(ddof=0)) if len(rest) > 1 else 0.0,
        contention=_contention(rest, spent["full"], at_once),
        concurrency=float(np.average(at_once, weights=tasks.groupby("run")["images"].sum())),
        alone=float(min(1.0, total["alone"] / total["full"])),
        computing=float(min(1.0, total["computed"] / total["wall"])),
    )


def _spent(tasks: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each task's images.

    Returns:
        `wall` by the clock; `computed` by the processor; `full` what they take one core; `alone` what they take where
        cores are idle; `reading` what of `full` is reading, decoding and resizing.
    """
    once = tasks["load_seconds"] + tasks["write_seconds"]
    stages = {name: tasks[f"{name}_seconds"] for name in ("read", "preprocess", "infer", "postprocess")}
    wall = sum(stages.values())
    computed, own = ((tasks[f"{name}_seconds"] - once).clip(lower=0) for name in ("cpu", "thread"))
    waited = (wall - computed).clip(lower=0)
    # The own thread's stages, by the clock, are longer than they compute by about the same factor.
    before = stages["read"] + stages["preprocess"]
    share = (before / (before + stages["postprocess"])).fillna(0.0)
    return pd.DataFrame(
        {
            "wall": wall,
            "computed": computed,
            "full": computed + waited,
            "alone": np.maximum(own, computed - own) + waited,
            "reading": own * share + np.minimum(waited, stages["read"]),
        }
    )


def _concurrency(tasks: pd.DataFrame) -> float:
    """Tasks at once on a machine."""
    workers = tasks.groupby("host")["process"].nunique().mean()
    return float(min(workers, tasks["slots"].iloc[0] / tasks["host"].nunique()))


def _contention(tasks: pd.DataFrame, seconds: pd.Series, at_once: pd.Series) -> float:
    """The slope of the seconds an image over the tasks at once on a machine, as a share of those of one task."""
    rates = (seconds / tasks["images"]).groupby(tasks["run"].map(at_once)).median()
    if len(rates) < 2:
        return 0.0
    slope, intercept = np.polyfit(rates.index.to_numpy(), rates.to_numpy(), 1)
    return max(0.0, float(slope / (slope + intercept)))


def _known(value: float) -> float:
    """0 for what nobody could tell, such as a killed run."""
    return 0.0 if pd.isna(value) else float(value)
