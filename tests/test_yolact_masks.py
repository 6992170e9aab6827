import json

import numpy as np
import pytest
import yolact_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from helpers.images.rle import decode
from helpers.yolact.masks import encode_masks

ROUNDING = 1e-5  # float32 probabilities that were computed in another order


def example(seed: int, n: int = 12, cells: int = 138, spread: float = 1.0) -> tuple[np.ndarray, ...]:
    """Smooth prototypes, coefficients, and boxes of all sizes, some beyond the image and some turned around."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0.4, 1, (9, 9, 32)).clip(0)
    across = np.linspace(0, 8, cells)
    mix = np.maximum(0, 1 - abs(across[:, None] - np.arange(9)))  # linear interpolation
    proto = np.einsum("ya,abp,xb->yxp", mix, coarse, mix).astype(np.float32)
    coefficients = np.tanh(rng.normal(0, spread, (n, 32))).astype(np.float32)
    centre, half = rng.uniform(-0.1, 1.1, (n, 2)), rng.uniform(-0.1, 0.6, (n, 2))
    return proto, coefficients, np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)


def check(proto, coefficients, boxes, width: int, height: int, threshold: float = 0.5) -> int:
    """Compare with the specification, and each string with pycocotools; return how many pixels are inside."""
    masks = encode_masks(proto, coefficients, boxes, width, height, threshold)
    probabilities = oracle.enlarge(proto, coefficients, boxes, width, height).numpy()
    assert len(masks) == len(boxes)
    inside = 0
    for mask, expected in zip(masks, probabilities, strict=True):
        assert mask["size"] == [height, width]
        found = coco.decode(mask)
        assert found.shape == expected.shape
        differing = expected[found != (expected > threshold)]
        np.testing.assert_allclose(differing, threshold, atol=ROUNDING)
        assert coco.encode(np.asfortranarray(found))["counts"] == mask["counts"].encode()
        np.testing.assert_array_equal(decode(mask), found.astype(bool))
        inside += int(found.sum())
    return inside


SIZES = [(640, 480), (1920, 1080), (138, 138), (276, 414), (100, 90), (37, 500), (1, 1), (2, 300), (1000, 7)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_masks_are_those_of_the_specification_at_any_size(width, height):
    assert check(*example(0), width, height) > 0.02 * 12 * width * height


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    cells=st.integers(9, 60),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    threshold=st.sampled_from([0.5, 0.5, 0.1, 0.9]),
)
def test_masks_are_those_of_the_specification_for_any_example(seed, width, height, cells, spread, threshold):
    check(*example(seed, 4, cells, spread), width, height, threshold)


@pytest.mark.parametrize("seed", range(3))
def test_noise_whose_cells_all_differ_is_encoded_too(seed):
    rng = np.random.default_rng(seed)
    proto = rng.random((40, 30, 4), np.float32)  # not as wide as high
    coefficients = rng.uniform(-1, 1, (6, 4)).astype(np.float32)
    boxes = np.array([[-1, -1, 2, 2], [0, 0, 1, 1], [0.2, 0.3, 0.7, 0.9]] * 2, np.float32)
    check(proto, coefficients, boxes, 333, 222)


FULL = np.array([[0, 0, 1, 1]], np.float32)


def constant(value: float) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((138, 138, 1), np.float32), np.array([[value]], np.float32)


def test_a_mask_of_everything_and_one_of_nothing():
    assert encode_masks(*constant(1), FULL, 30, 20) == [
        {"size": [20, 30], "counts": coco.encode(np.ones((20, 30), np.uint8, "F"))["counts"].decode()}
    ]
    nothing = coco.encode(np.zeros((20, 30), np.uint8, "F"))["counts"].decode()
    assert encode_masks(*constant(-1), FULL, 30, 20)[0]["counts"] == nothing
    assert encode_masks(*constant(0), FULL, 30, 20)[0]["counts"] == nothing  # exactly at the threshold


@pytest.mark.parametrize("box", [(1.2, 0.1, 1.4, 0.5), (-0.5, 0.1, -0.2, 0.5), (0.1, 3.0, 0.5, 4.0), (-9, -9, -8, -8)])
def test_a_box_outside_of_the_image_has_an_empty_mask(box):
    boxes = np.array([box], np.float32)
    assert check(*constant(1), boxes, 64, 48) == 0


def test_a_box_without_area_has_the_cells_around_it():
    boxes = np.array([[0.5, 0.5, 0.5, 0.5]], np.float32)
    assert 0 < check(*constant(3), boxes, 1380, 1380) < 40**2


def test_a_mask_stays_within_a_cell_and_a_half_of_its_box():
    found = decode(encode_masks(*constant(9), np.array([[0.25, 0.5, 0.5, 0.75]], np.float32), 1380, 1380)[0])
    rows, columns = np.nonzero(found)
    for places, (low, high) in ((rows, (0.5, 0.75)), (columns, (0.25, 0.5))):
        assert 0 <= low * 1380 - places.min() <= 20 and 0 <= places.max() + 1 - high * 1380 <= 20


def test_overpowering_coefficients_are_no_problem():
    proto, coefficients, boxes = example(1)
    with np.errstate(all="raise", under="ignore"):
        check(proto * 1e4, coefficients, boxes, 200, 150)


def test_no_detections_have_no_masks():
    proto, coefficients, boxes = example(2)
    assert encode_masks(proto, coefficients[:0], boxes[:0], 640, 480) == []


def test_an_encoding_survives_json():
    mask = encode_masks(*example(3), 640, 480)[0]
    assert json.loads(json.dumps(mask)) == mask
