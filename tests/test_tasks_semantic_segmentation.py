import tracemalloc

import numpy as np
import pytest
import torch
from manifests import make_manifest
from pycocotools import mask as coco
from torch.nn.functional import interpolate

from helpers.errors import BundleError, ConfigError
from helpers.images import rle
from helpers.images.enlargement import enlarge, nearest
from helpers.images.geometry import place
from helpers.tasks import DECODERS, OutputError, parameters_for, predict, suggest
from helpers.tasks.classification import softmax
from helpers.tasks.semantic_segmentation import STRIP_VALUES

TASK = "semantic_segmentation"
LABELS = ("road", "car", "sky")
SIZE = (200, 150)


def smooth(classes: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    coarse = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (1, classes, 4, 5)).astype(np.float32))
    return interpolate(coarse, (rows, columns), mode="bicubic")[0].numpy()


@pytest.mark.parametrize("grid", [(8, 12), (64, 96), (200, 300)])
@pytest.mark.parametrize("size", [(200, 150), (96, 64), (13, 9), (1, 1)])
def test_a_grid_is_enlarged_as_torch_enlarges_it(grid, size):
    values = np.random.default_rng(0).normal(0, 1, (3, *grid)).astype(np.float32)
    placement = place(make_manifest(TASK).input, size)
    expected = interpolate(torch.from_numpy(values)[None], size[::-1], mode="bilinear", align_corners=False)[0]
    np.testing.assert_allclose(enlarge(values, placement, (0, 0, *size)), expected, atol=1e-4)
    left, top, right, bottom = window = size[0] // 3, size[1] // 4, size[0], size[1] // 2 + 1
    part = enlarge(values, placement, window)
    np.testing.assert_allclose(part, expected[:, top:bottom, left:right], atol=1e-4)


def test_the_nearest_cells_are_those_of_torch():
    values = np.random.default_rng(0).integers(0, 9, (32, 48)).astype(np.float32)
    placement = place(make_manifest(TASK).input, SIZE)
    expected = interpolate(torch.from_numpy(values)[None, None], SIZE[::-1], mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(nearest(values, placement, (0, 0, *SIZE)), expected)


@pytest.mark.parametrize("channels", ["first", "last"])
@pytest.mark.parametrize("background", [-1, 0, 1])
def test_each_class_of_an_image_has_its_mask_and_the_mean_of_its_probabilities(channels, background):
    logits = smooth(3, 32, 48)
    manifest = make_manifest(TASK, labels=LABELS)
    outputs = {"scores": (logits if channels == "first" else np.moveaxis(logits, 0, -1))[None]}
    (found,) = predict(outputs, [SIZE], manifest, {"background": background})
    enlarged = interpolate(torch.from_numpy(logits)[None], SIZE[::-1], mode="bilinear")[0].softmax(dim=0)
    scores, classes = (values.numpy() for values in enlarged.max(dim=0))
    present = [c for c in np.argsort(-np.bincount(classes.ravel())).tolist() if c != background]
    assert [p["class_id"] for p in found] == present and len(present) >= 2
    for p in found:
        mask = classes == p["class_id"]
        assert coco.iou([p["mask"]], [rle.encode(mask)], [0])[0, 0] > 0.999
        assert p["score"] == pytest.approx(scores[mask].mean(), abs=1e-3)
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(list(p["box"].values()), box, atol=1)
        assert p["label"] == LABELS[p["class_id"]] and p["keypoints"] is None


@pytest.mark.parametrize("settings", [{}, {"background": 0}, {"background": 3}])
def test_a_class_more_than_labels_is_the_background(settings):
    logits = smooth(4, 16, 24, seed=1)
    place_of_background = settings.get("background", 0)
    (found,) = predict({"scores": logits[None]}, [(24, 16)], make_manifest(TASK, labels=LABELS), settings)
    present = set(enlarge(logits, place(make_manifest(TASK).input, (24, 16)), (0, 0, 24, 16)).argmax(axis=0).ravel())
    foreground = [c for c in range(4) if c != place_of_background]
    assert {p["class_id"] for p in found} == {i for i, c in enumerate(foreground) if c in present}


@pytest.mark.parametrize("resize", ["letterbox", "crop"])
def test_masks_lie_where_the_image_shows_the_class_whatever_the_resize_rule(resize):
    manifest = make_manifest(TASK, labels=LABELS, height=64, width=64, resize=resize)
    placement = place(manifest.input, SIZE)
    centers = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).astype(np.float32)
    x, y = np.moveaxis(placement.to_image(centers), -1, 0)
    logits = np.stack([0 * x, (60 - np.hypot(x - 110, y - 70)) / 5, -9 + 0 * x]).astype(np.float32)
    (found,) = predict({"scores": logits[None]}, [SIZE], manifest, {"background": 0})
    columns, rows = np.meshgrid(np.arange(SIZE[0]) + 0.5, np.arange(SIZE[1]) + 0.5)
    expected = np.hypot(columns - 110, rows - 70) < 60
    assert [p["label"] for p in found] == ["car"]
    assert coco.iou([found[0]["mask"]], [rle.encode(expected)], [0])[0, 0] > 0.98
    everywhere = predict({"scores": logits[None]}, [SIZE], manifest, {})[0]
    shown = sum(int(coco.area(p["mask"])) for p in everywhere)
    assert shown == (SIZE[0] * SIZE[1] if resize == "letterbox" else 150 * 150)  # crop cuts the sides off


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_single_class_is_where_it_is_more_probable_than_not(activation):
    logits = np.where(np.arange(96) < 30, 2.0, -3.0).astype(np.float32) * np.ones((1, 1, 64, 1), np.float32)
    manifest = make_manifest(TASK, labels=("crack",))
    (found,) = predict({"scores": logits}, [(96, 64)], manifest, {"activation": activation})
    assert [list(p["box"].values()) for p in found] == [[0, 0, 30, 64]]
    assert found[0]["score"] == pytest.approx(1 / (1 + np.exp(-2)))
    assert predict({"scores": logits - 9}, [(96, 64)], manifest, {}) == [[]]
    (same,) = predict({"scores": 1 / (1 + np.exp(-logits))}, [(96, 64)], manifest, {"activation": "none"})
    assert same[0]["mask"] == found[0]["mask"]


