"""Three ways for ranks to exchange gradients or parameters, which show why all-reduce is usual.

`all-reduce` averages the gradients of all ranks at every step (Li et al., arXiv:2006.15704). `local` lets each take
plain steps of its own and averages the parameters every k-th (local SGD: Stich, arXiv:1805.09767, algorithm 1).
`stale` is one process that plays a parameter server without locks: each gradient is of the parameters some steps
before (Dean et al., NIPS 2012, section 4.1). The number of steps is fixed, so every run is the same. All use plain SGD
at a constant rate, because momentum would hide the differences. There are no checkpoints.
"""

import argparse
import json
import os
import time
from collections import deque
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fashion_data
from fashion_mnist import FashionCNN, compute_logits, normalize, positive
from helpers.errors import TrainingError
from helpers.training import Group, count_steps, join_group, save_network, share_batches


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--synchrony", choices=("all-reduce", "local", "stale"), default="all-reduce")
    add("--every", type=positive, default=1, help="of local: steps from one average to the next")
    add("--staleness", type=int, default=0, help="of stale: steps by which a gradient is late")
    add("--epochs", type=positive, default=3)
    add("--batch-size", type=positive, default=64, help="images per step, of all ranks together")
    add("--learning-rate", type=float, default=0.02)
    add("--train-images", type=positive, help="the first so many; by default all")
    add("--test-images", type=positive, default=2000, help="the first so many")
    add("--seed", type=int, default=0)
    add("--data", default="out/data", help="where Fashion-MNIST is, or will be put")
    add("--run-dir", required=True, help="where the network and the result go")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train a `FashionCNN`, alone or as one of several ranks, and evaluate after each epoch.

    Returns:
        What `result.json` holds: `loss` of each step, averaged over the ranks, and `seconds` at which it was known,
        evaluations left out; `test_loss` and `test_accuracy` of each epoch; settings.

    Raises:
        TrainingError: stale gradients are asked for with several ranks, or the batch does not divide over them.
        DataError: there is no data set.
    """
    with join_group(run_dir=options.run_dir) as group:
        if options.synchrony == "stale" and group.world_size > 1:
            raise TrainingError("stale gradients are simulated: train with one process")
        fashion_data.download(options.data)
        images, labels = load(options.data, True, options.train_images)
        test_set = load(options.data, False, options.test_images)
        count_steps(images, options.batch_size, group)
        torch.manual_seed(options.seed)
        network = FashionCNN()
        parameters = dict(network.named_parameters())
        synchronous = options.synchrony == "all-reduce" and group.world_size > 1
        # In all three ways, batch norm's statistics stay each rank's own until the end of an epoch.
        model = DistributedDataParallel(network, forward_sync_buffers=False) if synchronous else network
        optimizer = torch.optim.SGD(network.parameters(), lr=options.learning_rate)
        # The oldest come first. At the beginning there are no older ones, so gradients are less late.
        history: deque[dict[str, torch.Tensor]] = deque(maxlen=options.staleness + 1)
        result: dict[str, Any] = {"loss": [], "seconds": [], "test_loss": [], "test_accuracy": []}
        seconds, steps = 0.0, 0
        for epoch in range(options.epochs):
            started, losses = time.perf_counter() - seconds, []
            network.train()
            for share in share_batches(len(images), group, options.batch_size, options.seed, epoch):
                inputs = normalize(images[share])
                optimizer.zero_grad()
                if options.synchrony == "stale":
                    history.append({name: p.detach().clone().requires_grad_() for name, p in parameters.items()})
                    late = history[0]
                    logits = torch.func.functional_call(network, late, (inputs,))
                    loss = nn.functional.cross_entropy(logits, labels[share])
                    gradients = torch.autograd.grad(loss, list(late.values()))
                    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                        parameter.grad = gradient
                else:
                    loss = nn.functional.cross_entropy(model(inputs), labels[share])
                    loss.backward()
                optimizer.step()
                steps += 1
                if options.synchrony == "local" and steps % options.every == 0:
                    average_parameters(group, network)
                losses.append(loss.detach())
                seconds = time.perf_counter() - started
                result["seconds"].append(seconds)
            # The average comes only now, because one at every step would keep ranks together that ought to run apart.
            mean = torch.stack(losses)
            group.average([mean])
            result["loss"] += mean.tolist()
            average_parameters(group, network)
            group.average(network.buffers())
            logits = compute_logits(network, test_set[0])
            result["test_loss"].append(nn.functional.cross_entropy(logits, test_set[1]).item())
            result["test_accuracy"].append((logits.argmax(dim=1) == test_set[1]).float().mean().item())
        result |= {"processes": group.world_size, "settings": vars(options)}
        if group.rank == 0:
            save_network(network, result, options.run_dir)
        return result


def load(data: str, train: bool, count: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels, the first of them."""
    images, labels = fashion_data.load(data, train)
    return torch.from_numpy(images[:count]), torch.from_numpy(labels[:count])


@torch.no_grad()
def average_parameters(group: Group, network: nn.Module) -> None:
    """Give all ranks the mean of their parameters."""
    if group.world_size > 1:
        # One message carries all tensors: the network is small, so latency is the cost of an average.
        vector = nn.utils.parameters_to_vector(network.parameters())
        group.average([vector])
        nn.utils.vector_to_parameters(vector, network.parameters())


if __name__ == "__main__":
    outcome = train(parse())
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(outcome))
