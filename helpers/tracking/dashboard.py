"""A pipeline run in TensorBoard: throughput, failures and time of each stage as tasks end, and pictures of a sample."""

from collections.abc import Iterable, Sequence
from typing import Any

from helpers.storage import Storage
from helpers.tracking.tensorboard import TensorBoard


def log_run(
    place: Storage,
    run: dict[str, Any],
    records: list[dict[str, Any]],
    stages: Sequence[str],
    pictures: Iterable[tuple[str, bytes]],
) -> None:
    """Write one run's events.

    Args:
        place: the run's own folder.
        run: its description (`records.describe`); what took seconds, at the step after the last task.
        records: of its tasks, one each.
        stages: what a record has the seconds of.
        pictures: names and PNG files.
    """
    board = TensorBoard(place)
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
            **{f"stage/{stage}_seconds": record[f"{stage}_seconds"] for stage in stages},
        }
        board.log_scalars(values, step, _end(record))
    phases = {f"run/{name}": value for name, value in run.items() if name.endswith("seconds") and value is not None}
    board.log_scalars(phases, len(records) + 1, max(map(_end, records), default=None))
    for step, (name, png) in enumerate(pictures):
        board.log_picture(f"pictures/{name}", png, step)
    board.close()


def _end(record: dict[str, Any]) -> float:
    return record["started"].timestamp() + record["seconds"]
