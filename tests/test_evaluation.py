"""Predictions against truth, on rectangles whose overlap is known by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco

from helpers.bundle.manifest import Manifest
from helpers.export import evaluation
from helpers.images.spec import InputSpec
from helpers.metrics import boundary_iou
from studies import accuracy, figures

SIDE = 40


def rectangle(left: int, width: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[10:30, left : left + width] = 1
    return mask


def instance(mask: np.ndarray, score: float = 0.9, class_id: int = 1) -> dict:
    encoded = coco.encode(np.asfortranarray(mask))
    left, top, width, height = coco.toBbox(encoded).tolist()
    return {
        "class_id": class_id,
        "label": ("bag", "shirt")[class_id],
        "score": score,
        "box": {"x1": left, "y1": top, "x2": left + width, "y2": top + height},
        "mask": {"size": encoded["size"], "counts": encoded["counts"].decode()},
    }


def made(task: str) -> Manifest:
    spec = InputSpec(SIDE, SIDE, "rgb", (0.0,) * 3, (1.0,) * 3)
    return Manifest("m", "m", task, spec, (), ("bag", "shirt"), {"top_k": 1}, "fp32", "f32", 0, {})


LEFT, RIGHT, HALF = rectangle(2, 10), rectangle(20, 10), rectangle(2, 5)


@pytest.fixture
def truth() -> dict:
    """Two images with one shirt each."""
    return evaluation.to_truth([[instance(LEFT)], [instance(RIGHT)]], made("instance_segmentation"))


def test_what_is_too_improbable_to_be_drawn_is_no_truth():
    found = [[instance(LEFT), instance(RIGHT, 0.29)], []]
    truth = evaluation.to_truth(found, made("instance_segmentation"))
    assert [a["image_id"] for a in truth["annotations"]] == [0]
    assert [image["id"] for image in truth["images"]] == [0, 1]


def test_a_model_agrees_with_itself():
    found = [[instance(LEFT, 0.9), instance(RIGHT, 0.4), instance(HALF, 0.1)], [], [instance(RIGHT, 0.5)]]
    truth = evaluation.to_truth(found, made("instance_segmentation"))
    assert evaluation.score(dict(enumerate(found)), truth) == pytest.approx(1)


def test_a_score_is_of_the_images_it_is_asked_for(truth):
    half = {0: [instance(LEFT)], 1: [instance(HALF)]}
    assert evaluation.score({0: half[0]}, truth) == pytest.approx(1)
    assert evaluation.score({1: half[1]}, truth) == 0
    assert evaluation.score(half, truth) == pytest.approx(51 / 101)  # one of two is found, and ranked with a wrong one
    assert evaluation.score({0: []}, {**truth, "annotations": []}) == 1


def test_classes_are_matched_by_name_whatever_their_numbers(truth):
    truth["categories"] = [{"id": 7, "name": "shirt"}, {"id": 9, "name": "bag"}]
    for annotation in truth["annotations"]:
        annotation["category_id"] = 7
    found = {0: [instance(LEFT)], 1: [instance(RIGHT)]}
    assert evaluation.score(found, truth) == pytest.approx(1)
    assert evaluation.score({0: [instance(LEFT, class_id=0)], 1: []}, truth) == 0


def test_the_accuracy_of_a_classification_is_the_share_of_right_classes():
    outputs = iter([[0.1, 3.0], [2.0, 0.0]])
    images = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    manifest = made("classification")
    found = evaluation.predict(lambda _: {"logits": np.array([next(outputs)])}, images, manifest, {})
    assert evaluation.to_truth(found, manifest) == [1, 0]
    assert evaluation.score(dict(enumerate(found)), [1, 1]) == 0.5
    assert evaluation.score({1: found[1]}, [1, 0]) == 1


def test_truth_can_be_drawn_like_predictions(truth):
    shown = accuracy.to_predictions(
        {**truth, "annotations": [a | {"bbox": [20, 10, 10, 20]} for a in truth["annotations"]]}, 1
    )
    assert shown == [instance(RIGHT, 1.0)]


def test_tables_have_a_row_for_each_format(truth):
    predictions = {"one": [[instance(LEFT)], [instance(RIGHT)]], "other": [[instance(HALF)], [instance(RIGHT, 0.29)]]}
    precision = accuracy.precision_table(predictions, truth)
    assert precision.loc["one"].tolist() == pytest.approx([100] * 4)
    assert precision.loc["other", "mask AP50"] == pytest.approx(100)  # the half has an overlap of 0.5
    assert precision.loc["other", "mask AP75"] == pytest.approx(100 * 0.5 * 51 / 101)  # it ranks before the other
    overlap = accuracy.overlap_table(predictions, truth, ratios=(0.02, 0.05))
    assert overlap.loc["one"].tolist() == [1, 1, 1]
    # Of the first image a half is drawn; of the second nothing, because it is too improbable.
    assert overlap.loc["other", "mask IoU"] == pytest.approx(0.25)
    assert overlap.loc["other", 0.05] == pytest.approx(boundary_iou(HALF, LEFT, 0.05) / 2)
    values, differences = figures.plot_overlaps(overlap, reference="one").axes
    assert [len(axis.get_legend().get_texts()) for axis in (values, differences)] == [2, 1]
    shown = [line.get_ydata() for line in differences.get_lines() if len(line.get_xdata()) == 2]
    assert any(np.allclose(y, 1000 * (overlap.loc["other", [0.02, 0.05]] - 1)) for y in shown)
