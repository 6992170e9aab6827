"""Muon, an optimizer for trainings of few steps: it learns more from a step than momentum does.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). PyTorch's own Muon takes only matrices.
So a network with convolutions and biases would need two optimizers, two schedules and a copy of its weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

HIDDEN_RATE = 0.3  # of the learning rate, for hidden convolutions, whose steps have singular values of about 1
HIDDEN_MOMENTUM, MOMENTUM = 0.6, 0.85  # orthogonal steps need less of it
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration, for a, b and c


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum; a hidden convolution moves by the orthogonal matrix that is nearest to it.

    Its weight counts as a matrix with one row per output channel. The weights of the first convolution and of linear
    layers, and all vectors, move by the momentum itself, and do not decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float):
        """Sort the parameters of a network."""
        hidden: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in parameters:
            (hidden if parameter.ndim == 4 and parameter.shape[1] > 1 else others).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": hidden, "hidden": True, "beta": HIDDEN_MOMENTUM, "weight_decay": weight_decay},
            {"params": others, "hidden": False, "beta": MOMENTUM, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, rate = self.state[parameter], group["lr"]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["beta"]).add_(parameter.grad)
                change = parameter.grad + group["beta"] * momentum
                if group["hidden"]:
                    rate *= HIDDEN_RATE
                    change = orthogonalize(change.flatten(1)).view(change.shape)
                parameter.mul_(1 - rate * group["weight_decay"]).add_(change, alpha=-rate)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to one, float32 `[rows, columns]`, roughly: singular values of 0.5 to 1.5.

    Those of a matrix with more rows than columns are larger by the root of that ratio.
    """
    rows, columns = matrix.shape
    wide = (matrix if rows <= columns else matrix.T).bfloat16()
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return (wide if rows <= columns else wide.T).float() * max(1, rows / columns) ** 0.5
