"""Train YOLACT on scenes of Fashion-MNIST items, or on your own images with COCO's annotations.

    python programs/train_yolact.py --data ../out/data --run-dir ../out/runs/mine --epochs 2
    torchrun --nproc-per-node 2 programs/train_yolact.py ...
    train_on_spark(spark, "programs/train_yolact.py", [...], processes=2)       # in a notebook

Rank 0 writes TensorBoard's events and, after each epoch, `checkpoint.pt` (a state_dict) and `result.json` to the run
directory, and checkpoints until the end. The same call goes on where an interrupted one stopped. The last line of its
output is the result.
"""

import argparse
import json
import os
import time
from contextlib import ExitStack
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fashion_data
from figures import plot_instances
from helpers.errors import DataError
from helpers.metrics import average_precision
from helpers.redaction import redact
from helpers.storage import StorageOptions
from helpers.tracking.mlflow import open_writers
from helpers.training import (
    Checkpoints,
    Group,
    Pace,
    count_steps,
    fastest_dtype,
    join_group,
    read_batches,
    save_network,
)
from helpers.yolact import build
from helpers.yolact.configurations import CONFIGURATIONS, get_configuration
from helpers.yolact.network import Yolact
from helpers.yolact.priors import level_sizes
from yolact.datasets import AugmentedScenes, SceneSet, open_scenes
from yolact.evaluation import BATCH, normalize, segment, to_coco_results
from yolact.finetuning import load_initial_weights
from yolact.losses import compute_losses
from yolact.scenes import join_coco, to_coco

