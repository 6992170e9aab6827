"""An interrupted training: what it goes on from, and that nobody could tell afterwards."""

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from helpers.errors import TrainingError
from helpers.storage import LocalStorage
from helpers.training import checkpoints, classifier
from helpers.training.checkpoints import Checkpoints, Progress, newest_step
from helpers.training.classifier import TrainingSettings, train
from helpers.training.dashboards import read_scalars
from helpers.training.distributed import train_on_spark
from helpers.training.optimization import Optimization
from helpers.training.workers import RunSettings, Worker, save
from helpers.yolact import training as yolact

# 10 steps an epoch, so that a checkpoint every 4 falls into the middle of one.
SMALL = TrainingSettings(
    epochs=3, batch_size=64, train_images=640, test_images=300, precision="fp32", checkpoint_steps=4
)
SCENES = yolact.SceneSettings(
    epochs=2, batch_size=8, train_scenes=24, val_scenes=4, precision="fp32", checkpoint_steps=2
)
ALONE = Worker(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """What no handler of errors catches."""


def interrupt(monkeypatch, step: int) -> None:
    """Have the training end in the middle of a step."""
    descend = Optimization.descend

    def stop(self, loss):
        nonlocal step
        step -= 1
        if step < 0:
            raise Killed
        return descend(self, loss)

    monkeypatch.setattr(Optimization, "descend", stop)


def interrupted(train, settings, root: str, run_dir: Path, after: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(Killed):
            train(settings, root, str(run_dir))


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def weights(run_dir: Path) -> torch.Tensor:
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    return torch.cat([value.flatten().double() for value in state.values()])


@pytest.fixture(scope="module")
def whole(fashion_mnist_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(SMALL, fashion_mnist_root, str(folder))


def assert_equal(resumed: Path, result: dict, whole: Path, expected: dict, names: list[str]) -> None:
    """Every step of the loss curve once, each as it would have been."""
    scalars, undisturbed = read_scalars(str(resumed)), read_scalars(str(whole))
    for name in names:
        assert scalars[name]["step"].tolist() == undisturbed[name]["step"].tolist()
        np.testing.assert_allclose(scalars[name]["value"], undisturbed[name]["value"], rtol=1e-4, err_msg=name)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(result["epochs"], expected["epochs"], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.parametrize("after, resumed_at", [(15, 12), (20, 20)], ids=["mid-epoch", "between epochs"])
def test_a_resumed_training_equals_an_uninterrupted_one(whole, fashion_mnist_root, tmp_path, after, resumed_at):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after)
    assert not (tmp_path / "result.json").exists()
    result = train(SMALL, fashion_mnist_root, str(tmp_path))
    assert result["resumed_at"] == [resumed_at]
    names = ["train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "test/loss", "test/accuracy"]
    assert_equal(tmp_path, result, *whole, names)
    assert result["test_accuracy"] == whole[1]["test_accuracy"]
    assert files(tmp_path) == []  # a finished run starts over when it is called again


def test_training_on_scenes_resumes_too(fashion_mnist_root, tmp_path):
    expected = yolact.train(SCENES, fashion_mnist_root, str(tmp_path / "whole"))
    interrupted(yolact.train, SCENES, fashion_mnist_root, tmp_path / "run", after=5)
    result = yolact.train(SCENES, fashion_mnist_root, str(tmp_path / "run"))
    assert result["resumed_at"] == [4]  # the moving average of the weights goes on as well
    names = ["train/loss", "train/mask_loss", "train/gradient_norm"]
    assert_equal(tmp_path / "run", result, tmp_path / "whole", expected, names)


def test_a_run_interrupted_twice_goes_on_twice(whole, fashion_mnist_root, tmp_path):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=9)
    assert files(tmp_path) == ["step-000000004.pt", "step-000000008.pt"]
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=9)
    assert files(tmp_path) == ["step-000000012.pt", "step-000000016.pt"]  # older ones are gone
    result = train(SMALL, fashion_mnist_root, str(tmp_path))
    assert result["resumed_at"] == [8, 16]
    assert_equal(tmp_path, result, *whole, ["train/loss"])


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: flip(content)],
    ids=["truncated", "empty", "one bit"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(whole, fashion_mnist_root, tmp_path, caplog, damage):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=15)
    newest = tmp_path / "checkpoints" / "step-000000012.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    result = train(SMALL, fashion_mnist_root, str(tmp_path))
    (record,) = caplog.records
    assert f"{newest} is damaged and skipped" in record.message and record.levelname == "WARNING"
    assert result["resumed_at"] == [10]  # the one before, of the epoch's end
    assert_equal(tmp_path, result, *whole, ["train/loss"])


def flip(content: bytes) -> bytes:
    """Change one bit in the middle of the largest tensor."""
    largest = max(zipfile.ZipFile(io.BytesIO(content)).infolist(), key=lambda member: member.file_size)
    place = largest.header_offset + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_run_with_other_settings_is_not_thrown_away(whole, fashion_mnist_root, tmp_path):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=9)
    other = replace(SMALL, learning_rate=1e-3, threads=2)
    with pytest.raises(TrainingError, match=r"step-0+8.pt .*\(learning_rate 0.005 there, 0.001 here\).*resume=False"):
        train(other, fashion_mnist_root, str(tmp_path))
    assert files(tmp_path) == ["step-000000004.pt", "step-000000008.pt"]
    # How a run is carried out may change.
    started_over = train(replace(SMALL, resume=False, epochs=1, threads=2), fashion_mnist_root, str(tmp_path))
    assert started_over["resumed_at"] == [] and len(started_over["epochs"]) == 1


