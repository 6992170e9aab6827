"""An interrupted training: what it goes on from, and that nobody could tell afterwards."""

import contextlib
import io
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trainings import alone, train_fashion, train_scenes, weights

import fashion_mnist
from figures import new_figure
from helpers.errors import TrainingError
from helpers.storage import LocalStorage, StorageOptions, open_storage
from helpers.tracking.tensorboard import read_scalars
from helpers.training import Checkpoints, Pace, Progress, group, newest_step, save_network
from helpers.training.rank import RUN_ID

# 6 steps an epoch, so that a checkpoint every 4 falls into the middle of one.
SMALL = ["--epochs", "3", "--batch-size", "32", "--train-images", "192", "--test-images", "100", "--width", "8"]
SMALL += ["--precision", "fp32", "--checkpoint-steps", "4"]
SCENES = ["--epochs", "2", "--batch-size", "4", "--train-scenes", "12", "--validation-scenes", "2"]
SCENES += ["--warm-up-steps", "1", "--precision", "fp32", "--checkpoint-steps", "2"]


class Killed(BaseException):
    """What no handler of errors catches."""


def interrupted(train, arguments: list[str], root: str, run_dir: Path, after: int) -> None:
    """Have a training end in the middle of a step, as soon as so many are done."""
    end_backward, left = Pace.end_backward, after

    def stop(pace):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        end_backward(pace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "end_backward", stop)
        with pytest.raises(Killed):
            train(arguments, root, run_dir)


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def vector(run_dir: Path) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in weights(run_dir).values()])


@pytest.fixture(scope="module", autouse=True)
def empty_figures():
    """Two dozen trainings end here, and drawing takes longer than each; `test_training` has what they draw."""
    with pytest.MonkeyPatch.context() as patch:
        for plot in ("plot_predictions", "plot_confusion_matrix"):
            patch.setattr(fashion_mnist, plot, lambda *_: new_figure(1, 1))
        yield


