import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from studies.simulation import Schedule, Speculation, draw_failures, simulate

TIMES = st.lists(st.floats(0.01, 100), min_size=1, max_size=60)
SPEEDS = st.lists(st.floats(0.1, 10), min_size=1, max_size=12)
CLOSE = 1 + 1e-9


def attempts(schedule: Schedule) -> list[tuple]:
    columns = (schedule.task, schedule.slot, schedule.start, schedule.end, schedule.outcome)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(TIMES, st.integers(1, 12))
def test_equal_slots_keep_grahams_bounds(seconds, slots):
    makespan = simulate(seconds, [1.0] * slots).makespan
    least = max(sum(seconds) / slots, max(seconds))
    most = sum(seconds) / slots + (1 - 1 / slots) * max(seconds)
    assert least <= makespan * CLOSE and makespan <= most * CLOSE
    assert makespan <= (2 - 1 / slots) * least * CLOSE  # Graham, 1966, theorem 1


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7), st.integers(1, 3))
def test_the_longest_first_come_within_grahams_share_of_the_optimum(seconds, slots):
    """At most 4/3 - 1/(3m) times the optimum (Graham, 1969, theorem 3), which is found by trying all assignments."""
    every = np.array(list(product(range(slots), repeat=len(seconds))))
    loads = [((every == slot) * seconds).sum(axis=1) for slot in range(slots)]
    optimum = np.max(loads, axis=0).min()
    makespan = simulate(sorted(seconds, reverse=True), [1.0] * slots).makespan
    assert optimum <= makespan * CLOSE and makespan <= (4 / 3 - 1 / (3 * slots)) * optimum * CLOSE


@given(TIMES, SPEEDS)
def test_unequal_slots_keep_the_bounds_of_list_scheduling(seconds, speeds):
    makespan = simulate(seconds, speeds).makespan
    least = max(sum(seconds) / sum(speeds), max(seconds) / max(speeds))
    # Until the last task starts every slot is busy, and it runs on the slowest at worst.
    most = max((sum(seconds) - last) / sum(speeds) + last / min(speeds) for last in seconds)
    assert least <= makespan * CLOSE and makespan <= most * CLOSE


@given(TIMES, SPEEDS)
def test_both_ways_to_simulate_agree_where_nothing_goes_wrong(seconds, speeds):
    plain, careful = simulate(seconds, speeds), simulate(seconds, speeds, failures=[0] * len(seconds))
    assert sorted(attempts(plain)) == sorted(attempts(careful))


@given(TIMES, SPEEDS, st.data())
def test_a_slot_runs_one_attempt_at_a_time_and_every_task_ends_once(seconds, speeds, data):
    failures = data.draw(st.lists(st.integers(0, 3), min_size=len(seconds), max_size=len(seconds)))
    speculation = data.draw(st.sampled_from([None, Speculation(), Speculation(0.5, 1.1)]))
    ready = data.draw(st.lists(st.floats(0, 20), min_size=len(speeds), max_size=len(speeds)))
    schedule = simulate(seconds, speeds, ready=ready, failures=failures, speculation=speculation)
    assert not schedule.aborted
    assert sorted(schedule.task[schedule.outcome == "ended"]) == list(range(len(seconds)))
    assert (schedule.outcome == "failed").sum() <= sum(failures)
    for slot in range(len(speeds)):
        here = schedule.slot == slot
        order = np.lexsort((schedule.end[here], schedule.start[here]))
        start, end = schedule.start[here][order], schedule.end[here][order]
        assert (start >= ready[slot]).all() and (start[1:] >= end[:-1]).all()
    if speculation is None:
        assert (schedule.outcome == "failed").sum() == sum(failures)
        assert set(schedule.outcome.tolist()) <= {"ended", "failed"}