def test_how_a_run_is_carried_out_may_change_between_its_parts(fashion_mnist_root, tmp_path):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=9)
    result = train(replace(SMALL, checkpoint_steps=None, loaders=1), fashion_mnist_root, str(tmp_path))
    assert result["resumed_at"] == [8]


def test_a_checkpoint_holds_every_source_of_randomness(tmp_path):
    network = nn.Linear(2, 2)
    checkpoints = Checkpoints(RunSettings(), ALONE, str(tmp_path), {"network": network})
    assert checkpoints.restore() == Progress()
    progress = Progress(epoch=1, batches=3, steps=13, measured=[{"loss": 0.5}], epochs=[{"train_loss": 1.0}])
    checkpoints.save(progress)
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(), random.random(), np.random.randn())  # noqa: E731
    drawn = draw()
    with torch.no_grad():
        network.weight.zero_()
    assert checkpoints.restore() == replace(progress, resumed_at=[13])
    assert draw() == drawn and network.weight.abs().sum() > 0
    assert newest_step(RunSettings(), str(tmp_path)) == 13


def test_checkpoints_go_to_any_storage(fashion_mnist_root, tmp_path, adls_root, dfs):
    from helpers.storage import StorageOptions, open_storage

    options = StorageOptions(dfs.endpoint, "env:ADLS_KEY")
    settings = replace(SMALL, checkpoints=f"{adls_root}/run 1", storage=options)
    interrupted(train, settings, fashion_mnist_root, tmp_path, after=9)
    assert newest_step(settings, str(tmp_path)) == 8 and not (tmp_path / "checkpoints").exists()
    assert train(settings, fashion_mnist_root, str(tmp_path))["resumed_at"] == [8]
    assert list(open_storage(adls_root, settings).list()) == []
    assert "env:ADLS_KEY" in json.loads((tmp_path / "result.json").read_text())["settings"]["storage"]["credential"]


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_one_before(fashion_mnist_root, tmp_path, monkeypatch):
    interrupted(train, SMALL, fashion_mnist_root, tmp_path, after=6)
    before = (tmp_path / "checkpoints" / "step-000000004.pt").read_bytes()
    monkeypatch.setattr("helpers.storage.local.os.replace", lambda *names: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        train(SMALL, fashion_mnist_root, str(tmp_path))
    assert files(tmp_path) == ["step-000000004.pt"]
    assert (tmp_path / "checkpoints" / "step-000000004.pt").read_bytes() == before


def test_a_run_killed_after_its_last_epoch_is_only_brought_to_its_end(fashion_mnist_root, tmp_path, whole):
    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "save", killed)
        with pytest.raises(Killed):
            train(SMALL, fashion_mnist_root, str(tmp_path))
    result = train(SMALL, fashion_mnist_root, str(tmp_path))
    assert_equal(tmp_path, result, *whole, ["train/loss"])
    assert result["resumed_at"] == [len(read_scalars(str(tmp_path))["train/loss"])]
    assert "final/test_accuracy" in read_scalars(str(tmp_path)) and files(tmp_path) == []


