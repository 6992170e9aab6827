import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import MEAN, STD, FashionCNN, normalise, predict
from helpers.training.classifier import TrainingSettings, train
from helpers.training.dashboards import (
    TrainingDashboard,
    plot_confusion_matrix,
    plot_predictions,
    plot_training,
    read_scalars,
)
from helpers.training.distributed import train_on_spark
from helpers.training.optimization import Optimization
from helpers.training.workers import (
    RunSettings,
    Worker,
    batches_of,
    choose_precision,
    join_workers,
    make_schedule,
)
from pydantic import ValidationError

from helpers.errors import HostError, TrainingError
from helpers.models.architectures import get_architecture
from helpers.models.export import load_network

ALONE = Worker(0, 1, torch.device("cpu"))

SMALL = TrainingSettings(epochs=2, batch_size=64, train_images=1280, test_images=500, precision="fp32")


@pytest.fixture(scope="module")
def single_run(fashion_mnist_root, tmp_path_factory):
    """A small training on one process: its directory and its result."""
    run_dir = str(tmp_path_factory.mktemp("single"))
    return run_dir, train(SMALL, fashion_mnist_root, run_dir)


@pytest.fixture(scope="module")
def spark_run(spark, fashion_mnist_root, tmp_path_factory):
    """The same on two Spark tasks."""
    run_dir = str(tmp_path_factory.mktemp("spark"))
    return run_dir, train_on_spark(spark, SMALL, fashion_mnist_root, run_dir, processes=2)


def parameters_of(run_dir: str) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(
        load_network(get_architecture("fashion_cnn"), Path(run_dir, "checkpoint.pt")).parameters()
    ).detach()


def test_network_has_the_papers_29034_parameters():
    model = FashionCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 29_034
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_normalisation_is_that_of_the_training_set(fashion_mnist_root):
    images, _ = fashion_mnist.load(fashion_mnist_root, train=True)
    assert images.mean() == pytest.approx(MEAN, abs=1e-3) and images.std() == pytest.approx(STD, abs=1e-3)
    inputs = normalise(torch.as_tensor(images[:10]))
    assert inputs.shape == (10, 1, 28, 28) and inputs.dtype == torch.float32


def test_shares_of_the_workers_make_up_the_batch_of_one():
    def batches(rank: int, processes: int) -> list[torch.Tensor]:
        return list(batches_of(SMALL, Worker(rank, processes, torch.device("cpu")), 200, epoch=1))

    whole, shares = batches(0, 1), [batches(rank, 2) for rank in range(2)]
    assert [len(batch) for batch in whole] == [64, 64, 64]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert len(first) == len(second) == 32
        assert set(batch.tolist()) == set(first.tolist()) | set(second.tolist())


def test_a_trapezoid_is_the_same_for_any_length_until_it_falls():
    def rates(steps: int) -> list[float]:
        settings = RunSettings(schedule="trapezoid", learning_rate=2.0)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        schedule, found = make_schedule(settings, optimizer, steps), []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    short, long = rates(1000), rates(2000)
    assert short[:600] == long[:600] and short[0] == 0.01 and set(short[199:600]) == {2.0}
    assert short[800] == pytest.approx(1.0) and short[-1] == pytest.approx(0.005)


def test_training_lowers_the_loss_and_beats_chance(single_run):
    _, result = single_run
    assert result["epochs"][1]["train_loss"] < 0.7 * result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.6
    assert result["parameters"] == 29_034 and result["images_per_second"] > 0