@pytest.fixture(scope="module")
def whole(fashion_mnist_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train_fashion(SMALL, fashion_mnist_root, folder)


def assert_equal(resumed: Path, result: dict, whole: Path, expected: dict, names: list[str]) -> None:
    """Every step of the loss curve once, each as it would have been."""
    scalars, undisturbed = read_scalars(str(resumed)), read_scalars(str(whole))
    for name in names:
        assert scalars[name]["step"].tolist() == undisturbed[name]["step"].tolist()
        np.testing.assert_allclose(scalars[name]["value"], undisturbed[name]["value"], rtol=1e-4, err_msg=name)
    torch.testing.assert_close(vector(resumed), vector(whole), rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(result["epochs"], expected["epochs"], strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.parametrize("after, resumed_at", [(9, 8), (12, 12)], ids=["mid-epoch", "between epochs"])
def test_a_resumed_training_equals_an_uninterrupted_one(whole, fashion_mnist_root, tmp_path, after, resumed_at):
    interrupted(train_fashion, SMALL, fashion_mnist_root, tmp_path, after)
    assert not (tmp_path / "result.json").exists()
    result = train_fashion(SMALL, fashion_mnist_root, tmp_path)
    assert result["resumed_at"] == [resumed_at]
    names = ["train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "test/loss", "test/accuracy"]
    assert_equal(tmp_path, result, *whole, names)
    assert result["test_accuracy"] == whole[1]["test_accuracy"]
    assert files(tmp_path) == []  # a finished run starts over when it is called again


def test_training_on_scenes_resumes_too(fashion_mnist_root, tmp_path):
    expected = train_scenes(SCENES, fashion_mnist_root, tmp_path / "whole")
    interrupted(train_scenes, SCENES, fashion_mnist_root, tmp_path / "run", after=5)
    result = train_scenes(SCENES, fashion_mnist_root, tmp_path / "run")
    assert result["resumed_at"] == [4]  # the moving average of the weights goes on as well
    names = ["train/loss", "train/mask_loss", "train/gradient_norm"]
    assert_equal(tmp_path / "run", result, tmp_path / "whole", expected, names)


def test_a_run_interrupted_twice_goes_on_twice(whole, fashion_mnist_root, tmp_path):
    interrupted(train_fashion, SMALL, fashion_mnist_root, tmp_path, after=9)
    assert files(tmp_path) == ["step-000000006.pt", "step-000000008.pt"]
    interrupted(train_fashion, SMALL, fashion_mnist_root, tmp_path, after=9)
    assert files(tmp_path) == ["step-000000012.pt", "step-000000016.pt"]  # older ones are gone
    result = train_fashion(SMALL, fashion_mnist_root, tmp_path)
    assert result["resumed_at"] == [8, 16]
    assert_equal(tmp_path, result, *whole, ["train/loss"])


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: flip(content)],
    ids=["truncated", "empty", "one bit"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage):
    checkpoints = Checkpoints(str(tmp_path), alone(), {"network": nn.Linear(9, 9)}, {})
    for steps in (4, 8):
        checkpoints.save(Progress(steps=steps))
    newest = tmp_path / "step-000000008.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    assert checkpoints.restore().resumed_at == [4]
    (record,) = caplog.records
    assert f"{newest} is damaged and skipped" in record.message and record.levelname == "WARNING"


def flip(content: bytes) -> bytes:
    """Change one bit in the middle of the largest tensor."""
    largest = max(zipfile.ZipFile(io.BytesIO(content)).infolist(), key=lambda member: member.file_size)
    place = largest.header_offset + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_run_with_other_settings_is_not_thrown_away(fashion_mnist_root, tmp_path):
    interrupted(train_fashion, SMALL, fashion_mnist_root, tmp_path, after=5)
    other = [*SMALL, "--learning-rate", "0.001", "--threads", "2"]
    with pytest.raises(TrainingError, match=r"step-0+4.pt .*\(learning_rate 0.005 there, 0.001 here\).*start over"):
        train_fashion(other, fashion_mnist_root, tmp_path)
    assert files(tmp_path) == ["step-000000004.pt"]
    started_over = train_fashion([*other, "--no-resume", "--epochs", "1"], fashion_mnist_root, tmp_path)
    assert started_over["resumed_at"] == [] and len(started_over["epochs"]) == 1


def test_how_a_run_is_carried_out_may_change_between_its_parts(fashion_mnist_root, tmp_path):
    interrupted(train_fashion, SMALL, fashion_mnist_root, tmp_path, after=9)
    changed = [*SMALL, "--checkpoint-steps", "99", "--num-workers", "1", "--threads", "2"]
    assert train_fashion(changed, fashion_mnist_root, tmp_path)["resumed_at"] == [8]


def test_ranks_that_are_started_again_go_on_though_their_run_started_over(tmp_path, monkeypatch):
    def restore(run: str | None) -> Progress:
        if run:
            monkeypatch.setenv(RUN_ID, run)
        else:
            monkeypatch.delenv(RUN_ID, raising=False)
        checkpoints = Checkpoints(str(tmp_path), alone(), {}, {}, resume=False)
        progress = checkpoints.restore()
        progress.steps += 1
        checkpoints.save(progress)
        return progress

    for run, steps in (("one", 1), ("one", 2), ("another", 1), ("another", 2), (None, 1), (None, 1)):
        assert restore(run).steps == steps
        assert newest_step(str(tmp_path)) == steps  # those of the run before are gone


def test_a_checkpoint_holds_every_source_of_randomness(tmp_path):
    network = nn.Linear(2, 2)
    checkpoints = Checkpoints(str(tmp_path), alone(), {"network": network}, {})
    assert checkpoints.restore() == Progress()
    progress = Progress(epoch=1, batches=3, steps=13, measured=[{"loss": 0.5}], epochs=[{"train_loss": 1.0}])
    checkpoints.save(progress)
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(), random.random(), np.random.randn())  # noqa: E731
    drawn = draw()
    with torch.no_grad():
        network.weight.zero_()
    assert checkpoints.restore() == replace(progress, resumed_at=[13])
    assert draw() == drawn and network.weight.abs().sum() > 0
    assert newest_step(str(tmp_path)) == 13


def test_checkpoints_go_to_any_storage(fashion_mnist_root, tmp_path, adls_root, dfs):
    place = ["--checkpoints", f"{adls_root}/run 1", "--endpoint", dfs.endpoint, "--credential", "env:ADLS_KEY"]
    config = type("Config", (), {"storage": StorageOptions(dfs.endpoint, "env:ADLS_KEY")})
    interrupted(train_fashion, [*SMALL, *place], fashion_mnist_root, tmp_path, after=9)
    assert newest_step(f"{adls_root}/run 1", config) == 8 and not (tmp_path / "checkpoints").exists()
    assert train_fashion([*SMALL, *place], fashion_mnist_root, tmp_path)["resumed_at"] == [8]
    assert list(open_storage(adls_root, config).list()) == []


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    checkpoints = Checkpoints(str(tmp_path), alone(), {"network": nn.Linear(2, 2)}, {})
    checkpoints.save(Progress(steps=4))
    before = (tmp_path / "step-000000004.pt").read_bytes()
    monkeypatch.setattr("helpers.storage.local.os.replace", lambda *names: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        checkpoints.save(Progress(steps=8))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000004.pt"]
    assert (tmp_path / "step-000000004.pt").read_bytes() == before


def test_a_run_killed_after_its_last_epoch_is_only_brought_to_its_end(fashion_mnist_root, tmp_path, whole):
    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_mnist, "save_network", killed)
        with pytest.raises(Killed):
            train_fashion(SMALL, fashion_mnist_root, tmp_path)
    result = train_fashion(SMALL, fashion_mnist_root, tmp_path)
    assert_equal(tmp_path, result, *whole, ["train/loss"])
    assert result["resumed_at"] == [len(read_scalars(str(tmp_path))["train/loss"])]
    assert "final/test_accuracy" in read_scalars(str(tmp_path)) and files(tmp_path) == []


def test_a_second_training_in_one_folder_is_refused_and_the_first_goes_on(fashion_mnist_root, tmp_path, monkeypatch):
    """Also one that would start over, and remove the checkpoints of the first."""
    monkeypatch.setattr(group, "LOCK_SECONDS", 0)
    end_step, refused = Pace.end_step, []

    def and_train_another(pace):
        if not refused and files(tmp_path):
            refused.append(files(tmp_path))
            with pytest.raises(
                TrainingError, match=f"another training is at work in {tmp_path}.*another run directory"
            ):
                train_fashion([*SMALL, "--no-resume"], fashion_mnist_root, tmp_path)
            assert files(tmp_path) == refused[0]
        return end_step(pace)

    monkeypatch.setattr(Pace, "end_step", and_train_another)
    result = train_fashion(SMALL, fashion_mnist_root, tmp_path)
    assert refused and len(result["epochs"]) == 3 and result["resumed_at"] == []
    assert train_fashion([*SMALL, "--epochs", "1"], fashion_mnist_root, tmp_path)["epochs"]  # it is free again


def test_a_result_is_never_beside_another_runs_network(tmp_path, monkeypatch):
    """Wherever the second run dies while it leaves them."""
    write, networks = LocalStorage.write, [nn.Linear(2, 2), nn.Linear(2, 2)]
    for last in range(3):
        save_network(networks[0], {"run": 0}, str(tmp_path))

        def die(self, path: str, data: bytes, left: list = [last]) -> None:  # noqa: B006 - one list for each round
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            write(self, path, data)

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(LocalStorage, "write", die)
            save_network(networks[1], {"run": 1}, str(tmp_path))
        result = tmp_path / "result.json"
        if result.exists():
            found = weights(tmp_path)["weight"]
            assert torch.equal(found, networks[json.loads(result.read_text())["run"]].weight)
    assert json.loads(result.read_text()) == {"run": 1}


def test_half_precision_scales_the_loss_and_resumes(fashion_mnist_root, tmp_path):
    # A processor computes in half precision, but slowly.
    half = [*SMALL, "--precision", "fp16", "--epochs", "2", "--batch-size", "16", "--train-images", "48"]
    half += ["--test-images", "50", "--width", "4", "--checkpoint-steps", "2"]
    interrupted(train_fashion, half, fashion_mnist_root, tmp_path, after=5)
    saved = torch.load(tmp_path / "checkpoints" / "step-000000004.pt", weights_only=True)
    assert saved["parts"]["scaler"]["scale"] > 1
    result = train_fashion(half, fashion_mnist_root, tmp_path)
    assert result["precision"] == "fp16" and result["resumed_at"] == [4]
    assert result["epochs"][1]["train_loss"] < result["epochs"][0]["train_loss"]
