import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco

from helpers.images.rle import area, decode, encode, encode_runs, reduce

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40))


@given(MASKS)
def test_an_encoded_mask_is_pycocotools_and_comes_back(mask):
    encoded = encode(mask)
    assert encoded["size"] == list(mask.shape)
    assert encoded["counts"].encode() == coco.encode(np.asfortranarray(mask, np.uint8))["counts"]
    np.testing.assert_array_equal(decode(encoded), mask)


@given(MASKS)
def test_run_lengths_are_encoded_as_their_mask_is(mask):
    ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    runs = np.diff(ends, prepend=0, append=mask.size)
    height, width = mask.shape
    assert encode_runs([runs, runs], width, height) == [encode(mask)] * 2
    np.testing.assert_array_equal(decode({"size": [height, width], "counts": runs.tolist()}), mask)


def test_no_mask_has_no_runs():
    assert encode_runs([], 640, 480) == []


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_area_and_a_reduction_are_those_of_the_pixels(height, width, block, share, seed):
    blocks = np.random.default_rng(seed).random((-(-height // block), -(-width // block))) < share
    mask = np.kron(blocks, np.ones((block, block), bool))[:height, :width]
    encoded = encode(mask)
    assert area(encoded) == mask.sum()
    assert reduce(encoded, max(height, width)) == encoded
    rows, columns = reduce(encoded, 30)["size"]
    expected = mask[
        np.ix_(*(((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((rows, height), (columns, width))))
    ]
    assert max(rows, columns) <= 30 and np.array_equal(decode(reduce(encoded, 30)), expected)


def test_a_number_that_is_too_long_for_a_run_is_refused():
    with pytest.raises(ValueError, match="too long"):
        decode({"size": [4, 4], "counts": "o" * 13 + "0"})


@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=2),
    st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=40)
    | st.lists(st.integers(-9, 99), max_size=9),
)
def test_damaged_counts_are_a_mask_of_the_size_or_an_error(size, counts):
    try:
        mask = decode({"size": size, "counts": counts})
    except ValueError:
        return
    assert mask.shape == tuple(size) and mask.dtype == bool


@pytest.mark.parametrize("counts", ["", [], "04", [3, 4], [-1, 17], "zzzzzzzzzzzzzzzzz"])
def test_runs_of_another_size_are_refused(counts):
    with pytest.raises(ValueError, match="16"):
        decode({"size": [4, 4], "counts": counts})