def test_checkpoint_gives_the_accuracy_of_the_result_file(single_run, fashion_mnist_root):
    run_dir, result = single_run
    images, labels = fashion_mnist.load(fashion_mnist_root, train=False)
    images, labels = images[: SMALL.test_images], labels[: SMALL.test_images]
    probabilities = predict(load_network(get_architecture("fashion_cnn"), Path(run_dir, "checkpoint.pt")), images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert (probabilities.argmax(axis=1) == labels).mean() == pytest.approx(result["test_accuracy"], abs=1e-6)
    assert json.loads(Path(run_dir, "result.json").read_text()) == json.loads(json.dumps(result))


def test_event_file_holds_the_dashboard(single_run):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    run_dir, result = single_run
    events = EventMultiplexer().AddRunsFromDirectory(run_dir).Reload()
    assert list(events.Runs()) == ["."]  # one directory, one run
    tags = events.Runs()["."]
    steps = 2 * 1280 // 64
    scalars = read_scalars(run_dir)
    for measure in ("loss", "accuracy", "learning_rate", "gradient_norm", "images_per_second"):
        assert scalars[f"train/{measure}"]["step"].tolist() == list(range(1, steps + 1))
    assert scalars["test/accuracy"]["value"].iloc[-1] == pytest.approx(result["test_accuracy"])
    assert scalars["test/loss"]["step"].tolist() == [steps // 2, steps]
    assert scalars["train/learning_rate"]["value"].iloc[-1] < 0.01 * scalars["train/learning_rate"]["value"].max()
    assert tags["graph"] is True
    assert {"predictions/first", "predictions/mistakes", "confusion/matrix"} <= set(tags["images"])
    curves = {tag for tag in tags["tensors"] if tag.startswith("precision_recall/")}
    assert curves == {f"precision_recall/{name}" for name in fashion_mnist.CLASSES}
    assert any(tag.startswith("custom_scalars__config__") for tag in tags["tensors"])
    plugins = events.GetAccumulator(".").PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in plugins


def test_a_second_run_in_a_directory_replaces_the_first(fashion_mnist_root, tmp_path):
    settings = TrainingSettings(epochs=1, train_images=256, test_images=100)
    for _ in range(2):
        train(settings, fashion_mnist_root, str(tmp_path))
    assert read_scalars(str(tmp_path))["train/loss"]["step"].tolist() == [1, 2]


def test_events_reach_storage_that_cannot_append(monkeypatch, tmp_path):
    monkeypatch.setattr("helpers.training.dashboards.WHOLE_FILES_ONLY", (str(tmp_path),))
    dashboard = TrainingDashboard(str(tmp_path / "run"))
    dashboard.log_step(1, {"loss": 2.0})
    dashboard.log_epoch(1, {"test_loss": 1.0})
    assert read_scalars(str(tmp_path / "run"))["train/loss"]["value"].tolist() == [2.0]
    dashboard.log_step(2, {"loss": 1.5})
    dashboard.close()
    assert read_scalars(str(tmp_path / "run"))["train/loss"]["value"].tolist() == [2.0, 1.5]


def test_a_dashboard_that_goes_on_voids_what_came_after_the_checkpoint(tmp_path):
    first = TrainingDashboard(str(tmp_path))
    for step in range(1, 6):
        first.log_step(step, {"loss": 1.0})
    first.close()
    second = TrainingDashboard(str(tmp_path), steps=3)
    second.log_step(4, {"loss": 2.0})
    second.close()
    losses = read_scalars(str(tmp_path))["train/loss"]
    assert losses["step"].tolist() == [1, 2, 3, 4] and losses["value"].tolist() == [1.0, 1.0, 1.0, 2.0]


def test_figures_are_drawn(single_run):
    run_dir, _ = single_run
    images, labels = np.zeros((5, 28, 28), np.uint8), np.arange(5)
    figures = [
        plot_training({"one process": run_dir}),
        plot_confusion_matrix(labels, labels),
        plot_predictions(images, labels, labels[::-1]),
    ]
    titles = [axes.get_title() for axes in figures[2].axes]
    assert titles[0] == "Coat\nis T-shirt/top" and titles[2] == "Pullover"
    for figure in figures:
        figure.canvas.draw()


def test_two_spark_tasks_train_as_one_process(single_run, spark_run):
    (single_dir, single), (spark_dir, distributed) = single_run, spark_run
    assert distributed["processes"] == 2
    assert distributed["test_accuracy"] == pytest.approx(single["test_accuracy"], abs=0.05)
    torch.manual_seed(SMALL.seed)
    start = torch.nn.utils.parameters_to_vector(FashionCNN().parameters()).detach()
    # Batch norm sees half batches, so the two are close rather than equal.
    moves = [parameters_of(run_dir) - start for run_dir in (single_dir, spark_dir)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9


def test_only_one_rank_of_a_spark_run_writes_events(spark_run):
    run_dir, _ = spark_run
    assert read_scalars(run_dir)["train/loss"]["step"].tolist() == list(range(1, 41))


def test_the_dashboard_shows_how_each_process_did(spark_run, single_run):
    scalars = read_scalars(spark_run[0])
    for rank in range(2):
        assert scalars[f"throughput/rank_{rank}"]["step"].tolist() == [20, 40]
        assert scalars[f"throughput/rank_{rank}"]["value"].min() > 0
        assert 0 <= scalars[f"waiting/rank_{rank}"]["value"].min() <= scalars[f"waiting/rank_{rank}"]["value"].max() < 1
    # Alone, a process waits for nobody, and what it does is what the run does.
    alone = read_scalars(single_run[0])
    assert alone["waiting/rank_0"]["value"].max() < 0.1 and "throughput/rank_1" not in alone
    mean = single_run[1]["epochs"][0]["images_per_second"]
    assert alone["throughput/rank_0"]["value"].iloc[0] == pytest.approx(mean, rel=0.1)


def test_a_process_that_waits_for_the_others_is_told_from_one_that_is_slow():
    network = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    optimization = Optimization(RunSettings(precision="fp32"), ALONE, network, optimizer, 2)
    # As the exchange of gradients does: it comes after this process's own backward pass.
    handle = network.bias.register_hook(lambda gradient: time.sleep(0.05))  # part of the pass
    optimization.descend(optimization.forward(torch.ones(2, 4)).sum())
    assert optimization.waited < 0.04
    handle.remove()
    network.weight.register_post_accumulate_grad_hook(lambda parameter: time.sleep(0.05))
    optimization.descend(optimization.forward(torch.ones(2, 4)).sum())
    assert optimization.waited >= 0.05


def test_the_gradients_norm_is_shown_before_it_is_shortened():
    network = torch.nn.Linear(4, 1, bias=False)
    settings = RunSettings(precision="fp32", learning_rate=1.0, schedule="constant")
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    before = network.weight.detach().clone()
    optimization = Optimization(settings, ALONE, network, optimizer, 1, largest_gradient=0.5)
    measures = optimization.descend(optimization.forward(torch.full((1, 4), 3.0)).sum())
    assert measures == {"learning_rate": 1.0, "gradient_norm": pytest.approx(6.0)}
    assert (network.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_failing_rank_is_reported_with_its_own_message_and_not_started_again(spark, tmp_path, caplog):
    (tmp_path / "data").write_text("a file where the data folder should be")
    with pytest.raises(TrainingError, match=r"(?s)process \d of 2 failed with \w+Error: .*data.*Traceback"):
        train_on_spark(spark, SMALL, str(tmp_path / "data"), str(tmp_path / "run"), processes=2)
    assert "a training process was lost" not in caplog.text


def test_too_few_slots_are_an_error_at_once(spark, fashion_mnist_root, tmp_path):
    with pytest.raises(HostError, match="3 processes need 3 task slots.*Spark has 2"):
        train_on_spark(spark, SMALL, fashion_mnist_root, str(tmp_path), processes=3)


def test_a_gpu_that_is_not_there_is_one_clear_error(spark, fashion_mnist_root, tmp_path):
    with pytest.raises(HostError, match="no GPU"):
        train_on_spark(spark, SMALL, fashion_mnist_root, str(tmp_path), processes=2, use_gpu=True)
    if not torch.cuda.is_available():
        with pytest.raises(HostError, match="device='cpu'"):
            train(TrainingSettings(device="cuda"), fashion_mnist_root, str(tmp_path))


def test_each_process_has_a_gpu_of_its_own_and_the_precision_that_it_computes_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(HostError, match="this host has 1: start at most 1"), join_workers(RunSettings(device="cuda")):
        pass
    chosen, backends = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with join_workers(RunSettings(device="cuda")) as worker:
        assert (worker.rank, worker.processes, str(worker.device)) == (1, 2, "cuda:0")
    assert (chosen, backends) == ([0], ["nccl"])
    for native, precision in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert choose_precision(RunSettings(device="cuda")) == precision


@pytest.mark.parametrize("impossible", [{"epochs": 0}, {"precision": "fp64"}, {"learning_rate": -1}, {"epoch": 5}])
def test_impossible_settings_are_refused(impossible):
    with pytest.raises((ValidationError, TypeError)):
        TrainingSettings(**impossible)


def test_less_than_one_batch_is_refused(fashion_mnist_root, tmp_path):
    with pytest.raises(TrainingError, match="fewer than one batch"):
        train(TrainingSettings(train_images=100), fashion_mnist_root, str(tmp_path))
