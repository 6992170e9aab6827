import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.errors import DataError
from helpers.planning.cost_model import CostModel, fit
from helpers.planning.planner import (
    PARTS,
    Cluster,
    best_partitions,
    curve,
    equal_makespan,
    expected_makespan,
    predict,
)
from studies.simulation import Speculation, draw_failures, play, simulate

MODEL = CostModel(
    session_seconds=4.0,
    open_seconds=0.3,
    image_list_seconds=2e-5,
    start_seconds=1.0,
    worker_seconds=1.5,
    task_seconds=0.1,
    image_seconds=0.006,
    byte_seconds=4e-8,
    image_bytes=100_000,
    finish_seconds=0.05,
    log_seconds=0.2,
    task_publish_seconds=0.001,
    variation=0.1,
)
SPEEDS = st.lists(st.sampled_from([1.0, 0.5, 0.25, 2.0, 3.0]), min_size=1, max_size=9)


def records_of(model: CostModel, images: int, cluster: Cluster, partitions: int, seed: int, run: str = "a"):
    """The records that a run which went exactly as the model says would have left."""
    schedule = play(model, images, cluster, partitions, seed=seed)
    each = images / partitions
    rows, last = [], {}
    for slot, start, end in zip(schedule.slot, schedule.start, schedule.end, strict=True):
        # The model has a worker's start before its first task and the fixed part in each; records have both in it.
        begin = model.start_seconds + (0 if slot not in last else start)
        seconds = model.start_seconds + end - begin - model.task_seconds / 2
        scale = (end - start) / (model.task_seconds + model.mean_image_seconds * each)
        last[slot] = end
        rows.append(
            {
                "run": run,
                "host": "host",
                "process": int(slot),
                "slots": cluster.slots,
                "images": each,
                "bytes": each * model.image_bytes,
                "begin": begin,
                "end": begin + seconds,
                "seconds": seconds,
                "load_seconds": 0.0 if start else model.worker_seconds,
                "read_seconds": 0.0,
                "preprocess_seconds": scale * model.byte_seconds * model.image_bytes * each,
                "infer_seconds": scale * model.image_seconds * each,
                "postprocess_seconds": 0.0,
                "write_seconds": model.task_seconds / 2,
            }
        )
        row = rows[-1]
        own = row["load_seconds"] + row["preprocess_seconds"] + row["write_seconds"]
        row |= {"thread_seconds": own, "cpu_seconds": own + row["infer_seconds"]}
    about = {"run": run, "model": "m", "images": images, "session_seconds": model.session_seconds}
    about |= {"open_seconds": model.open_seconds, "list_seconds": images * model.image_list_seconds}
    about |= {"log_seconds": model.log_seconds, "publish_seconds": partitions * model.task_publish_seconds}
    about["pass_seconds"] = max(row["end"] for row in rows) + model.finish_seconds
    return pd.DataFrame([about]), pd.DataFrame(rows)


@given(st.integers(0, 300), st.floats(0.01, 50), SPEEDS, st.data())
def test_the_end_of_equal_tasks_is_the_simulations(tasks, seconds, speeds, data):
    # Times in whole quarters, so that what is a tie by hand is one in floating point too.
    seconds = max(0.25, round(seconds * 4) / 4)
    ready = data.draw(st.lists(st.integers(0, 9), min_size=len(speeds), max_size=len(speeds)))
    speeds = [2.0 if speed == 3.0 else speed for speed in speeds]
    expected = simulate([seconds] * tasks, speeds, ready=ready).makespan
    assert equal_makespan(tasks, seconds, speeds, ready) == pytest.approx(expected)


@given(st.integers(1, 300), SPEEDS)
def test_the_end_of_equal_tasks_is_within_a_rounding_of_the_simulations(tasks, speeds):
    """Where thirds make ties that rounding decides, another slot may have the last task."""
    expected = simulate([1.0] * tasks, speeds).makespan
    assert abs(equal_makespan(tasks, 1.0, speeds) - expected) <= 1 / min(speeds)


