"""A pipeline run in TensorBoard: throughput, failures and time of each stage as tasks end, and pictures of a sample.

Written with TensorBoard's own event writer, because a run on the driver needs no torch.
"""

from pathlib import Path
from typing import Any

from helpers.images.decoding import decode
from helpers.stages.task import STAGES


def log_run(folder: str, run: dict[str, Any], records: list[dict[str, Any]], pictures: dict[str, bytes]) -> None:
    """Write one run's events.

    Args:
        folder: the run's own directory.
        run: its description (`records.describe`); what took seconds, at the step after the last task.
        records: of its tasks, `task.RECORD_SCHEMA`.
        pictures: PNG files by name.
    """
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    Path(folder).mkdir(parents=True, exist_ok=True)
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
    for step, (name, png) in enumerate(pictures.items()):
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

    height, width = decode(png, max_pixels=2**30).shape[:2]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
