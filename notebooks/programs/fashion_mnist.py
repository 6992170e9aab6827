"""Train a network on Fashion-MNIST. An ordinary program: it runs alone, under torchrun, and in Spark tasks, unchanged.

    python programs/fashion_mnist.py --data ../out/data --run-dir ../out/runs/mine --epochs 5
    torchrun --nproc-per-node 2 programs/fashion_mnist.py ...
    train_on_spark(spark, "programs/fashion_mnist.py", [...], processes=2)      # in a notebook

Rank 0 writes TensorBoard's events, `checkpoint.pt` (a state_dict) and `result.json` to the run directory, and
checkpoints until then. The same call goes on where an interrupted one stopped. The last line of its output is the
result.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fashion_data
import fashion_sets
from augmentation import augment
from fashion_data import CLASSES
from fashion_resnet import FashionResNet
from figures import plot_confusion_matrix, plot_predictions
from helpers.redaction import redact
from helpers.storage import StorageOptions
from helpers.tracking.mlflow import open_writers
from helpers.tracking.writers import Writer
from helpers.training import (
    Checkpoints,
    Group,
    MappedImages,
    Pace,
    Progress,
    count_steps,
    fastest_dtype,
    join_group,
    read_batches,
    save_network,
)
from muon import Muon

MEAN, STD = 72.9404, 90.0212  # of the 60,000 training images, pixels from 0 to 255
EVALUATION_BATCH = 100  # images at once: what the layers make of more leaves a processor's cache
PROJECTED = 1000  # images in TensorBoard's Projector
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHARTS = {
    "loss": ["train/loss", "val/loss", "test/loss"],
    "accuracy": ["train/accuracy", "val/accuracy", "test/accuracy"],
    "throughput": ["train/images_per_second", r"throughput/rank_\d+"],
}
# A recipe that a CPU affords in minutes, chosen on 10,000 held-out training images. `tests/bench/recipe.py` measures
# its accuracy on the test images.
RECIPE = ["--network", "fashion_resnet", "--epochs", "9", "--evaluate-every", "9", "--batch-size", "256"]
RECIPE += ["--optimizer", "muon", "--learning-rate", "0.1", "--weight-decay", "0.02", "--label-smoothing", "0.1"]
RECIPE += ["--horizontal-flip", "--shift", "1"]
# Arguments that say how and where a training runs, and do not decide its result.
HOW = {"data", "run_dir", "device", "threads", "num_workers", "resume", "checkpoints", "checkpoint_steps"}
HOW |= {"endpoint", "credential", "mlflow"}


class FashionCNN(nn.Module):
    """Two blocks of 5x5 convolution, batch norm, ReLU and 2x2 max-pool, then one fully connected layer."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(self.block(1, width), self.block(width, 2 * width))
        self.classifier = nn.Linear(7 * 7 * 2 * width, classes)  # two halvings leave 7x7 positions of a 28x28 image

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map normalized float32 images `[B, 1, 28, 28]` to logits `[B, classes]`."""
        return self.classifier(self.features(images).flatten(1))

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Halve the sides."""
        convolution = nn.Conv2d(inputs, outputs, kernel_size=5, padding=2)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


