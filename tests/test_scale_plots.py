"""Every figure has units on its axes and one message, which is what its numbers say."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers.pipeline.task import STAGES
from helpers.planning.planner import Cluster, curve, plot_curve
from studies import scale_figures as plots
from studies.figures import plot_stage_seconds
from studies.simulation import simulate

TITLES = {"even": "two equal", "slow": "one slowed"}


def tasks_of(output: str, seconds: list[float], speeds: list[float]) -> pd.DataFrame:
    schedule = simulate(seconds, speeds)
    table = pd.DataFrame({"begin": schedule.start, "end": schedule.end, "process": schedule.slot})
    table = table.assign(output=output, host="h", executor=table["process"], images=10)
    table["seconds"] = table["end"] - table["begin"]
    shares = {"load": 0.0, "read": 0.05, "preprocess": 0.3, "infer": 0.6, "postprocess": 0.02, "write": 0.03}
    return table.assign(**{f"{stage}_seconds": shares[stage] * table["seconds"] for stage in STAGES})


@pytest.fixture(scope="module")
def tasks() -> pd.DataFrame:
    return pd.concat([tasks_of("even", [0.5] * 8, [1, 1]), tasks_of("slow", [0.5] * 8, [1, 0.25])])


@pytest.fixture(scope="module")
def figures(tasks) -> dict[str, Figure]:
    kinds = ["cores of one process"] * 2 + ["workers of a cluster"] * 2
    scaling = pd.DataFrame({"kind": kinds, "slots": [1, 2, 1, 2], "milliseconds": [10.0, 5.5, 11.0, 6.0]})
    sizes = pd.DataFrame({"workers": [1, 1, 2, 2], "megapixels": [0.1, 1.6, 0.1, 1.6], "milliseconds": [6, 18, 3.5, 9]})
    swept = pd.DataFrame({"partitions": [1, 2, 3, 4, 16, 64], "images": 240})
    swept["images_per_second"] = [90.0, 170, 130, 180, 175, 120]
    compared = pd.DataFrame({"measured": [1.0, 2, 3], "predicted": [1.0, 2.2, 2.7], "fitted": [True, False, False]})
    from test_planner import MODEL

    cluster = Cluster(16, 4, price=0.4)
    return {
        "scaling": plots.plot_scaling(scaling),
        "workers": plots.plot_workers(tasks, TITLES),
        "sizes": plots.plot_sizes(sizes),
        "partitions": plots.plot_partitions(swept, swept.assign(images_per_second=150.0)),
        "timeline": plots.plot_timeline(tasks, TITLES),
        "stages": plots.plot_stages(tasks, TITLES),
        "predictions": plots.plot_predictions(compared),
        "curve": plot_curve(curve(MODEL, 1_000_000, cluster), 16, 0.4),
    }


def title(figure: Figure) -> str:
    above = figure.get_suptitle()
    return above or figure.axes[0].get_title()


def test_every_figure_has_units_and_a_message(figures):
    assert len(figures) == 8
    units = ("ms", "images/s", "megapixels", "seconds", ", s", "cores", "executors", "partitions", "time, ", "cost")
    for name, figure in figures.items():
        assert len(title(figure)) > 15, name
        labels = [axis.get_xlabel() for axis in figure.axes] + [axis.get_ylabel() for axis in figure.axes]
        labels = [label for label in labels if label]
        assert labels and all(any(unit in label for unit in units) for label in labels), (name, labels)


@pytest.mark.parametrize(
    "name, message",
    [
        ("scaling", "1.82 to 1.83 times as fast"),
        ("workers", "4.0 times as long"),
        ("sizes", "16 times as many pixels takes 3.0 times"),
        ("partitions", "4 partitions are fastest; the wrong number costs up to 50%"),
        ("timeline", "took 2.0 times as long"),  # by hand: 2 s, and 2 tasks of 2 s on the slow one
        ("stages", "60% of the tasks' time is the stage 'infer'"),
        ("predictions", "2 predictions, off by 10% (median) and 10% (worst)"),
        ("curve", "16 executors take 192.0 s for 0.34, at an efficiency of 83%"),
    ],
)
def test_the_message_is_what_the_numbers_say(figures, name, message):
    assert message in title(figures[name])


def test_a_timeline_has_a_bar_for_each_task(figures, tasks):
    bars = [[bar for bar in axis.patches if bar.get_width() > 0] for axis in figures["timeline"].axes]
    assert [len(panel) for panel in bars] == [8, 8]
    widths = sorted(bar.get_width() for bar in bars[1])
    np.testing.assert_allclose(widths, sorted(tasks[tasks["output"] == "slow"]["seconds"]))


def test_a_compact_figure_is_smaller_and_looks_the_same(figures):
    picture = plots.compact(figures["scaling"])
    buffer, whole = io.BytesIO(), io.BytesIO()
    picture.save(buffer, "png")
    figures["scaling"].savefig(whole, dpi=100)
    assert len(buffer.getvalue()) < 0.5 * len(whole.getvalue())
    difference = np.asarray(picture.convert("RGB"), int) - np.asarray(Image.open(whole).convert("RGB"), int)
    assert np.abs(difference).mean() < 1


def test_where_the_time_goes_is_told_of_the_stages_alone():
    """A record also has the processor's seconds, which are those of the stages once more."""
    seconds = {f"{stage}_seconds": float(place + 1) for place, stage in enumerate(STAGES)}
    record = {**seconds, "cpu_seconds": 50.0, "thread_seconds": 40.0, "seconds": 21.0}
    (axis,) = plot_stage_seconds(pd.DataFrame([record, record])).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(STAGES)
    assert sum(bar.get_width() for bar in axis.patches) == 2 * record["seconds"]
