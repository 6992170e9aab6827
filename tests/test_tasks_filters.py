import numpy as np
import pytest
from manifests import LABELS, make_manifest

from helpers.config import load_config, parse_assignments
from helpers.errors import ConfigError
from helpers.images import rle
from helpers.tasks import parameters_for, predict
from helpers.tasks.filters import Filters

SIZE = (200, 100)
SHAPES = {"boxes": (4, 4), "scores": (4,), "classes": (4,)}
DETECTION = make_manifest("detection", height=100, width=200, outputs=SHAPES)
OUTPUTS = {
    "boxes": np.array([[[0, 0, 20, 20], [150, 50, 200, 100], [90, 40, 110, 60], [10, 60, 14, 65]]], np.float32),
    "scores": np.array([[0.9, 0.8, 0.7, 0.2]], np.float32),
    "classes": np.array([[0, 1, 2, 1]], np.float32),
}


def labels(**filters) -> list[str]:
    parameters = parameters_for(DETECTION, filters)
    return [p["label"] for p in predict(OUTPUTS, [SIZE], DETECTION, parameters)[0]]


def test_without_filters_all_predictions_stay():
    assert labels() == ["cat", "dog", "cup", "dog"]


@pytest.mark.parametrize("classes", [["dog", "cup"], [1, 2], ("dog", 2), [1, "cup"]])
def test_classes_may_be_labels_or_numbers(classes):
    assert labels(classes=classes) == ["dog", "cup", "dog"]


def test_one_class_needs_no_list():
    assert labels(classes="dog") == labels(classes=1) == ["dog", "dog"]


def test_scores_and_areas_have_a_least_value():
    assert labels(min_score=0.7) == ["cat", "dog", "cup"]
    assert labels(min_area=20) == ["cat", "dog", "cup", "dog"] and labels(min_area=400.5) == ["dog"]


def test_a_region_is_in_pixels_or_in_shares_and_holds_centers():
    assert labels(region=[0, 0, 100, 100]) == labels(region=[0, 0, 0.5, 1]) == ["cat", "cup", "dog"]
    assert labels(region=[0, 0, 1, 1]) == labels()
    assert labels(region=[140, 0, 200, 100]) == ["dog"]


def test_filters_hold_together():
    assert labels(classes=["dog"], min_score=0.5, region=[0.5, 0.5, 1, 1]) == ["dog"]
    assert labels(classes=["cat"], region=[0.5, 0.5, 1, 1]) == []


def test_the_area_is_the_masks_where_there_is_one():
    inside = np.zeros((100, 200), bool)
    inside[:10, :5] = True
    box = {"x1": 0.0, "y1": 0.0, "x2": 100.0, "y2": 100.0}
    one = {"class_id": 0, "label": "cat", "score": 0.5, "box": box, "mask": rle.encode(inside), "keypoints": None}
    assert Filters(min_area=50).apply([one], SIZE, LABELS) == [one]
    assert Filters(min_area=51).apply([one], SIZE, LABELS) == []
    assert Filters(min_area=51).apply([{**one, "mask": None}], SIZE, LABELS)


def test_a_classification_has_classes_and_scores_to_filter_by():
    manifest = make_manifest("classification", outputs={"logits": (3,)})
    outputs = {"logits": np.array([[1.0, 3.0, 2.0]])}
    parameters = parameters_for(manifest, {"classes": ["cat", "dog"], "min_score": 0.3})
    assert [p["label"] for p in predict(outputs, [SIZE], manifest, parameters)[0]] == ["dog"]
    with pytest.raises(ConfigError, match=r"postprocess\.region: net has no such parameter"):
        parameters_for(manifest, {"region": [0, 0, 1, 1]})


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"classes": ["dgo"]}, "classes: the model has no label 'dgo'; the nearest is 'dog'"),
        ({"classes": ["CAT"]}, "classes: the model has no label 'CAT'; the nearest is 'cat'"),
        ({"classes": [3]}, "classes: there is no class 3; the last one is 2"),
        ({"classes": [True]}, "classes is not a list of texts or whole numbers"),
        ({"classes": 1.5}, "classes is not a list of texts or whole numbers"),
        ({"min_score": 2}, "min_score is not a number from 0 to 1"),
        ({"min_area": -1}, "min_area is not a number of 0 or more"),
        ({"min_area": float("inf")}, "min_area is not a number of 0 or more"),
        ({"region": [0, 0, 1]}, "region is not left, top, right, bottom"),
        ({"region": [5, 0, 1, 2]}, "region is not left, top, right, bottom"),
        ({"region": "left"}, "region is not a list of numbers"),
        ({"region": [0, 0, float("nan"), 1]}, "region is not left, top, right, bottom"),
    ],
)
def test_filters_that_cannot_be_are_named_before_a_run(filters, message):
    with pytest.raises(ConfigError, match=rf"postprocess\.{message}"):
        parameters_for(DETECTION, filters)


def test_a_command_can_set_lists():
    assignments = ["postprocess.classes=[cat, 1]", "postprocess.region=[0, 0, 0.5, 1]"]
    settings = load_config("local", **parse_assignments(assignments)).postprocess
    assert settings == {"classes": ["cat", 1], "region": [0, 0, 0.5, 1]}
    assert labels(**settings) == ["cat", "dog"]