NETWORKS: dict[str, type[nn.Module]] = {"fashion_cnn": FashionCNN, "fashion_resnet": FashionResNet}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the last of repeated arguments counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--network", choices=NETWORKS, default="fashion_cnn")
    add("--width", type=positive, help="channels of the first convolution; by default the network's own")
    add("--epochs", type=positive, default=5)
    add("--batch-size", type=positive, default=128, help="images per step, of all ranks together")
    add("--optimizer", choices=("adamw", "muon"), default="adamw")
    add("--learning-rate", type=float, default=5e-3, help="the highest of the one-cycle schedule")
    add("--weight-decay", type=float, default=0.01)
    add("--label-smoothing", type=float, default=0.0)
    add("--horizontal-flip", action=argparse.BooleanOptionalAction, default=False, help="of half of the images")
    add("--shift", type=int, default=0, help="pixels, up to, in both directions")
    add("--cutout", type=int, default=0, help="pixels, the side of a square that is blackened")
    add("--seed", type=int, default=0)
    add("--precision", choices=DTYPES, help="by default the fastest that the device computes in")
    add("--training-set", help="a folder with labels.parquet, or shards; by default Fashion-MNIST")
    add("--train-images", type=positive, help="the first so many; by default all")
    add("--validation-images", type=int, default=0, help="held out of training, evaluated instead of the test images")
    add("--test-images", type=positive, help="the first so many; by default all")
    add("--evaluate-every", type=positive, default=1, help="epochs; after the last in any case")
    add("--data", default="out/data", help="where Fashion-MNIST is, or will be put")
    add("--run-dir", help="where the network, the events and the checkpoints go; by default nowhere")
    add("--checkpoints", help="a location of any kind for these; by default in the run directory")
    add("--checkpoint-steps", type=positive, help="steps from one to the next; by default an epoch")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with an interrupted training")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=positive, default=1, help="of each rank")
    add("--num-workers", type=int, default=0, help="processes that read ahead for each rank")
    add("--mlflow", default="auto", help="a server's address, auto or off, as tracking.mlflow")
    add("--endpoint", help="of object storage, in place of the service's own")
    add("--credential", default="default", help="where that of object storage is found, as storage.credential")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A whole number above 0; argparse explains a ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def train(options: argparse.Namespace, report: Callable[[int, float], None] | None = None) -> dict[str, Any]:
    """Train and evaluate, alone or as one of several ranks.

    Args:
        options: what `parse` returns.
        report: called with each evaluated epoch, from 1, and its accuracy; an exception of it ends the training.

    Returns:
        What `result.json` holds: accuracy (0 to 1) and loss as `test_NAME`, of held-out images as `val_NAME`, those of
        each epoch, images per second, CPU seconds of all ranks together, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the ranks, there is less than one batch, images of a stored
            training set are to be held out, or another training or an unfinished one with other settings is there.
        DataError: there is no data set.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with join_group(options.device, options.threads, options.run_dir) as group, ExitStack() as stack:
        fashion_data.download(options.data)
        storage = argparse.Namespace(storage=StorageOptions(options.endpoint, options.credential))
        training_set, evaluated = fashion_sets.open_sets(options, storage)
        kind = "val" if options.validation_images else "test"
        steps_per_epoch = count_steps(training_set, options.batch_size, group)

        torch.manual_seed(options.seed)
        network = NETWORKS[options.network](**({"width": options.width} if options.width else {}))
        network.to(group.device).to(memory_format=torch.channels_last)
        torch.manual_seed(options.seed * group.world_size + group.rank)  # each rank augments in its own way
        # An evaluation and a checkpoint average batch norm's statistics, so they need no broadcast at every step.
        model = DistributedDataParallel(network, forward_sync_buffers=False) if group.world_size > 1 else network

        make = Muon if options.optimizer == "muon" else torch.optim.AdamW
        optimizer = make(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        # Warm up over a fifth, then decay to nothing: a constant rate wanders about the minimum at the end. AdamW's
        # momentum falls while the rate rises; Muon's stays, as in its authors' training.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            options.learning_rate,
            options.epochs * steps_per_epoch,
            pct_start=0.2,
            cycle_momentum=options.optimizer == "adamw",
        )
        dtype = DTYPES[options.precision] if options.precision else fastest_dtype(group.device)
        scaler = torch.amp.GradScaler(group.device.type, enabled=dtype == torch.float16)

        settings = {name: value for name, value in vars(options).items() if name not in HOW}
        parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        place = options.checkpoints or f"{options.run_dir}/checkpoints"
        checkpoints = Checkpoints(place, group, parts, settings, options.resume, storage) if options.run_dir else None
        progress = checkpoints.restore() if checkpoints else Progress()
        board = (
            stack.enter_context(open_writers(options.run_dir, options.mlflow, settings, progress.steps, CHARTS))
            if options.run_dir and group.rank == 0
            else None
        )
        pace, logits = Pace(network, group, options.batch_size), None

        def save() -> None:
            if board:
                board.publish()  # or events of steps before the checkpoint would be missing after a crash
            if checkpoints:
                checkpoints.save(progress)

        while progress.epoch < options.epochs:
            network.train()
            pace.start()
            shares = training_set.shares(group, options.batch_size, options.seed, progress.epoch, progress.batches)
            for batch in read_batches(training_set, shares, group, options.num_workers):
                images, labels = (part.to(group.device, non_blocking=True) for part in batch)
                images = augment(images, progress.epoch, options.horizontal_flip, options.shift, options.cutout)
                with torch.autocast(group.device.type, dtype, enabled=dtype != torch.float32):
                    logits = model(normalize(images)).float()
                loss = nn.functional.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
                learning_rate = float(schedule.get_last_lr()[0])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                pace.end_backward()
                scaler.unscale_(optimizer)
                gradient_norm = nn.utils.get_total_norm(p.grad for p in network.parameters() if p.grad is not None)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()

                measures = {
                    "loss": loss.item(),
                    "accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
                    "learning_rate": learning_rate,
                    "gradient_norm": gradient_norm.item(),
                    "images_per_second": pace.end_step(),
                }
                progress.add_step({"loss": measures["loss"]})
                if board:
                    board.log_scalars({f"train/{name}": value for name, value in measures.items()}, progress.steps)
                if options.checkpoint_steps and progress.steps % options.checkpoint_steps == 0:
                    save()
                    pace.start()

            epoch, rate, ranks, evaluation = progress.epoch + 1, pace.images_per_second, pace.of_ranks(), {}
            if epoch % options.evaluate_every == 0 or epoch == options.epochs:
                logits = evaluate(network, evaluated, group)
                evaluation = measure(logits, evaluated.labels, kind)
            progress.add_epoch({"images_per_second": rate} | evaluation)
            if group.rank == 0:
                message = f", {kind} accuracy {evaluation[f'{kind}_accuracy']:.4f}" if evaluation else ""
                mean = progress.epochs[-1]["train_loss"]
                print(
                    f"epoch {epoch}/{options.epochs}: training loss {mean:.3f}{message}, {rate:,.0f} images/s",
                    flush=True,
                )
            if board:
                tags = {name.replace("_", "/", 1): value for name, value in evaluation.items()}  # test/accuracy
                board.log_scalars(ranks | tags, progress.steps)
            save()
            if report and evaluation:
                report(epoch, evaluation[f"{kind}_accuracy"])

        if logits is None:  # interrupted after its last epoch
            logits = evaluate(network, evaluated, group)
        result = measure(logits, evaluated.labels, kind) | {
            "images_per_second": float(np.median([epoch["images_per_second"] for epoch in progress.epochs])),
            "seconds": time.perf_counter() - started,
            "cpu_seconds": sum(group.gather(time.process_time() - cpu_started)),
            "processes": group.world_size,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "precision": next(name for name, known in DTYPES.items() if known == dtype),
            "resumed_at": progress.resumed_at,
            "epochs": progress.epochs,
            "settings": vars(options) | {"mlflow": redact(options.mlflow)},
        }
        if board and checkpoints:
            log_results(board, network, evaluated, logits, result, kind)
            board.publish()
            save_network(network, result, options.run_dir)
            checkpoints.clear()
        return result


def evaluate(network: nn.Module, images: MappedImages, group: Group) -> torch.Tensor:
    """The logits of all images, float32 `[N, classes]`, on every rank; each rank computes its share."""
    group.average(network.buffers())
    share = slice(group.rank, None, group.world_size)
    own = compute_logits(network, torch.from_numpy(np.array(images.images[share])).to(group.device))
    logits = own.new_zeros((len(images), own.shape[1]))
    logits[share] = own  # zeros elsewhere, so that the sum over the ranks is everyone's logits in order
    if group.world_size > 1:
        dist.all_reduce(logits)
    return logits


def measure(logits: torch.Tensor, labels: np.ndarray, kind: str) -> dict[str, float]:
    """Loss and accuracy, as `KIND_loss` and `KIND_accuracy`."""
    truth = torch.from_numpy(labels).to(logits.device)
    accuracy = (logits.argmax(dim=1) == truth).float().mean().item()
    return {f"{kind}_loss": nn.functional.cross_entropy(logits, truth).item(), f"{kind}_accuracy": accuracy}


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images `[B, 28, 28]` into the network's input, float32 `[B, 1, 28, 28]`, channels last."""
    return images.unsqueeze(1).float().sub_(MEAN).div_(STD).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def compute_logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Evaluate a network on uint8 images `[N, 28, 28]` in full precision: float32 logits `[N, classes]`."""
    network.eval()
    return torch.cat([network(normalize(batch)) for batch in images.split(EVALUATION_BATCH)])


@torch.inference_mode()
def embed(network: FashionResNet, images: np.ndarray) -> np.ndarray:
    """The last hidden layer for uint8 images `[N, 28, 28]`: float32 `[N, channels]`."""
    device = next(network.parameters()).device
    return network.eval().embed(normalize(torch.from_numpy(np.array(images)).to(device))).float().cpu().numpy()


def log_results(
    board: Writer, network: nn.Module, evaluated: MappedImages, logits: torch.Tensor, result: dict, kind: str
) -> None:
    """Write what the end of a training shows: pictures, a curve per class, graph, hyperparameters and embedding."""
    images, labels, probabilities = evaluated.images, evaluated.labels, logits.softmax(dim=1).cpu().numpy()
    predictions = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    for name, chosen in (("first", slice(None)), ("mistakes", wrong)):
        if len(labels[chosen]):
            figure = plot_predictions(images[chosen], labels[chosen], predictions[chosen], CLASSES)
            board.log_figure(f"predictions/{name}", figure)
    board.log_figure("confusion/matrix", plot_confusion_matrix(labels, predictions, CLASSES))
    for number, name in enumerate(CLASSES):
        board.log_precision_recall(f"precision_recall/{name}", labels == number, probabilities[:, number])
    board.log_graph(network, torch.zeros(1, 1, 28, 28, device=logits.device))
    board.log_hyperparameters(result["settings"], {f"final/{kind}_accuracy": result[f"{kind}_accuracy"]})
    if isinstance(network, FashionResNet):  # the other network's last layer has more channels than the projector takes
        few = slice(PROJECTED)
        board.log_embedding(embed(network, images[few]), [CLASSES[label] for label in labels[few]], images[few])


if __name__ == "__main__":
    outcome = train(parse())
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(outcome))
