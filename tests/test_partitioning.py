from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.partitioning import plan_partitions

LENGTHS = st.lists(
    st.one_of(st.just(0), st.integers(0, 100), st.integers(0, 2**20), st.integers(0, 2**40)), max_size=300
)
SLOTS = st.integers(1, 17)
TARGETS = st.fixed_dictionaries({"target_bytes": st.integers(1, 2**30), "target_images": st.integers(1, 500)})


@given(LENGTHS, SLOTS, TARGETS)
def test_every_image_is_in_exactly_one_partition(lengths, slots, targets):
    plan = plan_partitions(lengths, slots, **targets)
    assert plan.assignment.shape == (len(lengths),) and plan.assignment.dtype == np.int32
    expected = Counter(plan.assignment.tolist())
    assert plan.files.tolist() == [expected[partition] for partition in range(plan.partitions)]
    total = np.zeros(plan.partitions, np.int64)
    np.add.at(total, plan.assignment, np.asarray(lengths, np.int64))
    assert plan.bytes.tolist() == total.tolist()


@given(LENGTHS, SLOTS, TARGETS)
def test_partitions_fill_the_slots_and_none_is_empty(lengths, slots, targets):
    plan = plan_partitions(lengths, slots, **targets)
    assert plan.partitions % slots == 0 or plan.partitions == len(lengths)
    assert plan.partitions <= len(lengths)
    assert (plan.files > 0).all()


@given(LENGTHS, SLOTS, TARGETS)
def test_there_are_enough_partitions_for_both_targets_and_no_more_waves(lengths, slots, targets):
    plan = plan_partitions(lengths, slots, **targets)
    needed = max(-(-sum(lengths) // targets["target_bytes"]), -(-len(lengths) // targets["target_images"]), 1)
    assert plan.partitions >= min(needed, len(lengths))
    assert plan.partitions < needed + slots


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=300), st.integers(1, 40))
def test_the_fullest_partition_is_within_the_bound_of_list_scheduling(lengths, partitions):
    plan = plan_partitions(lengths, 1, partitions=partitions)
    costs = np.asarray(lengths, np.int64) + max(1, int(np.mean(lengths)))
    loads = np.zeros(plan.partitions, np.int64)
    np.add.at(loads, plan.assignment, costs)
    m = plan.partitions
    assert m == min(partitions, len(lengths))
    assert loads.max() <= costs.sum() / m + (1 - 1 / m) * costs.max() + 1e-6
    # Longest first: whatever came last on the fullest partition is its smallest, so it was the least full without it.
    fullest = plan.assignment == loads.argmax()
    assert loads.max() - costs[fullest].min() <= loads.min()


@given(st.lists(st.integers(0, 2**30), min_size=1, max_size=200), st.integers(1, 20), st.randoms(use_true_random=False))
def test_loads_do_not_depend_on_the_order_of_the_listing(lengths, slots, random):
    shuffled = list(lengths)
    random.shuffle(shuffled)
    plans = [plan_partitions(order, slots, target_images=20) for order in (lengths, shuffled)]
    loads = [sorted(zip(plan.bytes.tolist(), plan.files.tolist(), strict=True)) for plan in plans]
    assert loads[0] == loads[1]


def test_many_tiny_images_do_not_gather_beside_a_few_large_ones():
    plan = plan_partitions([10_000_000] * 4 + [10] * 1000, slots=4, target_bytes=2**40, target_images=10_000)
    assert plan.partitions == 4
    assert plan.files.min() > 200


def test_equal_images_are_spread_evenly():
    plan = plan_partitions([500] * 10_000, slots=4)
    assert plan.partitions == 12 and plan.waves == 3
    assert plan.files.max() - plan.files.min() <= 1


def test_empty_files_are_spread_too():
    assert plan_partitions([0] * 8, slots=4).files.tolist() == [2, 2, 2, 2]


def test_fewer_images_than_slots_get_a_partition_each():
    assert plan_partitions([5, 6, 7], slots=8).files.tolist() == [1, 1, 1]


def test_a_given_number_of_partitions_is_used():
    assert plan_partitions([1] * 100, slots=4, partitions=7).partitions == 7
    assert plan_partitions([1] * 3, slots=4, partitions=7).partitions == 3


def test_no_images_make_no_partitions():
    plan = plan_partitions([], slots=4)
    assert plan.partitions == 0 and plan.waves == 0
    assert str(plan) == "no images, no partitions"


def test_a_plan_says_what_it_is():
    text = str(plan_partitions([2**20] * 10, slots=2, target_images=5))
    for part in ("10 images (10.0 MiB)", "2 partitions", "2 slots", "5 to 5 images", "5.00 to 5.00 MiB", "50.0%"):
        assert part in text


@pytest.mark.parametrize(
    "arguments",
    [
        {"slots": 0},
        {"slots": -1},
        {"target_bytes": 0},
        {"target_images": 0},
        {"partitions": 0},
        {"partitions": -3},
        {"lengths": [1, -1]},
    ],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        plan_partitions(**{"lengths": [1, 2], "slots": 2, **arguments})


def test_slots_that_come_later_find_work():
    assert plan_partitions([1] * 100, slots=2).partitions == 2
    assert plan_partitions([1] * 100, slots=2, at_least=7).partitions == 8
    assert plan_partitions([1] * 3, slots=2, at_least=7).partitions == 3
