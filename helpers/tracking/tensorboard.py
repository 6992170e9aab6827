"""TensorBoard's events, written and read back: one directory is one run, and tags are named group/name.

The event file is TensorBoard's own, so that a run on the driver needs no torch. What only a training shows (curves, the
graph, charts) comes from `torch.utils.tensorboard`, which is imported where it is called.
"""

import logging
import struct
import tempfile
import time as clock
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.errors import DataError
from helpers.storage import LocalStorage, Storage, open_storage
from helpers.storage.local import MOUNTS
from helpers.tracking.writers import Charts, Status, Writer

if TYPE_CHECKING:
    import pandas as pd
    import torch

EVENT_FILES = "events.out.tfevents."
PROJECTOR = """embeddings {{
  tensor_name: "embedding"
  tensor_path: "{0}/tensors.tsv"
  metadata_path: "{0}/metadata.tsv"
  sprite {{ image_path: "{0}/sprite.png" single_image_dim: {1} single_image_dim: {2} }}
}}
"""


class TensorBoard(Writer):
    """The events of one run."""

    def __init__(self, place: str | Storage, steps: int = 0, charts: Charts | None = None, live: bool = True):
        """Start the run, or go on with it.

        Args:
            place: the run's own folder; events that an earlier run left there are deleted, or curves would mix.
            steps: after how many the run goes on; its events up to there stay.
            charts: several curves in one chart each, in TensorBoard's *Custom Scalars*.
            live: whether events appear while the run goes on; otherwise `close` writes them in one step.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.storage = open_storage(place) if isinstance(place, str) else place
        for entry in list(self.storage.list()) if self.storage.exists("") else ():
            name = entry.path.rpartition("/")[2]
            if not name.startswith(EVENT_FILES) or entry.path != self.storage.join(name):  # another run's, further down
                continue
            if steps:  # readers take the files in the order of their names, which tell seconds
                clock.sleep(min(max(int(name.split(".")[3]) + 1 - clock.time(), 0.0), 1.0))
            else:
                self.storage.delete(entry.path)
        # Nothing can be appended to a file there.
        appends = isinstance(self.storage, LocalStorage) and not self.storage.root.startswith(MOUNTS)
        self.staging = None if appends and live else tempfile.TemporaryDirectory()
        self.folder = Path(self.staging.name if self.staging else self.storage.root)
        self._writer = EventFileWriter(str(self.folder))
        if steps:  # readers forget what an interrupted run wrote after the step that this one goes on from
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=steps + 1, wall_time=clock.time(), session_log=start))
        if charts:
            from torch.utils.tensorboard.summary import custom_scalars

            layout = {title: ["Multiline", list(tags)] for title, tags in charts.items()}
            self._add(custom_scalars({"Charts": layout}))

    def log_scalars(self, values: Mapping[str, float], step: int, time: float | None = None) -> None:
        """Write values by their tags; `time`, in seconds since 1970, is now by default."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(summary, step, time)

    def log_picture(self, tag: str, png: bytes, step: int = 0) -> None:
        """Write a PNG file."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack_from(">II", png, 16)  # the first chunk is the header
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def log_text(self, tag: str, text: str) -> None:
        """Write a text, shown as it is."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        indented = "".join(f"    {line}\n" for line in text.splitlines())  # which Markdown shows as it is
        value = Summary.Value(tag=tag, metadata=create_summary_metadata("", ""), tensor=make_tensor_proto(indented))
        self._add(Summary(value=[value]))

    def log_precision_recall(self, tag: str, truth: np.ndarray, scores: np.ndarray) -> None:
        """Write a curve of precision against recall: bool `[N]`, and float `[N]` from 0 to 1."""
        from torch.utils.tensorboard.summary import pr_curve

        self._add(pr_curve(tag, truth, scores))

    def log_hyperparameters(self, values: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Write what the run was told, where it is a number or a text, and what it came to in the end, by its tags."""
        from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb

        shown = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
        self._add(hparams_config_pb([*map(HParam, shown)], [*map(Metric, results)]))
        self._add(hparams_pb(shown, trial_id=self.storage.root))
        self.log_scalars(results, 0)

    def log_graph(self, network: "torch.nn.Module", example: "torch.Tensor") -> None:
        """Write the graph of a network for an input."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard._pytorch_graph import graph

        with warnings.catch_warnings():
            # TensorBoard draws the traced graph, and tracing is deprecated in favor of what it cannot draw.
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=FutureWarning)
            drawn, _ = graph(network, example)
        self._writer.add_event(Event(wall_time=clock.time(), graph_def=drawn.SerializeToString()))

    def log_embedding(self, points: np.ndarray, labels: Sequence[str], pictures: np.ndarray) -> None:
        """Write points for the *Projector*, as of `Writer`; they replace earlier ones.

        A sprite of all pictures may have 8,192 pixels a side.
        """
        import cv2

        folder = self.folder / "embedding"
        folder.mkdir(exist_ok=True)
        np.savetxt(folder / "tensors.tsv", points, delimiter="\t", fmt="%.6g")
        (folder / "metadata.tsv").write_text("".join(f"{label}\n" for label in labels))
        count, height, width = pictures.shape
        side = int(np.ceil(np.sqrt(count)))
        sprite = np.zeros((side * side, height, width), np.uint8)
        sprite[:count] = pictures
        rows = sprite.reshape(side, side, height, width).swapaxes(1, 2).reshape(side * height, side * width)
        (folder / "sprite.png").write_bytes(cv2.imencode(".png", rows)[1].tobytes())
        (self.folder / "projector_config.pbtxt").write_text(PROJECTOR.format(folder.name, width, height))

    def publish(self) -> None:
        """Let readers see everything so far."""
        self._writer.flush()
        self._copy()

    def close(self, status: Status = "FINISHED") -> None:
        """Write what is still in memory; events do not say how a run ends."""
        self._writer.close()
        self._copy()

    def _copy(self) -> None:
        for file in self.folder.rglob("*") if self.staging else ():
            if file.is_file():
                self.storage.write(file.relative_to(self.folder).as_posix(), file.read_bytes())

    def _add(self, summary: Any, step: int = 0, time: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(step=step, wall_time=time or clock.time(), summary=summary))


def read_scalars(run_dir: str) -> "dict[str, pd.DataFrame]":
    """Read a run's scalars back from its event files.

    Returns:
        For each tag a table of `step`, `wall_time` (seconds since 1970) and `value`, a row per measurement.

    Raises:
        DataError: the directory holds no events.
    """
    import pandas as pd
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    if not any(Path(run_dir).glob(f"{EVENT_FILES}*")):
        raise DataError(f"no TensorBoard events in {run_dir}: train first")
    # After a crash a training does some steps once more, and the accumulator warns that it leaves the first ones out.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # 0 keeps every event; the default keeps a sample.
    events = EventAccumulator(run_dir, size_guidance={SCALARS: 0}).Reload()
    columns = ["wall_time", "step", "value"]
    return {tag: pd.DataFrame(events.Scalars(tag), columns=columns) for tag in events.Tags()["scalars"]}