DECAY = 0.4  # the share of all steps in which the learning rate falls
EMA_DECAY = 0.998  # of the weights' moving average, which is the result
MAX_GRAD_NORM = 10.0  # a longer gradient is shortened to it
PICTURES = 12  # validation scenes that TensorBoard shows
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHARTS = {
    "losses": [f"train/{name}loss" for name in ("", "class_", "box_", "mask_", "semantic_")],
    "average precision": ["val/AP", "val/AP50", "val/AP75"],
    "throughput": ["train/scenes_per_second", r"throughput/rank_\d+"],
}
# Arguments that say how and where a training runs, and do not decide its result.
HOW = {"data", "run_dir", "device", "threads", "num_workers", "resume", "checkpoints", "checkpoint_steps"}
HOW |= {"endpoint", "credential", "mlflow"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; the last of repeated arguments counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--architecture", choices=CONFIGURATIONS, default="yolact_scenes")
    add("--epochs", type=positive, default=20)
    add("--batch-size", type=positive, default=32, help="scenes per step, of all ranks together")
    add("--learning-rate", type=float, default=2e-3, help="the highest of the schedule")
    add("--warm-up-steps", type=positive, default=200, help="in which the learning rate rises")
    add("--weight-decay", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add("--precision", choices=DTYPES, help="by default the fastest that the device computes in")
    add("--training-set", help="images with COCO's annotations, or shards; by default scenes that are made")
    add("--validation-set", help="likewise, with the same classes")
    add("--train-scenes", type=positive, help="per epoch; by default all of stored ones, 6000 of made ones")
    add("--validation-scenes", type=positive, help="by default all of stored ones, 200 of made ones")
    add("--initial-weights", metavar="URI", help="a checkpoint to start from; by default random weights")
    add("--data", default="out/data", help="where Fashion-MNIST is, or will be put, for scenes that are made")
    add("--run-dir", required=True, help="where the network, the events and the checkpoints go")
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


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train and validate, alone or as one of several ranks.

    Args:
        options: what `parse` returns.

    Returns:
        What `result.json` holds: validation AP (0 to 1) of masks at the network's size, the means of each epoch,
        scenes per second, CPU seconds of all ranks together, the classes' labels, settings.

    Raises:
        HostError: a GPU is asked for and there is none.
        TrainingError: the batch does not divide over the ranks, there is less than one batch, or another
            training or an unfinished one with other settings is there.
        DataError: there is no data set, it is damaged, or validation has other classes than training.
        BundleError: the initial weights are missing, damaged or of another architecture.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    with join_group(options.device, options.threads, options.run_dir) as group, ExitStack() as stack:
        cv2.setNumThreads(options.threads)
        storage = argparse.Namespace(storage=StorageOptions(options.endpoint, options.credential))
        training_set, validation_set, labels = open_sets(options, storage)
        steps_per_epoch = count_steps(training_set, options.batch_size, group)

        torch.manual_seed(options.seed)
        network = build(options.architecture, labels)
        initialize(network)
        network.to(group.device).to(memory_format=torch.channels_last)
        # An evaluation and a checkpoint average batch norm's statistics, so they need no broadcast at every step.
        model = DistributedDataParallel(network, forward_sync_buffers=False) if group.world_size > 1 else network
        average = AveragedModel(network, multi_avg_fn=average_weights, use_buffers=True)
        averaged: Any = average.module.eval()

        optimizer = torch.optim.AdamW(decay_matrices(network, options.weight_decay), lr=options.learning_rate)
        # The rate rises in a few steps, stays level, and falls to nothing. Until it falls, the number of steps has no
        # effect.
        total, warm_up = options.epochs * steps_per_epoch, options.warm_up_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm_up, 1.0, (total - step) / (DECAY * total))
        )
        dtype = DTYPES[options.precision] if options.precision else fastest_dtype(group.device)
        scaler = torch.amp.GradScaler(group.device.type, enabled=dtype == torch.float16)

        settings = {name: value for name, value in vars(options).items() if name not in HOW}
        parts: dict[str, Any] = {
            "network": network,
            "average": average,
            "optimizer": optimizer,
            "schedule": schedule,
            "scaler": scaler,
        }
        place = options.checkpoints or f"{options.run_dir}/checkpoints"
        checkpoints = Checkpoints(place, group, parts, settings, options.resume, storage)
        progress = checkpoints.restore()
        if options.initial_weights and not progress.resumed_at:
            load_initial_weights(network, options.initial_weights, group, storage)
            averaged.load_state_dict(network.state_dict())
        board = (
            stack.enter_context(open_writers(options.run_dir, options.mlflow, settings, progress.steps, CHARTS))
            if group.rank == 0
            else None
        )
        pace, cells = Pace(network, group, options.batch_size), prototype_side(options.architecture)

        def save() -> None:
            if board:
                board.publish()  # or events of steps before the checkpoint would be missing after a crash
            checkpoints.save(progress)

        def summarize() -> dict[str, Any]:
            last = progress.epochs[-1]
            return {name: value for name, value in last.items() if name.startswith("val_")} | {
                "scenes_per_second": float(np.median([epoch["scenes_per_second"] for epoch in progress.epochs])),
                "seconds": time.perf_counter() - started,
                "cpu_seconds": sum(group.gather(time.process_time() - cpu_started)),
                "processes": group.world_size,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "precision": next(name for name, known in DTYPES.items() if known == dtype),
                "resumed_at": progress.resumed_at,
                "epochs": progress.epochs,
                "labels": list(labels),
                "settings": vars(options) | {"mlflow": redact(options.mlflow)},
            }

        while progress.epoch < options.epochs:
            network.train()
            pace.start()
            scenes = AugmentedScenes(training_set, cells, options.seed, progress.epoch)
            shares = training_set.shares(group, options.batch_size, options.seed, progress.epoch, progress.batches)
            for images, targets in read_batches(scenes, shares, group, options.num_workers):
                targets = [target.to(group.device) for target in targets]
                with torch.autocast(group.device.type, dtype, enabled=dtype != torch.float32):
                    outputs = model(normalize(network, images.to(group.device)))
                terms = compute_losses(outputs, targets)
                loss = torch.stack(list(terms.values())).sum()
                learning_rate = float(schedule.get_last_lr()[0])
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                pace.end_backward()
                scaler.unscale_(optimizer)
                gradient_norm = nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)  # before it is shortened
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                average.update_parameters(network)

                losses = {"loss": loss.item()} | {f"{name}_loss": term.item() for name, term in terms.items()}
                progress.add_step(losses)
                measures = losses | {
                    "learning_rate": learning_rate,
                    "gradient_norm": gradient_norm.item(),
                    "scenes_per_second": pace.end_step(),
                }
                if board:
                    board.log_scalars({f"train/{name}": value for name, value in measures.items()}, progress.steps)
                if options.checkpoint_steps and progress.steps % options.checkpoint_steps == 0:
                    save()
                    pace.start()

            rate, ranks = pace.images_per_second, pace.of_ranks()
            precision, predictions = evaluate(averaged, validation_set, labels, group)
            progress.add_epoch({"scenes_per_second": rate} | precision)
            result = summarize()
            if board:
                tags = {name.replace("_", "/", 1): value for name, value in precision.items()}  # val/AP
                board.log_scalars(ranks | tags, progress.steps)
                shown = validation_set.__getitems__(torch.arange(min(PICTURES, len(validation_set))))
                pictures = plot_instances([scene.image for scene in shown], predictions[: len(shown)])
                board.log_figure("predictions/validation", pictures, progress.steps)
                save_network(averaged, result, options.run_dir)
                print(
                    f"epoch {progress.epoch}/{options.epochs}: training loss {progress.epochs[-1]['train_loss']:.3f}, "
                    f"validation mask AP {precision['val_AP']:.3f}, AP50 {precision['val_AP50']:.3f}, "
                    f"{rate:,.0f} scenes/s",
                    flush=True,
                )
            save()

        result = summarize()
        if board:
            board.publish()
            save_network(averaged, result, options.run_dir)
        checkpoints.clear()
        return result


