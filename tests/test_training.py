"""The program of notebook 01: alone, in Spark tasks, and what it leaves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import FASHION, alone, train_fashion, weights

import fashion_data
import fashion_mnist
from fashion_mnist import MEAN, STD, FashionCNN, compute_logits, normalize
from figures import plot_confusion_matrix, plot_predictions
from helpers.errors import HostError, TrainingError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import load_network
from helpers.tracking.tensorboard import read_scalars
from helpers.training import Pace, fastest_dtype, join_group, share_batches
from studies.figures import plot_training


@pytest.fixture(scope="module")
def single_run(fashion_mnist_root, tmp_path_factory):
    """A small training on one process: its directory and its result."""
    run_dir = str(tmp_path_factory.mktemp("single"))
    return run_dir, train_fashion(FASHION, fashion_mnist_root, run_dir)


@pytest.fixture
def spark_run(two_ranks):
    """The same on two Spark tasks."""
    return two_ranks["fashion"]


def parameters_of(run_dir: str) -> torch.Tensor:
    network = load_network(get_architecture("fashion_cnn"), Path(run_dir, "checkpoint.pt"))
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def test_network_has_the_papers_29034_parameters():
    model = FashionCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 29_034
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_normalization_is_that_of_the_training_set(fashion_mnist_root):
    images, _ = fashion_data.load(fashion_mnist_root, train=True)
    assert images.mean() == pytest.approx(MEAN, abs=1e-3) and images.std() == pytest.approx(STD, abs=1e-3)
    inputs = normalize(torch.as_tensor(images[:10]))
    assert inputs.shape == (10, 1, 28, 28) and inputs.dtype == torch.float32


def test_shares_of_the_ranks_make_up_the_batch_of_one():
    def batches(rank: int, world_size: int) -> list[torch.Tensor]:
        return list(share_batches(200, alone(rank, world_size), batch_size=64, seed=0, epoch=1))

    whole, shares = batches(0, 1), [batches(rank, 2) for rank in range(2)]
    assert [len(batch) for batch in whole] == [64, 64, 64]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert len(first) == len(second) == 32
        assert set(batch.tolist()) == set(first.tolist()) | set(second.tolist())


def test_training_lowers_the_loss_and_beats_chance(single_run):
    _, result = single_run
    assert result["epochs"][1]["train_loss"] < 0.7 * result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.6
    assert result["parameters"] == 29_034 and result["images_per_second"] > 0


def test_checkpoint_gives_the_accuracy_of_the_result_file(single_run, fashion_mnist_root):
    run_dir, result = single_run
    images, labels = (part[:500] for part in fashion_data.load(fashion_mnist_root, train=False))
    network = load_network(get_architecture("fashion_cnn"), Path(run_dir, "checkpoint.pt"))
    predictions = compute_logits(network, torch.as_tensor(images)).argmax(dim=1).numpy()
    assert (predictions == labels).mean() == pytest.approx(result["test_accuracy"], abs=1e-6)
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
    assert curves == {f"precision_recall/{name}" for name in fashion_data.CLASSES}
    assert any(tag.startswith("custom_scalars__config__") for tag in tags["tensors"])
    plugins = events.GetAccumulator(".").PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in plugins


def test_figures_are_drawn(single_run):
    run_dir, _ = single_run
    images, labels = np.zeros((5, 28, 28), np.uint8), np.arange(5)
    figures = [
        plot_training({"one process": run_dir}),
        plot_confusion_matrix(labels, labels, fashion_data.CLASSES),
        plot_predictions(images, labels, labels[::-1], fashion_data.CLASSES),
    ]
    titles = figures[2].axes[0].texts
    assert titles[0].get_text() == "Coat\nis T-shirt/top" and titles[2].get_text() == "Pullover"
    assert [title.get_color() for title in titles[:3]] == ["crimson", "crimson", "black"]
    assert len(figures[2].axes[0].images) == len(titles) == 5
    for figure in figures:
        figure.canvas.draw()


def test_two_spark_tasks_train_as_one_process(single_run, spark_run):
    (single_dir, single), (spark_dir, distributed) = single_run, spark_run
    assert distributed["processes"] == 2
    assert distributed["test_accuracy"] == pytest.approx(single["test_accuracy"], abs=0.05)
    torch.manual_seed(0)
    start = torch.nn.utils.parameters_to_vector(FashionCNN().parameters()).detach()
    # Batch norm sees half batches, so the two are close rather than equal.
    moves = [parameters_of(run_dir) - start for run_dir in (single_dir, spark_dir)]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9


def test_what_comes_back_from_spark_is_the_result_file(spark_run):
    run_dir, result = spark_run
    assert json.loads(Path(run_dir, "result.json").read_text()) == result


def test_only_one_rank_of_a_spark_run_writes_events(spark_run):
    run_dir, _ = spark_run
    assert read_scalars(run_dir)["train/loss"]["step"].tolist() == list(range(1, 41))


def test_the_dashboard_shows_how_each_rank_did(spark_run, single_run):
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


@pytest.mark.skipif(sys.platform != "linux", reason="this system's C library is not GNU's")
def test_a_rank_keeps_what_a_step_frees_until_the_training_ends():
    program = """