def test_the_end_of_equal_tasks_by_hand():
    assert equal_makespan(0, 5, [1, 1]) == 0
    assert equal_makespan(7, 2, [1, 1, 1]) == 6
    assert equal_makespan(6, 2, [1, 1, 1], 10) == 14
    # Slot 0 begins tasks at 0, 1, 2, 3, 4, ..., slot 1 at 0, 4, ...; at 4 the first slot is asked first.
    assert equal_makespan(4, 1, [1, 0.25]) == 4
    assert equal_makespan(6, 1, [1, 0.25]) == 5
    assert equal_makespan(7, 1, [1, 0.25]) == 8


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.floats(0.3, 12),
    st.sampled_from([0.02, 0.1, 0.3]),
    st.sampled_from([0.0, 0.02, 0.1]),
    st.booleans(),
)
def test_the_expected_end_is_about_the_mean_of_simulations(slots, waves, variation, failure_rate, mixed):
    speeds = np.where(np.arange(slots) % 3 == 1, 0.5, 1.0) if mixed else np.ones(slots)
    tasks, ends = max(1, round(waves * slots)), []
    spread = math.sqrt(math.log1p(variation**2))
    for seed in range(25):
        rng = np.random.default_rng(seed)
        seconds = rng.lognormal(-(spread**2) / 2, spread, tasks)
        ends.append(simulate(seconds, speeds, failures=draw_failures(failure_rate, tasks, rng)).makespan)
    found = expected_makespan(tasks, 1.0, speeds, 0.0, variation, failure_rate)
    # Half of a task's mean time is what the expectation may be off: little of a run of many waves.
    assert abs(found - np.mean(ends)) <= 0.1 * np.mean(ends) + 0.5 / speeds.min()


def test_a_prediction_adds_up():
    found = predict(MODEL, 100_000, Cluster(4, 2, price=0.5), 160)
    assert found.seconds == pytest.approx(sum(getattr(found, part) for part in PARTS))
    assert found.work == pytest.approx(100_000 * 0.01 / 8)
    assert found.overhead == pytest.approx((160 * 0.1 + 8 * 1.5) / 8)
    assert found.cost == pytest.approx(0.5 * 4 * found.seconds / 3600)
    assert found.session + found.listing + found.start == pytest.approx(4.0 + 0.3 + 2.0 + 1.0)


@pytest.mark.parametrize("cluster", [Cluster(3, 2), Cluster(5, 1, speeds=(1.0, 0.4))])
@pytest.mark.parametrize("partitions", [12, 37, 200])
def test_a_prediction_is_the_mean_of_simulated_runs(cluster, partitions):
    ends = [play(MODEL, 20_000, cluster, partitions, seed=seed).makespan for seed in range(30)]
    found = predict(MODEL, 20_000, cluster, partitions)
    assert found.pass_seconds - found.start - MODEL.finish_seconds == pytest.approx(np.mean(ends), rel=0.06)


def test_the_model_is_found_again_in_the_records_of_its_runs():
    found = fit(*records_of(MODEL, 8000, Cluster(1, 4), 80, seed=0))
    for name, value in dataclasses.asdict(MODEL).items():
        if name in ("variation", "contention", "concurrency", "alone"):
            continue
        assert getattr(found, name) == pytest.approx(value, rel=0.1), name
    assert 0.05 < found.variation < 0.15
    assert found.concurrency == 4 and found.contention == 0
    assert found.alone == pytest.approx(0.006 / (0.006 + 4e-8 * 100_000), rel=0.01)  # while it decodes, it infers


def test_a_model_fitted_on_a_short_run_predicts_a_long_one_elsewhere():
    fitted = fit(*records_of(MODEL, 1000, Cluster(1, 2), 10, seed=1))
    for images, cluster, partitions in [(50_000, Cluster(8, 4), 256), (3000, Cluster(1, 1), 7)]:
        truth = predict(MODEL, images, cluster, partitions).seconds
        assert predict(fitted, images, cluster, partitions).seconds == pytest.approx(truth, rel=0.08)