def open_sets(options: argparse.Namespace, storage: Any) -> tuple[SceneSet, SceneSet, tuple[str, ...]]:
    """The scenes to train on, those to validate on, and the names of the classes.

    Raises:
        DataError: there is no data set, or validation has other classes than training.
    """
    if options.training_set is None or options.validation_set is None:
        fashion_data.download(options.data)
    places = {"train": (options.training_set, options.train_scenes)}
    places["val"] = (options.validation_set, options.validation_scenes)
    size = get_configuration(options.architecture).size
    (training_set, labels), (validation_set, others) = (
        open_scenes(place, options.data, split, size, count, options.seed, storage)
        for split, (place, count) in places.items()
    )
    if labels != others:
        raise DataError(
            f"training has the classes {', '.join(labels)} and validation {', '.join(others)}: name a training set and "
            "a validation set with the same categories"
        )
    return training_set, validation_set, labels


def prototype_side(architecture: str) -> int:
    """Side of the prototypes, at which masks are compared: twice that of P3."""
    return 2 * level_sizes(get_configuration(architecture).size)[0]


def initialize(network: Yolact) -> None:
    """Give convolutions random weights."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if name.startswith("backbone"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def decay_matrices(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and batch norm's parameters, which are vectors, do not."""
    matrices = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.ndim == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def average_weights(average: Any, current: Any, updates: Any) -> None:
    """Update the moving average of the weights, in place."""
    # At the start it is the plain mean of the few there are; else the first, random weights would stay in it for long.
    decay = min(EMA_DECAY, (1 + int(updates)) / (10 + int(updates)))
    get_ema_multi_avg_fn(decay)(average, current, updates)


def evaluate(
    network: Yolact, scenes: SceneSet, labels: tuple[str, ...], group: Group
) -> tuple[dict[str, float], list[list[dict[str, Any]]]]:
    """Mask AP on scenes, as `val_NAME`, and the detections in each; every rank segments a part of them."""
    group.average(network.buffers())
    share = torch.arange(len(scenes)).tensor_split(group.world_size)[group.rank]
    batches = [numbers for numbers in share.split(BATCH) if len(numbers)]
    own = []
    for numbers, batch in zip(batches, read_batches(scenes, batches, group), strict=True):
        instances = segment(network, [scene.image for scene in batch])
        own.append((instances, to_coco(batch, int(numbers[0]), labels)))
    seen = [batch for part in group.gather(own) for batch in part]
    predictions = [of_image for instances, _ in seen for of_image in instances]
    truth, results = join_coco([truth for _, truth in seen]), to_coco_results(dict(enumerate(predictions)))
    return {f"val_{name}": value for name, value in average_precision(truth, results).items()}, predictions


if __name__ == "__main__":
    outcome = train(parse())
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(outcome))
