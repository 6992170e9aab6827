"""A recipe for Fashion-MNIST that a CPU affords in minutes, and the objective to search for a better one.

What it reaches is measured by `tests/bench/recipe.py`. Network, optimiser, augmentation and schedule were compared on
10,000 held-out training images; the test images had no say in it.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from helpers.training.classifier import TrainingSettings, train

if TYPE_CHECKING:
    from optuna import Trial

RECIPE = TrainingSettings(
    architecture="fashion_resnet",
    epochs=10,
    batch_size=256,
    optimizer="muon",
    learning_rate=0.1,
    weight_decay=0.02,
    label_smoothing=0.1,
    mirror=True,
    shift=1,
    evaluate_every=10,
)


def make_objective(settings: TrainingSettings, data_root: str) -> Callable[["Trial"], float]:
    """An objective for `search`, whose parameters are names of settings: the accuracy on held-out images."""

    def objective(trial: "Trial") -> float:
        from optuna import TrialPruned

        def report(epoch: int, accuracy: float) -> None:
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise TrialPruned

        return train(dataclasses.replace(settings, **trial.params), data_root, None, report)["val_accuracy"]

    return objective