def test_half_precision_scales_the_loss_and_resumes(fashion_mnist_root, tmp_path):
    # A processor computes in half precision, but slowly.
    settings = replace(SMALL, precision="fp16", epochs=2, batch_size=16, train_images=48, test_images=50, width=4)
    settings = replace(settings, checkpoint_steps=2)
    interrupted(train, settings, fashion_mnist_root, tmp_path, after=5)
    saved = torch.load(tmp_path / "checkpoints" / "step-000000004.pt", weights_only=True)
    assert saved["parts"]["scaler"]["scale"] > 1
    result = train(settings, fashion_mnist_root, str(tmp_path))
    assert result["precision"] == "fp16" and result["resumed_at"] == [4]
    assert result["epochs"][1]["train_loss"] < result["epochs"][0]["train_loss"]


def test_a_second_training_in_one_folder_is_refused_and_the_first_goes_on(fashion_mnist_root, tmp_path, monkeypatch):
    """Also one that would start over, and remove the checkpoints of the first."""
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0)
    descend, refused = Optimization.descend, []

    def and_train_another(self, loss):
        if not refused and files(tmp_path):
            refused.append(files(tmp_path))
            with pytest.raises(TrainingError, match=f"another training is at work in {tmp_path}.*another run_dir"):
                train(replace(SMALL, resume=False), fashion_mnist_root, str(tmp_path))
            assert files(tmp_path) == refused[0]
        return descend(self, loss)

    monkeypatch.setattr(Optimization, "descend", and_train_another)
    result = train(SMALL, fashion_mnist_root, str(tmp_path))
    assert refused and len(result["epochs"]) == 3 and result["resumed_at"] == []
    assert train(replace(SMALL, epochs=1), fashion_mnist_root, str(tmp_path))["epochs"]  # it is free again


def test_a_training_on_spark_touches_nothing_of_one_that_is_at_work(spark, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0)
    left = [tmp_path / "checkpoints" / "step-000000004.pt", tmp_path / "result.json"]
    left[0].parent.mkdir()
    for path in left:
        path.write_bytes(b"the first one's")
    for resume in (True, False):
        with checkpoints.lock_run(str(tmp_path)), pytest.raises(TrainingError, match="another training is at work"):
            train_on_spark(spark, replace(SMALL, resume=resume), "nowhere", str(tmp_path), processes=2)
        assert [path.read_bytes() for path in left] == [b"the first one's"] * 2


def test_a_file_system_without_locks_is_trained_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with checkpoints.lock_run(str(tmp_path)):
        assert "nothing keeps another training out" in caplog.text


def test_a_result_is_never_beside_another_runs_network(tmp_path, monkeypatch):
    """Wherever the second run dies while it leaves them."""
    write, networks = LocalStorage.write, [nn.Linear(2, 2), nn.Linear(2, 2)]
    for last in range(3):
        save(networks[0], {"run": 0}, str(tmp_path))

        def die(self, path: str, data: bytes, left: list = [last]) -> None:  # noqa: B006 - one list for each round
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            write(self, path, data)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(LocalStorage, "write", die)
            save(networks[1], {"run": 1}, str(tmp_path))
        found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["weight"]
        result = tmp_path / "result.json"
        if result.exists():
            assert torch.equal(found, networks[json.loads(result.read_text())["run"]].weight)
    assert json.loads(result.read_text()) == {"run": 1}
