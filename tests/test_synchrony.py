import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from trainings import SYNCHRONY, alone, places, weights

import fashion_data
import synchrony
from fashion_mnist import FashionCNN, normalize
from helpers.errors import TrainingError
from helpers.training import share_batches

RATE = 0.02


def parameters_of(run_dir: Any) -> torch.Tensor:
    network = FashionCNN()
    network.load_state_dict(weights(run_dir))
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def train(data: str, run_dir: Any, *arguments: str) -> dict[str, Any]:
    return synchrony.train(synchrony.parse([*SYNCHRONY, *places(data, run_dir), *arguments]))


def shares(images: int):
    """The batches of the first epoch."""
    return share_batches(images, alone(), batch_size=64, seed=0, epoch=0)


def test_local_sgd_with_an_average_every_step_is_all_reduce(two_ranks):
    (first_dir, first), (second_dir, second) = two_ranks["all-reduce"], two_ranks["local-1"]
    assert first["settings"]["synchrony"] == "all-reduce" and second["settings"]["synchrony"] == "local"
    assert first["processes"] == second["processes"] == 2
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-3)
    torch.testing.assert_close(parameters_of(first_dir), parameters_of(second_dir), rtol=1e-3, atol=1e-5)


def test_averaging_more_seldom_is_something_else_and_learns_too(two_ranks):
    (all_reduce_dir, _), (local_dir, local) = two_ranks["all-reduce"], two_ranks["local-5"]
    assert (parameters_of(all_reduce_dir) - parameters_of(local_dir)).abs().max() > 1e-3
    assert np.mean(local["loss"][-3:]) < 0.8 * local["loss"][0]
    assert len(local["loss"]) == len(local["seconds"]) == 15 and local["seconds"] == sorted(local["seconds"])


def test_no_staleness_is_ordinary_sgd_exactly(fashion_mnist_root, tmp_path):
    result = train(fashion_mnist_root, tmp_path, "--synchrony", "stale")
    images, labels = (torch.as_tensor(a[:960]) for a in fashion_data.load(fashion_mnist_root, train=True))
    torch.manual_seed(0)
    network, losses = FashionCNN(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for indices in shares(960):
        loss = torch.nn.functional.cross_entropy(network(normalize(images[indices])), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.set_num_threads(threads)
    assert result["loss"] == losses
    assert torch.equal(parameters_of(tmp_path), torch.nn.utils.parameters_to_vector(network.parameters()).detach())


def test_the_later_gradients_are_the_worse_they_serve(fashion_mnist_root, tmp_path):
    finals = []
    for staleness in (0, 4, 12):
        way = ["--synchrony", "stale", "--staleness", str(staleness), "--learning-rate", "0.005", "--epochs", "2"]
        finals.append(float(np.mean(train(fashion_mnist_root, tmp_path, *way)["loss"][-5:])))
    assert 1.1 * finals[0] < finals[1] and 1.1 * finals[1] < finals[2]


def test_a_late_gradient_is_of_the_parameters_before(fashion_mnist_root, tmp_path):
    """With a delay of one, the first two gradients are both those of the initial parameters."""
    run_dir = tmp_path / "two"
    train(fashion_mnist_root, run_dir, "--synchrony", "stale", "--staleness", "1", "--train-images", "128")
    images, labels = (torch.as_tensor(a[:128]) for a in fashion_data.load(fashion_mnist_root, train=True))
    torch.manual_seed(0)
    network = FashionCNN()
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    moved = torch.zeros_like(start)
    for indices in shares(128):
        loss = torch.nn.functional.cross_entropy(network(normalize(images[indices])), labels[indices])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        moved -= RATE * torch.nn.utils.parameters_to_vector(gradients)
    torch.testing.assert_close(parameters_of(run_dir), start + moved, rtol=1e-4, atol=1e-6)


def test_stale_gradients_of_several_ranks_are_refused(fashion_mnist_root, tmp_path, monkeypatch):
    monkeypatch.setattr(synchrony, "join_group", lambda run_dir: contextlib.nullcontext(alone(0, 2)))
    with pytest.raises(TrainingError, match="train with one process"):
        train(fashion_mnist_root, tmp_path, "--synchrony", "stale")
