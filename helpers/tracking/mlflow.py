"""MLflow's runs: what TensorBoard's events hold, on a server where a team looks for it.

Everything is sent by a thread, so that nobody waits for the server, and importing the library, which takes seconds,
holds nothing up. What fails twice is one warning, and the run goes on without MLflow. A request takes 20 seconds at
most where no server answers.

The library is imported where it is used alone. Executors need it for a training's first rank only.
"""

import logging
import os
import tempfile
import time as clock
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from helpers.errors import ConfigError, first_line
from helpers.storage import Storage, open_storage
from helpers.tracking.tensorboard import TensorBoard
from helpers.tracking.writers import Charts, Status, Writer, Writers

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

# Of the library, where the user has set nothing else: a server that is down must not hold a run up for minutes, and a
# run is reported to its own server only.
VARIABLES = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # each would be a warning of its own; `_attempt` tries again
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where a command's answer stands
    "MLFLOW_PRINT_MODEL_URLS_ON_CREATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
DATABRICKS = "databricks"  # the workspace's own server; its registry of models is Unity Catalog's:
UNITY_CATALOG = "databricks-uc"
EXPERIMENT = "spark-vision"  # MLFLOW_EXPERIMENT_NAME is another; a workspace's have a path
NOTE = "mlflow_run"  # the file beside a training's events that names its run
PAUSE_SECONDS = 1.0  # before a request is repeated
CLOSE_SECONDS = 60.0  # for what is left to send at the end
BATCH = 1000  # measurements of one request, at most
PARAMETERS, LENGTH = 100, 6000  # of one request, and characters of a value


def server(setting: str) -> str | None:
    """The address that `tracking.mlflow` means; None where nothing is tracked."""
    if setting == "auto":
        return DATABRICKS if "DATABRICKS_RUNTIME_VERSION" in os.environ else None
    return None if setting == "off" else setting


def connect(setting: str) -> "MlflowClient":
    """A client of a server and its registry of models.

    Raises ConfigError if `tracking.mlflow` names none, or the library is missing.
    """
    uri = server(setting)
    if uri is None:
        raise ConfigError("registered models need an MLflow server: set tracking.mlflow to its address")
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise ConfigError("tracking.mlflow needs MLflow: pip install mlflow-skinny, or set it to off") from None
    return MlflowClient(uri, UNITY_CATALOG if uri == DATABRICKS else uri)


