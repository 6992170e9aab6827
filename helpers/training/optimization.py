"""Gradient descent by all processes of a run: exchange of gradients, precision, schedule, and what to watch of them."""

import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.training.workers import RunSettings, Worker, choose_precision, make_schedule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Optimization:
    """One step after another, on this worker's share of each batch.

    Matrix products are computed in `choose_precision(settings)`, the rest and the weights in single precision; in half
    precision the loss is scaled, so that small gradients do not vanish. (The GPU path was never run by its authors, who
    have none: it follows PyTorch's documentation of DistributedDataParallel, autocast and GradScaler.)

    Attributes:
        model: what to call in training; gives the network's outputs and lets all processes exchange gradients.
        parts: what a checkpoint must hold besides the network.
        waited: seconds of the last step that this process waited for the gradients of the others. On a GPU, whose
            work is only queued here, this is an upper bound.
    """

    def __init__(
        self,
        settings: RunSettings,
        worker: Worker,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        largest_gradient: float = math.inf,
    ):
        """Prepare.

        Args:
            settings: of the run.
            worker: this process.
            network: what to train, on the worker's device.
            optimizer: of its parameters.
            total_steps: of the whole run, for the schedule.
            largest_gradient: norm over all parameters; a longer gradient is shortened to it.
        """
        self.network, self.optimizer, self.largest_gradient = network, optimizer, largest_gradient
        self.device, self.precision = worker.device, choose_precision(settings)
        # Batch norm's statistics differ between processes until they are averaged for an evaluation or a checkpoint,
        # so they need no broadcast at every step.
        several = worker.processes > 1
        self.model = DistributedDataParallel(network, forward_sync_buffers=False) if several else network
        self.schedule = make_schedule(settings, optimizer, total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parts: dict[str, Any] = {"optimizer": optimizer, "schedule": self.schedule, "scaler": self.scaler}
        self.waited, self._own_done = 0.0, 0.0
        # Its gradient is the last of a backward pass: what comes after is waiting for the other processes.
        next(network.parameters()).register_post_accumulate_grad_hook(self._note_own_gradients)

    def forward(self, images: torch.Tensor) -> Any:
        """Outputs of the network in training mode, in the run's precision."""
        self.model.train()
        with torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"):
            return self.model(images)

    def descend(self, loss: torch.Tensor) -> dict[str, float]:
        """Take one step down the gradient; returns the learning rate and the gradient's norm before any shortening."""
        learning_rate = self.schedule.get_last_lr()[0]
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.waited = time.perf_counter() - self._own_done
        self.scaler.unscale_(self.optimizer)
        norm = self._limit()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return {"learning_rate": learning_rate, "gradient_norm": norm.item()}

    def _limit(self) -> torch.Tensor:
        parameters = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        if self.largest_gradient < math.inf:
            return nn.utils.clip_grad_norm_(parameters, self.largest_gradient)
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def _note_own_gradients(self, parameter: torch.Tensor) -> None:
        self._own_done = time.perf_counter()