def test_tasks_that_slow_each_other_down_are_seen_in_runs_of_different_numbers_of_them():
    """Four at once on a machine take 1.3 times as long as one: 0.1 for each other one."""
    slower = dataclasses.replace(MODEL, image_seconds=MODEL.image_seconds * 1.3, byte_seconds=MODEL.byte_seconds * 1.3)
    alone = records_of(MODEL, 1000, Cluster(1, 1), 20, seed=0, run="a")
    beside = records_of(slower, 4000, Cluster(1, 4), 80, seed=0, run="b")
    found = fit(*(pd.concat(frames, ignore_index=True) for frames in zip(alone, beside, strict=True)))
    assert found.contention == pytest.approx(0.1, abs=0.02)
    assert Cluster(1, 4).slot_speeds(found)[0] / Cluster(1, 1).slot_speeds(found)[0] == pytest.approx(1 / 1.3, abs=0.03)
    shared = Cluster(4, 1, executors_per_machine=4).slot_speeds(found)
    assert shared.tolist() == Cluster(1, 4).slot_speeds(found).tolist()


def test_the_model_is_the_same_whether_tasks_had_idle_cores_beside_them_or_not():
    """Beside idle cores decoding is hidden behind inference: the clock's seconds are fewer, the processor's are not."""
    runs, tasks = records_of(MODEL, 8000, Cluster(1, 4), 80, seed=0)
    hidden = tasks["preprocess_seconds"]
    overlapped = tasks.assign(
        seconds=tasks["seconds"] - hidden,
        end=tasks["end"] - hidden,
        infer_seconds=tasks["infer_seconds"] - hidden,
    )
    full, idle = fit(runs, tasks), fit(runs, overlapped)
    for name in ("image_seconds", "byte_seconds", "alone", "worker_seconds", "computing"):
        assert getattr(idle, name) == pytest.approx(getattr(full, name), rel=0.01), name
    assert (full.alone, full.computing) == pytest.approx((0.6, 1), rel=0.01)


def test_time_in_which_nothing_computes_is_seen_and_no_idle_core_saves_it():
    """Reading from a slow storage, 5 ms an image beside 4 of decoding and 6 of inference."""
    runs, tasks = records_of(MODEL, 8000, Cluster(1, 4), 80, seed=0)
    waited = 0.005 * tasks["images"]
    found = fit(runs, tasks.assign(read_seconds=waited, seconds=tasks["seconds"] + waited))
    assert found.computing == pytest.approx(10 / 15, rel=0.02)
    assert found.alone == pytest.approx((6 + 5) / 15, rel=0.02)
    assert found.byte_seconds * 100_000 == pytest.approx(0.004 + 0.005, rel=0.02)


def test_a_last_wave_that_leaves_cores_idle_is_shorter():
    quick = dataclasses.replace(MODEL, alone=0.6, variation=0.0)
    slots = Cluster(1, 2)

    def saved(partitions: int, cluster: Cluster = slots) -> float:
        plain = dataclasses.replace(quick, alone=1.0)
        return predict(plain, 1200, cluster, partitions).seconds - predict(quick, 1200, cluster, partitions).seconds

    assert saved(1) == pytest.approx(0.4 * 12) and saved(3) == pytest.approx(0.4 * 4)  # 12 s of images altogether
    assert saved(2) == saved(4) == 0  # both cores are busy
    assert saved(1, Cluster(2, 1)) == 0  # a machine of one core has none to spare
    assert saved(1, Cluster(2, 1, executors_per_machine=2)) == saved(1)
    assert saved(6, Cluster(1, 8)) == pytest.approx(0.25 * 2) and saved(6, Cluster(2, 4)) == pytest.approx(0.25 * 2)
    assert saved(3, Cluster(1, 8)) == pytest.approx(0.4 * 4)  # a task does not keep more than its two threads busy


def test_records_of_nothing_or_of_several_models_are_refused():
    runs, tasks = records_of(MODEL, 100, Cluster(1, 2), 4, seed=0)
    with pytest.raises(DataError, match="no task with an image"):
        fit(runs, tasks.assign(images=0))
    others = pd.concat([runs, runs.assign(run="b", model="n")])
    with pytest.raises(DataError, match="several models.*m, n"):
        fit(others, tasks)


