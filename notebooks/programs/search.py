"""Hyperparameter search: each trial is one Spark task, and Optuna chooses the parameters of the next one.

Only the driver asks Optuna and keeps the study. A task gets the parameters and the reports of earlier trials, and
returns the reports of its own trial. So tasks share nothing, and no location has to lock or append. A task that Spark
repeats tries the same parameters again.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import pyarrow as pa
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, Trial, TrialState

import fashion_mnist
from helpers.errors import TrainingError
from helpers.session import get_slots, spark_failure, spark_schema
from helpers.storage import Storage, lock, open_storage
from helpers.tracking.mlflow import MLflow, server, track
from helpers.tracking.tensorboard import TensorBoard
from helpers.tracking.writers import Writer, Writers
from helpers.training import ship_siblings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Objective = Callable[[Trial], float]  # what Optuna takes: reads trial.params, may report, may raise TrialPruned
Space = Mapping[str, BaseDistribution]

STUDY, NAME = "study.log", "search"  # the journal's file; the one study in it
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
OUTCOME = pa.schema([pa.field("outcome", pa.string())])

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rules:
    """How trials are chosen and pruned, in Optuna's terms."""

    direction: Literal["maximize", "minimize"] = "maximize"
    n_startup_trials: int = 5  # before the sampler learns from results, and before any trial is pruned
    n_warmup_steps: int = 1  # reports of a trial, before it may be pruned


def search(
    spark: "SparkSession",
    objective: Objective,
    space: Space,
    run_dir: str,
    trials: int = 20,
    rules: Rules = Rules(),
    parallel: int | None = None,
    resume: bool = True,
    mlflow: str = "auto",
) -> optuna.Study:
    """Try parameters in parallel Spark tasks, beginning with the study that the folder already has.

    The sampler is the tree-structured Parzen estimator (Bergstra et al., NIPS 2011, section 4), which takes running
    trials for bad ones so that parallel tasks try different things. A trial worse than the median of the complete
    ones at the same report is pruned. A failed trial is recorded, with its error as the user attribute `error`, and
    not repeated in this call.

    Args:
        spark: the session; a trial is a job of one task.
        objective: pickled into the task, which can import the modules of this folder. It may be any that Optuna takes,
            as long as it asks for nothing but `space`.
        space: a distribution per parameter.
        run_dir: where the study lies, in the format of Optuna's journal files, and TensorBoard's events: one run per
            trial, `trial-0000` and on, with its reports and its row of the HParams dashboard.
        trials: the total to reach, complete or pruned; those of earlier searches in the folder count.
        rules: how they are chosen.
        parallel: trials at once; by default as many as Spark has slots.
        resume: go on with the study in the folder; False: start over.
        mlflow: as `tracking.mlflow`: where the study is a run, and each trial one below it.

    Returns:
        The study, with all trials.

    Raises:
        TrainingError: no trial succeeded, or another search is at work in the folder.
    """
    storage = open_storage(run_dir)
    ship_siblings(spark, __file__)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(storage, "search.lock"))
        except BlockingIOError:
            raise TrainingError(
                f"another search is at work in {run_dir}: wait for it, or name another folder"
            ) from None
        tracked = stack.enter_context(track(mlflow, run_dir, resume)) if server(mlflow) else None
        if not resume:
            _delete(storage)
        study = open_study(storage, rules)
        log_trial = partial(_log_trial, storage, mlflow, tracked)
        _run_trials(spark, objective, dict(space), study, log_trial, trials, rules, parallel or get_slots(spark))
        if not study.get_trials(states=(TrialState.COMPLETE,)):
            failures = [trial.user_attrs.get("error") for trial in study.get_trials(states=(TrialState.FAIL,))]
            raise TrainingError(f"none of {len(study.trials)} trials succeeded; the last failed with: {failures[-1]}")
        if tracked:
            tracked.log_scalars({"best/objective": study.best_value}, len(study.trials))
            tracked.log_text("best.json", json.dumps(study.best_params, indent=2))
        return study


def make_objective(arguments: Sequence[str]) -> Objective:
    """The accuracy of `fashion_mnist.py` on validation images; a trial's parameters are its options by name.

    Args:
        arguments: of its command line, `--validation-images` among them.
    """

    def objective(trial: Trial) -> float:
        def report(epoch: int, accuracy: float) -> None:
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

        options = fashion_mnist.parse(list(arguments))
        vars(options).update(trial.params)
        return fashion_mnist.train(options, report)["val_accuracy"]

    return objective