def test_tasks_go_in_order_to_the_slot_that_is_free_first():
    """By hand: 3 and 2 start; slot 1 is free at 2 and takes 4 until 6; slot 0 at 3 takes 1, then 5 from 4 until 9."""
    assert attempts(simulate([3, 2, 4, 1, 5], [1, 1])) == [
        (1, 1, 0, 2, "ended"),
        (0, 0, 0, 3, "ended"),
        (3, 0, 3, 4, "ended"),
        (2, 1, 2, 6, "ended"),
        (4, 0, 4, 9, "ended"),
    ]


def test_grahams_worst_case_is_as_bad_as_he_says():
    """m(m-1) tasks of 1 and then one of m: 2m - 1 instead of m."""
    assert simulate([1] * 12 + [4], [1] * 4).makespan == 7
    assert simulate([4] + [1] * 12, [1] * 4).makespan == 4


def test_a_slow_slot_and_late_slots_by_hand():
    assert simulate([4, 4, 4], [1, 0.5]).makespan == 8  # the slow one has one task, the other two
    assert simulate([4, 4], [1, 0.5], ready=[3, 0]).makespan == 8
    assert simulate([1, 1, 1], [1, 1], ready=[0, 10]).makespan == 3  # what comes late gets nothing
    assert simulate([], [1, 1], ready=5).makespan == 0


def test_a_failed_task_is_tried_again_before_those_that_wait():
    found = attempts(simulate([4, 4, 4], [1], failures=[0, 2, 0], failure_point=0.25))
    assert found == [
        (0, 0, 0, 4, "ended"),
        (1, 0, 4, 5, "failed"),
        (1, 0, 5, 6, "failed"),
        (1, 0, 6, 10, "ended"),
        (2, 0, 10, 14, "ended"),
    ]


def test_a_task_that_fails_too_often_ends_the_job():
    schedule = simulate([4, 4, 4], [1], failures=[0, 9, 0], failure_point=1.0, max_failures=4)
    assert schedule.aborted and schedule.makespan == 4 + 4 * 4
    assert schedule.task.tolist() == [0, 1, 1, 1, 1]


def test_a_copy_of_a_task_that_takes_long_ends_first():
    """Nine tasks of 1 s on slot 0 while slot 1, a hundredth as fast, has one: copied at 3 medians or when it may be."""
    plain = simulate([1] * 10, [1, 0.01])
    saved = simulate([1] * 10, [1, 0.01], speculation=Speculation(quantile=0.9, multiplier=3))
    assert plain.makespan == 100
    assert saved.makespan == 10  # the ninth of ten ends at 9, when the slow one has long taken more than 3
    assert attempts(saved)[-2:] == [(1, 0, 9, 10, "ended"), (1, 1, 0, 10, "stopped")]


def test_a_copy_waits_until_the_task_has_taken_long():
    """By hand: the median is 1, so a task from 0 is copied at 5, on the fast slot that is idle since 2."""
    saved = simulate([1, 1, 1], [1, 0.05], speculation=Speculation(quantile=0.5, multiplier=5))
    assert attempts(saved)[-2:] == [(1, 0, 5, 6, "ended"), (1, 1, 0, 6, "stopped")]


def test_drawn_failures_are_as_frequent_as_asked():
    failures = draw_failures(0.2, 100_000, np.random.default_rng(0))
    assert failures.sum() / (failures.sum() + failures.size) == pytest.approx(0.2, abs=0.01)
    assert (draw_failures(0.0, 50, np.random.default_rng(0)) == 0).all()


def test_a_million_tasks_on_a_thousand_executors_take_seconds():
    before = time.process_time()
    schedule = simulate(np.full(1_000_000, 5.0), np.ones(4000))
    assert schedule.makespan == 1250
    assert time.process_time() - before < 30  # of the processor; a few here


@pytest.mark.parametrize("seconds, speeds", [([1], []), ([1], [0]), ([-1], [1]), ([1], [1, -1])])
def test_what_makes_no_sense_is_refused(seconds, speeds):
    with pytest.raises(ValueError, match="slot"):
        simulate(seconds, speeds)
