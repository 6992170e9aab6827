"""Hooks for every test, notebooks included."""

import pytest


def pytest_collectstart(collector):
    """Leave stderr out of nbval's comparison: Spark and Java write warnings there that differ between hosts."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_collection_modifyitems(items):
    """Keep what shares its fixtures in one process: the tests of a file, and the notebooks, which need one another."""
    for item in items:
        group = "notebooks" if item.path.suffix == ".ipynb" else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
