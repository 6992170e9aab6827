"""Hooks for every test, notebooks included."""

import gc
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ALONE = ("00", "02", "08", "09")  # notebooks that need nothing of the ones before them
# Files that share more than their own fixtures.
SHARED = {"test_arrivals.py": "delta", "test_table_output.py": "delta"}
SHARED |= dict.fromkeys(
    ("test_training.py", "test_recipe.py", "test_synchrony.py", "test_yolact_training.py"), "two ranks"
)
SHARED |= {"test_connect.py": "notebooks"}  # it takes the bundle of notebook 03, and trains one where there is none
# The groups of more than a minute, the longest first: a long one that starts last would leave a process without work.
# Notebooks stand before all of them.
SLOW = (
    "test_adls_pipeline.py",
    "test_faults.py",
    "test_pack.py",
    "test_yarn.py",
    "test_yolact_pipeline.py",
    "test_table_output.py",
    "test_training_faults.py",
    "test_sources.py",
    "test_yolact_training.py",
    "test_training.py",
    "test_yolact_datasets.py",
    "test_objects.py",
    "test_places.py",
    "test_synchrony.py",
    "test_first_look.py",
    "test_recipe.py",
    "test_connect.py",
    "test_pipeline.py",
)
# What the cell `parameters` of a notebook says in a test, where a reader needs more than a check does. papermill would
# set values in the same place.
SIZES: dict[str, dict[str, Any]] = {
    # 0.906 of the test images, where this notebook and 07 assert 0.90; with 128 images a step it is 0.903.
    "01_train_fashion_mnist": {"EPOCHS": 2, "BATCH_SIZE": 96},
    "02_train_yolact": {"TRAIN_SCENES": 256},
    "03_optimize_models": {"TEST_SCENES": 30},
    # The images of one folder, of which about as many are named rightly as of all.
    "07_postprocess": {"PART": "images/07", "IMAGES": 1000, "SCENES": 60},
    "08_scale": {"IMAGES": 40, "DIFFERENT": 4, "SIDES": {"small": 160, "medium": 320, "large": 640}},
    "09_tune_training": {"RECIPE_IMAGES": 512, "HELD_OUT": 300, "TRIALS": 4, "SYNCHRONY_IMAGES": 1500},
    "10_compare_formats": {
        "LARGE": "yolact_scenes",  # `test_yolact_pipeline` has the published one
        "TEST_SCENES": 30,
        "FRAMES": 8,
        "LARGE_FRAMES": 1,
        "ROUNDS": 1,
        "TORCH_COMPILE": False,  # half a minute of C++; `test_formats` has it without
    },
}
# Where notebooks leave what they make in a test, which is smaller and worse than what they make for a reader.
TESTED = {f"HELPERS_PATHS__{name.upper()}": f"out/tested/{name}" for name in ("models", "results", "runs")}


def pytest_collectstart(collector):
    """Leave stderr out of nbval's comparison: Spark and Java write warnings there that differ between hosts."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_collection_finish():
    """Let the collector of garbage leave alone what was imported, and look less often at what tests make."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Let the long groups start first, and set the places and sizes of notebooks."""
    items.sort(key=_turn)  # a stable sort: tests of one file keep their order
    for item in items:
        if item.path.suffix == ".ipynb" and "parameters" in item.cell.metadata.get("tags", ()):
            places = "".join(f"os.environ.setdefault({name!r}, {place!r})\n" for name, place in TESTED.items())
            sizes = "".join(f"\n{name} = {value!r}" for name, value in SIZES.get(item.path.stem, {}).items())
            item.cell.source = f"import os\n{places}{item.cell.source}{sizes}"


class Groups(LoadScopeScheduling):
    """Keep what shares its fixtures in one process: tests of a file, or of some, and notebooks that need one another.

    xdist's own `loadgroup` writes the group into an attribute that pytest no longer reads, and so groups nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0].rpartition("/")[2]
        chained = nodeid.startswith("notebooks/") and not name.startswith(ALONE)
        return "notebooks" if chained else SHARED.get(name, name)


def pytest_xdist_make_scheduler(config, log):
    """Let tests be dealt out by these groups."""
    return Groups(config, log)


def _turn(item) -> int:
    if item.path.suffix == ".ipynb":
        return -1
    return SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW)
