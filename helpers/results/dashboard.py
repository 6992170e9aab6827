"""A pipeline run in TensorBoard: throughput, failures and time of each stage as tasks end, and pictures of a sample.

Written with TensorBoard's own event writer, because a run on the driver needs no torch.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.images.headers import read_size
from helpers.stages.task import STAGES
from helpers.storage import Storage


def log_run(
    place: Storage, run: dict[str, Any], records: list[dict[str, Any]], pictures: Iterable[tuple[str, bytes]]
) -> None:
    """Write one run's events.

    Args:
        place: the run's own folder; the file of events is written whole, because object storage does not append.
        run: its description (`records.describe`); what took seconds, at the step after the last task.
        records: of its tasks, `task.RECORD_SCHEMA`.
        pictures: names and PNG files.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_events(folder, run, records, pictures)
        for file in Path(folder).iterdir():
            place.write(file.name, file.read_bytes())


def _write_events(
    folder: str, run: dict[str, Any], records: list[dict[str, Any]], pictures: Iterable[tuple[str, bytes]]
) -> None:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(folder)
    start = min((record["started"].timestamp() for record in records), default=0.0)
    done, failed, megabytes = 0, 0, 0.0
    # A task ends when it began plus what it took; the clocks of hosts may differ by little.
    for step, record in enumerate(sorted(records, key=_end), start=1):
        done, failed = done + record["images"], failed + record["failed"]
        megabytes += record["bytes"] / 2**20
        values = {
            "run/images_per_second": done / max(_end(record) - start, 1e-9),
            "run/images": done,
            "run/failed": failed,
            "run/megabytes": megabytes,
            "task/images_per_second": record["images"] / max(record["seconds"], 1e-9),
            "task/peak_megabytes": record["peak_megabytes"],
            "task/seconds": record["seconds"],
            "task/attempt": record["attempt"],
            **{f"stage/{stage}_seconds": record[f"{stage}_seconds"] for stage in STAGES},
        }
        writer.add_event(_scalars(step, _end(record), values))
    phases = {f"run/{name}": value for name, value in run.items() if name.endswith("seconds") and value is not None}
    writer.add_event(_scalars(len(records) + 1, max(map(_end, records), default=0.0), phases))
    for step, (name, png) in enumerate(pictures):
        writer.add_event(_picture(step, f"pictures/{name}", png))
    writer.close()


def _end(record: dict[str, Any]) -> float:
    return record["started"].timestamp() + record["seconds"]


def _scalars(step: int, time: float, values: dict[str, float]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(step=step, wall_time=time, summary=summary)


def _picture(step: int, tag: str, png: bytes) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    size = read_size(png)
    assert size is not None  # a PNG of our own
    width, height = size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
