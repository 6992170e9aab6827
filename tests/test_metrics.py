"""Metrics on shapes whose value is known by hand; images are 100 x 100, so that a ratio of 0.02 means 3 pixels."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from helpers.errors import DataError
from helpers.metrics import average_precision, boundary, boundary_iou, boundary_width, mask_iou


def rectangle(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def encode(mask: np.ndarray) -> dict:
    return coco.encode(np.asfortranarray(mask, np.uint8))


def truth_of(*masks: np.ndarray) -> dict:
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": 1,
            "iscrowd": 0,
            "area": int(mask.sum()),
            "bbox": coco.toBbox(encode(mask)).tolist(),
            "segmentation": encode(mask),
        }
        for i, mask in enumerate(masks, 1)
    ]
    image = {"id": 1, "width": 100, "height": 100}
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def found(mask: np.ndarray, score: float = 0.9) -> dict:
    return {"image_id": 1, "category_id": 1, "score": score, "segmentation": encode(mask)}


SQUARE = rectangle(20, 20, 60, 60)
SHIFTED = rectangle(20, 21, 60, 60)


def test_mask_iou_counts_pixels():
    assert mask_iou(rectangle(10, 10, 20, 20), rectangle(15, 15, 10, 10)) == 0.25
    assert mask_iou(rectangle(0, 0, 10, 10), rectangle(0, 5, 10, 10)) == pytest.approx(50 / 150)
    assert mask_iou(rectangle(0, 0, 10, 10), rectangle(50, 50, 10, 10)) == 0
    assert mask_iou(rectangle(0, 0, 0, 0), rectangle(0, 0, 0, 0)) == 1
    assert mask_iou(255 * SQUARE.astype(np.uint8), SQUARE) == 1


@pytest.mark.parametrize("overlap", [mask_iou, boundary_iou])
def test_masks_of_different_images_cannot_be_compared(overlap):
    with pytest.raises(ValueError, match=r"\(100, 100\).*\(50, 100\)"):
        overlap(SQUARE, SQUARE[:50])


@pytest.mark.parametrize(
    ("height", "width", "ratio", "pixels"),
    [(100, 100, 0.02, 3), (480, 640, 0.02, 16), (480, 640, 0.005, 4), (1080, 1920, 0.02, 44), (28, 28, 0.005, 1)],
)
def test_the_boundary_is_a_share_of_the_diagonal(height, width, ratio, pixels):
    assert boundary_width(height, width, ratio) == pixels


def test_the_boundary_lies_inside_the_mask_and_leaves_its_core():
    assert boundary(SQUARE, 3).sum() == 60**2 - 54**2
    assert (boundary(SQUARE, 3) == SQUARE & ~rectangle(23, 23, 54, 54)).all()
    assert (boundary(SQUARE, 30) == SQUARE).all()
    hole = SQUARE & ~rectangle(45, 45, 10, 10)
    assert boundary(hole, 3).sum() == 60**2 - 54**2 + 16**2 - 10**2


def test_where_the_image_cuts_a_mask_there_is_boundary():
    assert boundary(np.ones((100, 100)), 3).sum() == 100**2 - 94**2
    left = rectangle(0, 0, 100, 50)
    ring, whole, common = 100 * 50 - 94 * 44, 100**2 - 94**2, 3 * 100 + 2 * 3 * 47
    assert boundary_iou(left, np.ones((100, 100)), 0.02) == pytest.approx(common / (ring + whole - common))


def test_boundary_iou_sees_what_mask_iou_hardly_does():
    common = 59 * 60 - 55 * 54  # in both squares, and not in the core of either
    assert boundary_iou(SQUARE, SHIFTED, 0.02) == pytest.approx(common / (2 * (60**2 - 54**2) - common))
    assert mask_iou(SQUARE, SHIFTED) == pytest.approx(59 / 61)
    assert boundary_iou(SQUARE, SHIFTED, 1.0) == mask_iou(SQUARE, SHIFTED)


def test_boundaries_that_do_not_meet_have_no_overlap():
    assert boundary_iou(SQUARE, rectangle(25, 25, 50, 50), 0.02) == 0
    assert boundary_iou(SQUARE, SQUARE, 0.02) == 1
    assert boundary_iou(SQUARE, np.zeros((100, 100)), 0.02) == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 15), st.integers(1, 4))
def test_the_boundary_is_what_is_near_the_outside(seed, height, width, distance):
    mask = np.random.default_rng(seed).random((height, width)) < 0.9
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    for place in np.ndindex(mask.shape):
        near = np.abs(outside - place).max(axis=1).min() <= distance
        assert boundary(mask, distance)[place] == (mask[place] and near)


def test_perfect_masks_have_an_average_precision_of_one():
    other = rectangle(0, 0, 15, 30)
    for ratio in (None, 0.02):
        scores = average_precision(truth_of(SQUARE, other), [found(SQUARE), found(other, 0.3)], ratio)
        assert scores == pytest.approx({"AP": 1, "AP50": 1, "AP75": 1})


def test_what_is_not_found_costs_recall_and_what_is_not_there_precision():
    missed = average_precision(truth_of(SQUARE, rectangle(0, 0, 10, 10)), [found(SQUARE)])
    assert missed["AP"] == pytest.approx(51 / 101)  # of recalls 0.00, 0.01 ... 1.00, those up to a half
    invented = average_precision(truth_of(SQUARE), [found(SQUARE, 0.5), found(rectangle(0, 0, 10, 10), 0.9)])
    assert invented["AP"] == pytest.approx(0.5)


def test_a_mask_counts_at_the_thresholds_below_its_overlap():
    part = rectangle(20, 20, 60, 44)  # of the square: 0.733
    assert average_precision(truth_of(SQUARE), [found(part)]) == pytest.approx({"AP": 0.5, "AP50": 1, "AP75": 0})


def test_for_boundary_ap_the_smaller_overlap_decides():
    mask_ap, boundary_ap = (average_precision(truth_of(SQUARE), [found(SHIFTED)], ratio) for ratio in (None, 0.02))
    assert mask_ap["AP"] == pytest.approx(1)  # 0.967
    assert boundary_ap == pytest.approx({"AP": 0.5, "AP50": 1, "AP75": 0})  # 0.714
    ring = boundary(SQUARE, 3)  # has the square's boundary, and not its inside
    assert boundary_iou(SQUARE, ring, 0.02) == 1
    assert average_precision(truth_of(SQUARE), [found(ring)], 0.02)["AP50"] == 0


def test_the_best_detection_is_matched_first_with_boundaries_too():
    # Given worst first, so that overlaps in another order than the scores' would be noticed.
    predictions = [found(SHIFTED, 0.3), found(SQUARE, 0.9)]
    assert average_precision(truth_of(SQUARE), predictions, 0.02)["AP"] == pytest.approx(1)
    assert average_precision(truth_of(SQUARE), [found(SHIFTED, 0.9), found(SQUARE, 0.3)], 0.02)["AP"] == pytest.approx(
        (5 * 1 + 5 * 0.5) / 10
    )


def test_masks_are_compared_within_their_class_and_image():
    truth = truth_of(SQUARE)
    truth["categories"].append({"id": 2, "name": "other"})
    assert average_precision(truth, [{**found(SQUARE), "category_id": 2}]) == {"AP": 0, "AP50": 0, "AP75": 0}


def test_nothing_is_printed_and_nothing_changed(capsys):
    truth, predictions = truth_of(SQUARE), [found(SHIFTED)]
    before = copy.deepcopy((truth, predictions))
    average_precision(truth, predictions, 0.02)
    assert (truth, predictions) == before
    assert capsys.readouterr() == ("", "")


def test_no_predictions_are_worth_nothing():
    assert average_precision(truth_of(SQUARE), []) == {"AP": 0, "AP50": 0, "AP75": 0}


def test_what_cannot_be_evaluated_is_explained():
    with pytest.raises(DataError, match="there are none"):
        average_precision(truth_of(), [found(SQUARE)])
    with pytest.raises(DataError, match=r"\[7\]"):
        average_precision(truth_of(SQUARE), [{**found(SQUARE), "image_id": 7}])
