"""TensorBoard's events: written whole, read back, and gone on with."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from google.protobuf import text_format
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.projector import projector_config_pb2

from helpers.errors import DataError
from helpers.storage import StorageOptions, open_storage
from helpers.tracking import tensorboard
from helpers.tracking.tensorboard import TensorBoard, read_scalars


def values(run_dir: Path, tag: str) -> list[float]:
    return read_scalars(str(run_dir))[tag]["value"].tolist()


def test_everything_is_published_when_asked_for(tmp_path):
    board = TensorBoard(str(tmp_path))
    for step in range(1, 1001):
        board.log_scalars({"train/loss": step}, step, time=float(step))
    board.publish()  # and a process may be killed from here on
    table = read_scalars(str(tmp_path))["train/loss"]
    assert table["step"].tolist() == table["value"].tolist() == table["wall_time"].tolist() == list(range(1, 1001))


def test_a_new_run_replaces_the_one_before_and_no_other(tmp_path):
    for place, loss in ((tmp_path / "below", 0.0), (tmp_path, 1.0), (tmp_path, 2.0)):
        board = TensorBoard(str(place))
        board.log_scalars({"train/loss": loss}, 1)
        board.close()
    assert values(tmp_path, "train/loss") == [2.0] and values(tmp_path / "below", "train/loss") == [0.0]


@pytest.mark.parametrize("others", [0, 12])
def test_a_run_that_goes_on_voids_what_came_after_the_checkpoint(tmp_path, others):
    for number in range(others):  # writers of a process are numbered, and 10 is no larger than 9 in a file's name
        TensorBoard(str(tmp_path / f"other {number}")).close()
    for steps, loss in ((0, 1.0), (3, 2.0), (4, 3.0)):
        board = TensorBoard(str(tmp_path / "run"), steps)
        for step in range(steps + 1, steps + 4):
            board.log_scalars({"train/loss": loss}, step)
        board.close()
    losses = read_scalars(str(tmp_path / "run"))["train/loss"]
    assert losses["step"].tolist() == [1, 2, 3, 4, 5, 6, 7] and losses["value"].tolist() == [1, 1, 1, 2, 3, 3, 3]


def test_events_reach_storage_that_cannot_append(monkeypatch, tmp_path):
    monkeypatch.setattr(tensorboard, "MOUNTS", (str(tmp_path),))
    board = TensorBoard(str(tmp_path / "run"))
    board.log_scalars({"train/loss": 2.0}, 1)
    board.publish()
    assert values(tmp_path / "run", "train/loss") == [2.0]
    board.log_scalars({"train/loss": 1.5}, 2)
    board.log_embedding(np.zeros((1, 2)), ["a"], np.zeros((1, 4, 4), np.uint8))
    board.close()
    assert values(tmp_path / "run", "train/loss") == [2.0, 1.5]
    assert (tmp_path / "run" / "embedding" / "sprite.png").is_file()


def test_events_reach_object_storage(adls_root, dfs, tmp_path):
    storage = open_storage(adls_root, SimpleNamespace(storage=StorageOptions(dfs.endpoint, "env:ADLS_KEY")))
    for steps, loss in ((0, 1.0), (0, 2.0), (1, 3.0)):
        board = TensorBoard(storage, steps)
        board.log_scalars({"train/loss": loss}, steps + 1)
        board.close()
    for entry in storage.list():
        (tmp_path / entry.path.rpartition("/")[2]).write_bytes(storage.read(entry.path))
    assert values(tmp_path, "train/loss") == [2.0, 3.0]


def test_hyperparameters_are_a_row_of_the_same_run(tmp_path):
    board = TensorBoard(str(tmp_path))
    told = {"learning_rate": 0.5, "optimizer": "muon", "flip": True, "width": None}
    board.log_hyperparameters(told, {"final/accuracy": 0.9})
    board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    row = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (row["learning_rate"].number_value, row["optimizer"].string_value) == (0.5, "muon")
    assert row["flip"].bool_value and "width" not in row
    assert values(tmp_path, "final/accuracy") == [pytest.approx(0.9)] and len(list(tmp_path.iterdir())) == 1


def test_pictures_are_the_files_that_were_given(tmp_path):
    png = cv2.imencode(".png", np.full((3, 5, 3), 7, np.uint8))[1].tobytes()
    board = TensorBoard(str(tmp_path))
    board.log_picture("pictures/one", png, 4)
    board.close()
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("pictures/one")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (4, 5, 3, png)


def test_an_embedding_replaces_the_one_before(tmp_path):
    for count in (6, 5):
        pictures = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 3), np.uint8)
        board = TensorBoard(str(tmp_path))
        board.log_embedding(np.arange(2.0 * count).reshape(count, 2), list("abcdef"[:count]), pictures)
        board.close()
    text = (tmp_path / "projector_config.pbtxt").read_text()
    (embedding,) = text_format.Parse(text, projector_config_pb2.ProjectorConfig()).embeddings
    assert np.loadtxt(tmp_path / embedding.tensor_path, delimiter="\t").tolist() == [
        [2.0 * i, 2.0 * i + 1] for i in range(5)
    ]
    assert (tmp_path / embedding.metadata_path).read_text().split() == list("abcde")
    assert list(embedding.sprite.single_image_dim) == [3, 2]  # width, height
    sprite = cv2.imread(str(tmp_path / embedding.sprite.image_path), cv2.IMREAD_GRAYSCALE)
    assert sprite.shape == (6, 9) and sprite[::2, ::3].ravel().tolist()[:5] == list(range(5))


def test_a_run_on_the_driver_needs_no_torch(tmp_path):
    script = """
import sys
from helpers.tracking.tensorboard import TensorBoard, read_scalars
board = TensorBoard(sys.argv[1])
board.log_scalars({"a/b": 1.0}, 1)
board.close()
print(len(read_scalars(sys.argv[1])), "torch" in sys.modules, "matplotlib" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["1", "False", "False"]


def test_a_directory_without_events_is_named(tmp_path):
    with pytest.raises(DataError, match=f"no TensorBoard events in {tmp_path}"):
        read_scalars(str(tmp_path))