@pytest.mark.parametrize("shape", [(64, 96), (1, 64, 96), (64, 96, 1)])
@pytest.mark.parametrize("background", [-1, 0])
def test_a_map_of_classes_is_one_prediction_per_class(shape, background):
    grid = np.zeros((64, 96), np.float32)
    grid[10:30, 20:50], grid[40:, 60:], grid[:5] = 1, 2, 255
    manifest = make_manifest(TASK, "class_map", labels=LABELS)
    (found,) = predict({"classes": grid.reshape(1, *shape)}, [(192, 128)], manifest, {"background": background})
    boxes = {p["label"]: list(p["box"].values()) for p in found}
    first = 0 if background < 0 else -1
    expected = {LABELS[1 + first]: [40, 20, 100, 60], LABELS[2 + first]: [120, 80, 192, 128]}
    assert boxes == ({LABELS[0]: [0, 10, 192, 128]} if background < 0 else {}) | expected
    assert all(p["score"] == 1 for p in found)


def test_a_map_with_a_class_beyond_the_labels_says_so():
    manifest = make_manifest(TASK, "class_map", labels=LABELS)
    with pytest.raises(OutputError, match="class 7.*3 labels"):
        predict({"classes": np.full((1, 8, 8), 7.0)}, [SIZE], manifest, {})


def test_classes_of_few_pixels_are_left_out():
    grid = np.zeros((1, 64, 96), np.float32)
    grid[0, 0, :5] = 1
    manifest = make_manifest(TASK, "class_map", labels=LABELS)
    for least, count in ((5, 2), (6, 1)):
        assert len(predict({"classes": grid}, [(96, 64)], manifest, {"min_pixels": least})[0]) == count


def test_a_large_image_takes_memory_by_strips():
    size, classes = (3000, 2000), 20
    logits = smooth(classes, 32, 48)
    manifest = make_manifest(TASK, labels=[str(i) for i in range(classes)])
    tracemalloc.start()
    (found,) = predict({"scores": logits[None]}, [size], manifest, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(int(coco.area(p["mask"])) for p in found) == size[0] * size[1]
    assert peak < 10 * 4 * STRIP_VALUES + 6 * size[0] * size[1] < 4 * classes * size[0] * size[1] / 4


def test_outputs_are_told_apart_by_shape_and_range():
    assert suggest(TASK, {"out": smooth(3, 16, 24)[None]}, 3) == "logits"
    assert suggest(TASK, {"out": np.ones((1, 16, 24))}, 3) == "class_map"
    assert suggest(TASK, {"out": np.ones((1, 1, 16, 24))}, 3) == "class_map"


def test_probabilities_are_told_by_their_range():
    decoder, logits = DECODERS[TASK]["logits"], smooth(3, 16, 24)[None]
    assert decoder.suggest_parameters({"scores": logits}, 3) == {}
    assert decoder.suggest_parameters({"scores": softmax(logits)}, 3) == {"activation": "none"}


def test_probabilities_that_do_not_exclude_each_other_leave_pixels_without_a_class():
    scores = np.full((3, 16, 24), 0.1, np.float32)
    scores[1, :8], scores[2, :8] = 0.8, 0.7
    parameters = DECODERS[TASK]["logits"].suggest_parameters({"scores": scores[None]}, 3)
    assert parameters == {"activation": "independent"}
    manifest = make_manifest(TASK, labels=LABELS, postprocess=parameters)
    (found,) = predict({"scores": scores[None]}, [(24, 16)], manifest, parameters)
    assert [(p["label"], round(p["score"], 4)) for p in found] == [("car", 0.8)]
    assert found[0]["box"] == {"x1": 0, "y1": 0, "x2": 24, "y2": 8}


def test_scores_must_fit_the_labels():
    for shape in ((3, 16, 24), (4, 16, 24), (16, 24, 3)):
        assert parameters_for(make_manifest(TASK, labels=LABELS, outputs={"scores": shape}), {}) == {}
    with pytest.raises(BundleError, match=r"its output scores is \[5, 16, 24\], and 3 labels need scores"):
        parameters_for(make_manifest(TASK, labels=LABELS, outputs={"scores": (5, 16, 24)}), {})
    with pytest.raises(ConfigError, match=r"postprocess\.background is not a whole number of -1 or more"):
        parameters_for(make_manifest(TASK, labels=LABELS, outputs={"scores": (3, 9, 9)}), {"background": -2})
