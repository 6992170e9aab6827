"""What is hard about training and the same for every program: ranks, crashes, shared data, and launching on Spark.

    group        the ranks, their devices, and what they tell each other       torch
    checkpoints  what survives a crash                                         torch
    datasets     who reads what, from arrays, folders and shards               torch
    shards       many small files made few large ones, in Spark tasks
    launch       an ordinary program as the ranks of Spark tasks

A program imports from here: `from helpers.training import Checkpoints, join_group`. Importing this imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a checker of types sees
    from helpers.training.checkpoints import Checkpoints, Progress, newest_step  # noqa: F401
    from helpers.training.datasets import *  # noqa: F403
    from helpers.training.group import Group, Pace, fastest_dtype, join_group, save_network  # noqa: F401
    from helpers.training.launch import ship_siblings, train_on_spark  # noqa: F401
    from helpers.training.shards import write_shards  # noqa: F401

_FACE = {
    "checkpoints": "Checkpoints Progress newest_step",
    "datasets": "Batch DataSet Folder Form MappedImages Shards count_steps is_sharded load_image read_batches "
    "share_batches",
    "group": "Group Pace fastest_dtype join_group save_network",
    "launch": "ship_siblings train_on_spark",
    "shards": "write_shards",
}


def __getattr__(name: str) -> Any:
    for module, names in _FACE.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
