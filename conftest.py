"""Hooks for every test, notebooks included."""

from pathlib import Path

import pytest

ALONE = ("02", "08", "09")  # notebooks that need nothing of the ones before them
# The groups of more than a minute, the longest first: a long one that starts last would leave a process without work.
# Notebooks stand before all of them.
SLOW = (
    "test_adls_pipeline.py",
    "test_faults.py",
    "test_pack.py",
    "test_yolact_pipeline.py",
    "test_training_faults.py",
    "test_yolact_training.py",
    "test_training.py",
    "test_yolact_datasets.py",
    "test_places.py",
    "test_synchrony.py",
    "test_recipe.py",
    "test_connect.py",
    "test_pipeline.py",
)


def pytest_collectstart(collector):
    """Leave stderr out of nbval's comparison: Spark and Java write warnings there that differ between hosts."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    """Keep what shares its fixtures in one process: the tests of a file, and the notebooks that need one another."""
    items.sort(key=_turn)  # a stable sort: tests of one file keep their order
    for item in items:
        if item.get_closest_marker("xdist_group") is None:  # a test may name another group than its file's
            item.add_marker(pytest.mark.xdist_group(_group(item.path)))


def _group(path: Path) -> str:
    if path.suffix == ".ipynb":
        return path.name if path.name.startswith(ALONE) else "notebooks"
    return path.name


def _turn(item) -> int:
    if item.path.suffix == ".ipynb":
        return -1
    return SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW)
