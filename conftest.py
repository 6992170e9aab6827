"""Hooks for every test, notebooks included."""


def pytest_collectstart(collector):
    """Leave stderr out of nbval's comparison: Spark and Java write warnings there that differ between hosts."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
