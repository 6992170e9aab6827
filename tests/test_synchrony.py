import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import FashionCNN, normalise
from helpers.training.distributed import train_on_spark
from helpers.training.synchrony import SynchronySettings, train
from helpers.training.workers import Worker, batches_of

from helpers.errors import TrainingError

SMALL = SynchronySettings(epochs=1, batch_size=64, train_images=960, test_images=200, learning_rate=0.02)


def parameters_of(run_dir: str) -> torch.Tensor:
    network = FashionCNN()
    network.load_state_dict(torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True))
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.fixture(scope="module")
def spark_runs(spark, fashion_mnist_root, tmp_path_factory):
    """Two Spark tasks that all-reduce, and that average every step and every fifth: folders and results by name."""
    ways = {"all-reduce": {}, "local-1": {"every": 1}, "local-5": {"every": 5}}
    runs = {}
    for name, change in ways.items():
        run_dir = str(tmp_path_factory.mktemp(name))
        settings = dataclasses.replace(SMALL, synchrony=name.partition("-1")[0].partition("-5")[0], **change)
        runs[name] = run_dir, train_on_spark(spark, settings, fashion_mnist_root, run_dir, 2, train=train)
    return runs


def test_local_sgd_with_an_average_every_step_is_all_reduce(spark_runs):
    (first_dir, first), (second_dir, second) = spark_runs["all-reduce"], spark_runs["local-1"]
    assert first["settings"]["synchrony"] == "all-reduce" and second["settings"]["synchrony"] == "local"
    assert first["processes"] == second["processes"] == 2
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-3)
    torch.testing.assert_close(parameters_of(first_dir), parameters_of(second_dir), rtol=1e-3, atol=1e-5)


def test_averaging_more_seldom_is_something_else_and_learns_too(spark_runs):
    (all_reduce_dir, _), (local_dir, local) = spark_runs["all-reduce"], spark_runs["local-5"]
    assert (parameters_of(all_reduce_dir) - parameters_of(local_dir)).abs().max() > 1e-3
    assert np.mean(local["loss"][-3:]) < 0.8 * local["loss"][0]
    assert len(local["loss"]) == len(local["seconds"]) == 15 and local["seconds"] == sorted(local["seconds"])


def test_no_staleness_is_ordinary_sgd_exactly(fashion_mnist_root, tmp_path):
    result = train(dataclasses.replace(SMALL, synchrony="stale"), fashion_mnist_root, str(tmp_path))
    images, labels = (torch.as_tensor(a[:960]) for a in fashion_mnist.load(fashion_mnist_root, train=True))
    torch.manual_seed(SMALL.seed)
    network, losses = FashionCNN(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=SMALL.learning_rate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for indices in batches_of(SMALL, Worker(0, 1, torch.device("cpu")), 960, epoch=0):
        loss = torch.nn.functional.cross_entropy(network(normalise(images[indices])), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    assert result["loss"] == losses
    assert torch.equal(parameters_of(str(tmp_path)), torch.nn.utils.parameters_to_vector(network.parameters()).detach())


def test_the_later_gradients_are_the_worse_they_serve(fashion_mnist_root, tmp_path):
    finals = []
    for staleness in (0, 4, 12):
        settings = dataclasses.replace(SMALL, learning_rate=0.005, synchrony="stale", staleness=staleness, epochs=2)
        finals.append(float(np.mean(train(settings, fashion_mnist_root, str(tmp_path))["loss"][-5:])))
    assert 1.1 * finals[0] < finals[1] and 1.1 * finals[1] < finals[2]


def test_a_late_gradient_is_of_the_parameters_before(fashion_mnist_root, tmp_path):
    """With a delay of one, the first two gradients are both those of the initial parameters."""
    run_dirs = [str(tmp_path / name) for name in ("one", "two")]
    steps = [dataclasses.replace(SMALL, synchrony="stale", staleness=1, train_images=64 * n) for n in (1, 2)]
    for run_dir, settings in zip(run_dirs, steps, strict=True):
        train(settings, fashion_mnist_root, run_dir)
    images, labels = (torch.as_tensor(a[:128]) for a in fashion_mnist.load(fashion_mnist_root, train=True))
    torch.manual_seed(SMALL.seed)
    network = FashionCNN()
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    moved = torch.zeros_like(start)
    for indices in batches_of(SMALL, Worker(0, 1, torch.device("cpu")), 128, epoch=0):
        loss = torch.nn.functional.cross_entropy(network(normalise(images[indices])), labels[indices])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        moved -= SMALL.learning_rate * torch.nn.utils.parameters_to_vector(gradients)
    torch.testing.assert_close(parameters_of(run_dirs[1]), start + moved, rtol=1e-4, atol=1e-6)


def test_stale_gradients_of_several_processes_are_refused(spark, fashion_mnist_root, tmp_path):
    settings = dataclasses.replace(SMALL, synchrony="stale")
    with pytest.raises(TrainingError, match="train with one process"):
        train_on_spark(spark, settings, fashion_mnist_root, str(tmp_path), 2, train=train)
