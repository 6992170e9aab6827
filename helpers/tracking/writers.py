"""What a run or a training writes, whoever shows it: one interface in front of TensorBoard and MLflow.

Writer      the interface; what a kind of writer has no place for, it leaves out
Writers     passes everything on to several of them
log_run     what a run of the pipeline writes
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]  # how a run ends, in MLflow's words
Charts = Mapping[str, Sequence[str]]  # the title of a chart, and the tags, which may be regular expressions, in it


class Writer:
    """Where the measurements, pictures and texts of one run go; tags are named group/name.

    As a context it ends the run as its block ends: an exception is a failure, and an interrupt kills the run.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed: Status = "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
        self.close("FINISHED" if kind is None else failed)

    def log_scalars(self, values: Mapping[str, float], step: int, time: float | None = None) -> None:
        """Write values by their tags; `time`, in seconds since 1970, is now by default."""

    def log_text(self, tag: str, text: str) -> None:
        """Write a text."""

    def log_picture(self, tag: str, png: bytes, step: int = 0) -> None:
        """Write a PNG file."""

    def log_figure(self, tag: str, figure: "Figure", step: int = 0) -> None:
        """Write a figure as a picture."""
        file = io.BytesIO()
        figure.savefig(file, format="png")
        self.log_picture(tag, file.getvalue(), step)

    def log_precision_recall(self, tag: str, truth: np.ndarray, scores: np.ndarray) -> None:
        """Write a curve of precision against recall: bool `[N]`, and float `[N]` from 0 to 1."""

    def log_settings(self, values: Mapping[str, Any]) -> None:
        """Write what the run was told, where a run is described by it."""

    def log_hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Write what the run was told, where it is a number or a text, and what it came to in the end, by its tags."""

    def log_graph(self, network: "torch.nn.Module", example: "torch.Tensor") -> None:
        """Write the graph of a network for an input."""

    def log_embedding(self, points: np.ndarray, labels: Sequence[str], pictures: np.ndarray) -> None:
        """Write points, float `[N, channels]`, with N labels and pictures, uint8 `[N, height, width]`."""

    def publish(self) -> None:
        """Let readers see everything so far."""

    def close(self, status: Status = "FINISHED") -> None:
        """Write what is still in memory, and end the run."""


class Writers(Writer):
    """Several writers as one; a figure is drawn once for all of them."""

    def __init__(self, *writers: Writer):
        for name in vars(Writer).keys() - {"log_figure"}:
            if not name.startswith("_"):
                setattr(self, name, partial(self._call_each, [getattr(writer, name) for writer in writers]))

    @staticmethod
    def _call_each(methods: Iterable[Callable[..., None]], *arguments: Any, **named: Any) -> None:
        for method in methods:
            method(*arguments, **named)


def log_run(
    writer: Writer,
    run: dict[str, Any],
    tasks: "pa.Table",
    stages: Sequence[str],
    pictures: Iterable[tuple[str, bytes]],
) -> None:
    """Write what one run of the pipeline has done.

    `run` is its record (`RUN.json`); what took seconds comes at the step after the last task. `tasks` has a row of each
    with the seconds of some stages. Pictures are PNG files with their names.
    """
    # A task ends when it began plus what it took; the clocks of hosts may differ by little.
    began = tasks["started"].to_numpy().astype("datetime64[us]").astype(float) / 1e6
    ends = began + tasks["seconds"].to_numpy()
    order, start = np.argsort(ends, kind="stable"), began.min(initial=np.inf)
    done, failed, megabytes = 0, 0, 0.0
    for step, (record, end) in enumerate(zip(_rows(tasks.take(order)), ends[order].tolist(), strict=True), start=1):
        done, failed = done + record["images"], failed + record["failed"]
        megabytes += record["bytes"] / 2**20
        values = {
            "run/images_per_second": done / max(end - start, 1e-9),
            "run/images": done,
            "run/failed": failed,
            "run/megabytes": megabytes,
            "task/images_per_second": record["images"] / max(record["seconds"], 1e-9),
            "task/peak_megabytes": record["peak_megabytes"],
            "task/seconds": record["seconds"],
            "task/attempt": record["attempt"],
            **{f"stage/{stage}_seconds": record[f"{stage}_seconds"] for stage in stages},
        }
        writer.log_scalars(values, step, end)
    phases = {f"run/{name}": value for name, value in run.items() if name.endswith("seconds") and value is not None}
    last = tasks.num_rows + 1
    writer.log_scalars(phases, last, ends.max(initial=0.0) or None)
    for model, distances in enumerate(run.get("drift", {}).values()):
        writer.log_scalars({f"drift/{part}_{model}": value for part, value in distances.items()}, last)
    writer.log_text("run/record.json", json.dumps(run, indent=2))
    for step, (name, png) in enumerate(pictures):
        writer.log_picture(f"pictures/{name}", png, step)


def _rows(table: "pa.Table") -> Iterator[dict[str, Any]]:
    """The rows, of which few are dictionaries at a time."""
    for batch in table.to_batches(max_chunksize=1000):
        yield from batch.to_pylist()