@pytest.mark.parametrize("cluster", [Cluster(4, 2), Cluster(6, 1, speeds=(1.0, 1.0, 0.2))])
def test_the_recommended_partitions_are_about_the_best_of_all_in_simulations(cluster):
    def simulated(partitions: int) -> float:
        return float(np.mean([play(MODEL, 20_000, cluster, partitions, seed=seed).makespan for seed in range(10)]))

    found = best_partitions(MODEL, 20_000, cluster)
    others = [cluster.slots * waves for waves in (1, 2, 3, 5, 10, 20, 50, 100)]
    assert simulated(found) <= 1.03 * min(simulated(partitions) for partitions in others)


def test_partitions_are_never_more_than_images_and_more_where_machines_differ_or_tasks_fail():
    assert best_partitions(MODEL, 3, Cluster(8, 4)) <= 3
    assert predict(MODEL, 3, Cluster(8, 4), 100).partitions == 3
    steady = dataclasses.replace(MODEL, variation=0.0)
    even = best_partitions(steady, 50_000, Cluster(8, 1))
    assert even == 8  # equal tasks that never fail: the fewest
    assert best_partitions(steady, 50_000, Cluster(8, 1, speeds=(1, 0.5, 0.8))) >= 3 * even
    assert best_partitions(steady, 50_000, Cluster(8, 1), failure_rate=0.05) >= 3 * even


def test_more_executors_take_less_time_and_more_of_them_waste_more():
    table = curve(MODEL, 1_000_000, Cluster(64, 4, price=1.0))
    assert {1, 64, 128} <= set(table["executors"])
    assert (table["seconds"].diff().dropna() < 0).all()
    assert (table["cost"].diff().dropna() > 0).all()
    assert table["efficiency"].iloc[0] == 1 and table["efficiency"].is_monotonic_decreasing
    np.testing.assert_allclose(table[list(PARTS)].sum(axis=1), table["seconds"])


def test_a_billion_images_on_a_thousand_executors_are_planned_and_played():
    cluster = Cluster(1000, 4, speeds=(1.0, 0.9, 0.5))
    found = predict(MODEL, 1_000_000_000, cluster)
    played = play(MODEL, 1_000_000_000, cluster, found.partitions).makespan
    assert found.work == pytest.approx(1e7 / (4 * 1000 * 0.8), rel=1e-3)
    assert found.pass_seconds - found.start == pytest.approx(played, rel=0.02)


@pytest.mark.parametrize("wrong", [{"executors": 0}, {"cores": 0}, {"speeds": ()}, {"speeds": (0.0,)}, {"price": -1}])
def test_an_impossible_cluster_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Cluster(**{"executors": 2, **wrong})


# ------------------------------------------------------------------------- what the seed of this project measured


def test_one_slow_machine_holds_up_large_partitions_and_not_small_ones():
    """Five machines end after 27 s and a slow one after 202 s (its table 5), each with a sixth of the images."""
    speeds = [1.0] * 5 + [27 / 202]
    large, small = ([27 * 6 / partitions] * partitions for partitions in (6, 180))
    assert simulate(large, speeds).makespan == pytest.approx(202)
    assert simulate(small, speeds).makespan < 40  # together they could in 32 s
    copied = simulate(large, speeds, speculation=Speculation(quantile=0.75, multiplier=1.5)).makespan
    assert copied == pytest.approx(27 * 1.5 + 27)  # a copy begins when the task has taken 1.5 times the median


def test_partitions_that_leave_a_wave_half_empty_take_longer():
    """170 and 288 partitions on six machines of eight cores: 4 waves of 1/170, and 6 of 1/288."""
    ends = {n: simulate([4800 / n] * n, np.ones(48)).makespan for n in (170, 288)}
    assert ends[170] == pytest.approx(4 / 170 * 4800) and ends[288] == pytest.approx(100)


@pytest.mark.parametrize("point", [0.5, 1.0])
def test_failed_tasks_cost_what_they_had_done(point):
    """96 of 288 tasks fail once (as many as in the seed's experiment 17): what is lost is divided among all."""
    failures = np.zeros(288, int)
    failures[np.random.default_rng(0).choice(288, 96, replace=False)] = 1
    end = simulate([1.0] * 288, np.ones(6), failures=failures, failure_point=point).makespan
    assert 48 + 96 * point / 6 <= end <= 48 + 96 * point / 6 + 1