import resource
from helpers.training import join_group

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [bytearray(100_000) for _ in range(500)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def second_step():
    return [step(), step()][1]

before = second_step()
with join_group():
    within = second_step()
print(before, within, second_step())
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, within, afterwards = map(int, answer.stdout.split())
    assert within < 1000 < 10_000 < min(before, afterwards)  # pages of 4 KiB; a step takes 12,000


def test_a_rank_that_waits_for_the_others_is_told_from_one_that_is_slow():
    network = torch.nn.Linear(4, 4)
    pace = Pace(network, alone(), batch_size=2)

    def step() -> dict[str, float]:
        pace.start()
        network(torch.ones(2, 4)).sum().backward()
        pace.end_backward()
        assert pace.end_step() < 2 / 0.05  # images per second
        return pace.of_ranks()

    handle = network.bias.register_hook(lambda gradient: time.sleep(0.05))  # part of this rank's own backward pass
    assert step()["waiting/rank_0"] < 0.5
    handle.remove()
    # As the exchange of gradients does: it comes after this rank's own backward pass.
    network.weight.register_post_accumulate_grad_hook(lambda parameter: time.sleep(0.05))
    assert step()["waiting/rank_0"] > 0.5
    assert pace.images_per_second == 0  # of what has come since


def test_a_gpu_that_is_not_there_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HostError, match="use device cpu"), join_group("cuda"):
        pass


def test_each_rank_has_a_gpu_of_its_own_and_the_precision_that_it_computes_in(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(HostError, match="this host has 1: start at most 1"), join_group("cuda"):
        pass
    chosen, backends = [], []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with join_group("cuda") as group:
        assert (group.rank, group.world_size, str(group.device)) == (1, 2, "cuda:0")
    assert (chosen, backends) == ([0], ["nccl"])
    for native, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert fastest_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize("impossible", ["--epochs=0", "--precision=fp64", "--batch-size=-1", "--epoch-count=5"])
def test_impossible_arguments_are_refused(impossible, capsys):
    with pytest.raises(SystemExit):
        fashion_mnist.parse([impossible])
    assert "error: " in capsys.readouterr().err


def test_less_than_one_batch_is_refused(fashion_mnist_root):
    with pytest.raises(TrainingError, match="100 training images are fewer than one batch of 128"):
        train_fashion(["--train-images", "100"], fashion_mnist_root)


def test_a_second_run_in_a_directory_replaces_the_first(fashion_mnist_root, tmp_path):
    one_step = ["--epochs", "1", "--batch-size", "16", "--train-images", "16", "--test-images", "100", "--width", "2"]
    for seed in ("0", "1"):
        train_fashion([*one_step, "--seed", seed], fashion_mnist_root, tmp_path)
    assert read_scalars(str(tmp_path))["train/loss"]["step"].tolist() == [1]
    assert weights(tmp_path)["classifier.weight"].shape == (10, 7 * 7 * 4)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["seed"] == 1