def open_study(storage: Storage, rules: Rules) -> optuna.Study:
    """Open the study in a folder, or begin one.

    Raises:
        TrainingError: the study there goes the other way.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(_Journal(storage)), study_name=NAME, direction=rules.direction, load_if_exists=True
    )
    if study.direction.name.lower() != rules.direction:
        raise TrainingError(
            f"the study in {storage.root} is not to {rules.direction}: name another folder, or delete it"
        )
    # A constant seed would repeat the random trials of the search that began the study.
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=rules.n_startup_trials,
        constant_liar=True,
        multivariate=True,
        seed=len(study.get_trials(deepcopy=False)),
    )
    return study


class _Journal(BaseJournalBackend):
    """Optuna's records, one line of JSON each. Each write replaces the file, because object storage cannot append."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.lines = storage.read(STUDY).decode().splitlines() if storage.exists(STUDY) else []

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return map(json.loads, self.lines[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lines += [json.dumps(log) for log in logs]
        self.storage.write(STUDY, "".join(f"{line}\n" for line in self.lines).encode())


def _run_trials(
    spark: "SparkSession",
    objective: Objective,
    space: dict[str, BaseDistribution],
    study: optuna.Study,
    log_trial: Callable[[FrozenTrial], None],
    trials: int,
    rules: Rules,
    parallel: int,
) -> None:
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # of a dead driver: nobody works on it any more

    def run_one(_: int) -> None:
        trial = study.ask(space)
        finished = study.get_trials(states=(TrialState.COMPLETE,))
        outcome = _run_on_spark(spark, _Task(objective, space, trial.params, finished, rules))
        _record(study, trial, outcome)
        log_trial(study.trials[trial.number])

    missing = trials - len(study.get_trials(states=ENDED))
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run_one, range(missing)))


def _delete(storage: Storage) -> None:
    for entry in list(storage.list(directories=True)):
        if Path(entry.path).name.startswith("trial-"):
            storage.delete(entry.path)
    storage.delete(STUDY)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One trial, as a function of Arrow batches that runs in the task."""

    objective: Objective
    space: dict[str, BaseDistribution]
    parameters: dict[str, Any]
    finished: list[FrozenTrial]
    rules: Rules

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            yield pa.RecordBatch.from_pylist([{"outcome": json.dumps(self.run())}], schema=OUTCOME)

    def run(self) -> dict[str, Any]:
        """Run the trial with Optuna's own objects, in a study of this task that knows the complete trials."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.MedianPruner(self.rules.n_startup_trials, self.rules.n_warmup_steps)
        study = optuna.create_study(direction=self.rules.direction, pruner=pruner)
        study.add_trials(self.finished)
        study.enqueue_trial(self.parameters)
        trial, started = study.ask(self.space), time.time()
        outcome: dict[str, Any] = {"state": "COMPLETE", "value": None, "error": None}
        try:
            outcome["value"] = float(self.objective(trial))
            if math.isnan(outcome["value"]):
                outcome |= {"state": "FAIL", "value": None, "error": "the objective is not a number"}
        except optuna.TrialPruned:
            outcome["state"] = "PRUNED"
        except Exception as error:  # any exception of a user's objective is this trial's result
            outcome |= {"state": "FAIL", "error": "".join(traceback.format_exception_only(error)).strip()}
        reports = list(study.trials[trial.number].intermediate_values.items())
        return {**outcome, "reports": reports, "started": started, "ended": time.time()}


def _run_on_spark(spark: "SparkSession", task: _Task) -> dict[str, Any]:
    try:
        (row,) = spark.range(0, 1, 1, 1).mapInArrow(task, spark_schema(OUTCOME)).collect()
    except Exception as error:  # Spark gave the task up: its process died again and again, or packages are missing
        return {"state": "FAIL", "value": None, "error": spark_failure(error), "reports": []}
    return json.loads(row.outcome)


def _record(study: optuna.Study, trial: Trial, outcome: dict[str, Any]) -> None:
    for step, value in outcome.pop("reports"):
        trial.report(value, step)
    state, value = TrialState[outcome.pop("state")], outcome.pop("value")
    for name, known in outcome.items():
        if known is not None:
            trial.set_user_attr(name, known)
    if state == TrialState.FAIL:
        log.warning("trial %s with %s failed: %s", trial.number, trial.params, outcome["error"])
    study.tell(trial, value, state)


def _log_trial(storage: Storage, mlflow: str, study: MLflow | None, trial: FrozenTrial) -> None:
    """Write the trial's run, unless it has no result to show."""
    if trial.state not in ENDED or trial.value is None:
        return
    name = f"trial-{trial.number:04d}"
    board: Writer = TensorBoard(storage.join(name))
    if parent := study.identify() if study else "":
        board = Writers(board, MLflow(mlflow, name, tags={"mlflow.parentRunId": parent}))
    for step, value in trial.intermediate_values.items():
        board.log_scalars({"objective": value}, step)
    # The value of a pruned trial is its last report.
    board.log_hyperparameters(trial.params, {"final/objective": trial.value})
    board.close()