class MLflow(Writer):
    """One run on a server. Measurements are sent when they are published, as TensorBoard's are."""

    def __init__(
        self,
        setting: str,
        name: str,
        note: Storage | None = None,
        goes_on: bool = False,
        tags: Mapping[str, str] | None = None,
    ):
        """Start the run with the first thing that is written, or go on with it.

        `setting` is that of `tracking.mlflow`, and `name` for people. In a `note` a training keeps the run's
        identifier, so that it can go on with it.
        """
        self.setting, self.name, self.note, self.goes_on, self.tags = setting, name, note, goes_on, dict(tags or {})
        self.run_id = ""
        self._done: dict[str, int] = {}  # of a run that goes on: the last step of each tag that the server has
        self._failed = False
        self._measured: list[tuple[str, float, int, int]] = []  # tag, value, milliseconds since 1970, step
        self._pool = ThreadPoolExecutor(1, "mlflow")
        self._last = self._pool.submit(self._attempt, self._connect)

    def log_scalars(self, values: Mapping[str, float], step: int, time: float | None = None) -> None:
        """Keep values by their tags until they are published."""
        at = int(1000 * (time or clock.time()))
        self._measured += [(tag, float(value), at, step) for tag, value in values.items()]

    def log_text(self, tag: str, text: str) -> None:
        """Leave a text as a file among the run's artifacts."""
        name = tag if PurePosixPath(tag).suffix else f"{tag}.txt"
        self._send(lambda: self._client.log_text(self.run_id, text, name))

    def log_picture(self, tag: str, png: bytes, step: int = 0) -> None:
        """Leave a PNG file among the run's artifacts; one for each step, where the tag is no file's name."""
        place = PurePosixPath(tag if tag.endswith(".png") else f"{tag}/{step:06d}.png")

        def upload() -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, place.name)
                file.write_bytes(png)
                self._client.log_artifact(self.run_id, str(file), str(place.parent) if place.parent.name else None)

        self._send(upload)

    def log_settings(self, values: Mapping[str, Any]) -> None:
        """Write parameters; of nested ones each by its dotted name."""
        told = [(name, str(value)[:LENGTH]) for name, value in _flatten(values)]

        def upload() -> None:
            from mlflow.entities import Param

            for start in range(0, len(told), PARAMETERS):
                parameters = [Param(name, value) for name, value in told[start : start + PARAMETERS]]
                self._client.log_batch(self.run_id, params=parameters)

        self._send(upload)

    def log_hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Write parameters, and what the run came to."""
        self.log_settings({name: value for name, value in values.items() if isinstance(value, int | float | str)})
        self.log_scalars(results, 0)

    def publish(self) -> None:
        """Send what was measured so far."""
        measured, self._measured = self._measured, []
        if measured:
            self._send(lambda: self._send_measured(measured))

    def identify(self) -> str:
        """The run's identifier once it has begun; empty where the server has failed."""
        self._send(lambda: None)
        wait([self._last])
        return "" if self._failed else self.run_id

    def close(self, status: Status = "FINISHED") -> None:
        """Send the rest and end the run; what takes longer than a minute is given up."""
        self.publish()
        self._send(lambda: self._client.set_terminated(self.run_id, status))
        if wait([self._last], CLOSE_SECONDS).not_done:
            self._give_up(f"sending the rest takes longer than {CLOSE_SECONDS:.0f} s")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, call: Callable[[], Any]) -> None:
        """Have the thread do something with the run, after all it was given before."""

        def begin_and_call() -> None:
            if not self.run_id:
                self._begin()
            call()

        self._last = self._pool.submit(self._attempt, begin_and_call)

    def _attempt(self, call: Callable[[], Any]) -> None:
        for may_repeat in (True, False):
            try:
                if not self._failed:
                    call()
                return
            except Exception as error:
                if not may_repeat:
                    self._give_up(first_line(error))
            clock.sleep(PAUSE_SECONDS)

    def _give_up(self, why: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning("MLflow does not have all of this run: %s; look at the server, or set tracking.mlflow=off", why)

    def _connect(self) -> None:
        self._client = connect(self.setting)

    def _begin(self) -> None:
        if self.goes_on and self.note and self.note.exists(NOTE):
            self.run_id = self.note.read(NOTE).decode()
            self._client.update_run(self.run_id, status="RUNNING")
            for tag in self._client.get_run(self.run_id).data.metrics:
                self._done[tag] = max(one.step for one in self._client.get_metric_history(self.run_id, tag))
            return
        run = self._client.create_run(self._experiment(), run_name=self.name, tags=self.tags)
        self.run_id = run.info.run_id
        if self.note:
            self.note.write(NOTE, self.run_id.encode())

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        path = f"/Shared/{EXPERIMENT}" if server(self.setting) == DATABRICKS else EXPERIMENT
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", path)
        known = self._client.get_experiment_by_name(name)
        if known is None:
            try:
                return self._client.create_experiment(name)
            except MlflowException:  # another run was first
                known = self._client.get_experiment_by_name(name)
                if known is None:
                    raise
        return known.experiment_id

    def _send_measured(self, measured: list[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        # Nothing can be taken back: what a training repeats after a crash, its curves have already.
        new = [Metric(*one) for one in measured if one[3] > self._done.get(one[0], -1)]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self.run_id, metrics=new[start : start + BATCH])


def open_writers(
    place: str, mlflow: str, settings: Mapping[str, Any], steps: int = 0, charts: Charts | None = None
) -> Writer:
    """What a training writes to: TensorBoard in its folder, and MLflow where `tracking.mlflow` has it on.

    `settings` are those that decide the training's result, `steps` says after how many it goes on, and `charts` (of
    TensorBoard) have several curves each.
    """
    board = TensorBoard(place, steps, charts)
    if server(mlflow) is None:
        return board
    tracked = track(mlflow, place, goes_on=steps > 0)
    tracked.log_settings(settings)
    return Writers(board, tracked)


def track(mlflow: str, place: str, goes_on: bool) -> MLflow:
    """The run on a server of what has a folder; the last part of its name is the run's."""
    note = open_storage(place)
    return MLflow(mlflow, note.root.rstrip("/").rpartition("/")[2], note, goes_on)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        pairs += _flatten(value, f"{prefix}{name}.") if nested else [(f"{prefix}{name}", value)]
    return pairs
