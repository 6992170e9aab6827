import numpy as np
import pytest
from manifests import make_manifest

from helpers.errors import ConfigError
from helpers.images.drawing import draw
from helpers.images.geometry import place
from helpers.tasks import DECODERS, OutputError, parameters_for, predict, suggest

TASK = "keypoints"
SIZE = (480, 640)
BOXES = np.array([[100, 120, 220, 420], [250, 80, 400, 600]], np.float32)
POINTS = np.array([[[110, 130], [150, 200], [200, 400]], [[260, 90], [300, 300], [390, 590]]], np.float32)
SCORES = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]], np.float32)
RULES = [{"resize": "stretch"}, {"resize": "letterbox"}, {"resize": "crop"}, {"resize": "shortest_edge"}]
each_fixed_rule = pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: rule["resize"])
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["resize"])


def manifest_of(decoder, **rule):
    return make_manifest(TASK, decoder, labels=("person",), height=128, width=160, **rule)


def to_input(manifest, points: np.ndarray) -> np.ndarray:
    placement = place(manifest.input, SIZE)
    pairs = points.reshape(-1, 2) * np.divide(placement.resized, SIZE) + placement.offset
    return pairs.reshape(points.shape).astype(np.float32)


def points_of(prediction) -> np.ndarray:
    return np.array([[point["x"], point["y"], point["score"]] for point in prediction["keypoints"]])


def assert_people(found, scores=SCORES, tolerance=0.01) -> None:
    assert [p["label"] for p in found] == ["person", "person"]
    for p, box, points, own in zip(found, BOXES, POINTS, scores, strict=True):
        np.testing.assert_allclose(list(p["box"].values()), box, atol=tolerance)
        np.testing.assert_allclose(points_of(p)[:, :2], points, atol=tolerance)
        np.testing.assert_allclose(points_of(p)[:, 2], own, rtol=1e-5)
        assert p["mask"] is None


@each_rule
@pytest.mark.parametrize("kind", ["with scores", "without scores", "scores apart"])
def test_points_of_an_end_to_end_network_are_in_pixels_of_the_image(rule, kind):
    manifest = manifest_of("end_to_end", **rule)
    points = to_input(manifest, POINTS)
    outputs = {"boxes": to_input(manifest, BOXES), "scores": np.array([0.9, 0.8]), "classes": np.zeros(2)}
    outputs["keypoints"] = np.concatenate([points, SCORES[..., None]], axis=2) if kind == "with scores" else points
    if kind == "scores apart":
        outputs["keypoint_scores"] = SCORES
        del outputs["classes"]
    (found,) = predict({name: values[None] for name, values in outputs.items()}, [SIZE], manifest, {})
    assert_people(found, np.ones_like(SCORES) if kind == "without scores" else SCORES)


def test_relative_points_of_the_other_order_can_be_said():
    manifest = manifest_of("end_to_end")
    outputs = {
        "boxes": to_input(manifest, BOXES)[None, :, [1, 0, 3, 2]] / [128, 160, 128, 160],
        "scores": np.array([[0.9, 0.8]]),
        "keypoints": to_input(manifest, POINTS)[None, ..., ::-1] / [128, 160],
        "keypoint_scores": SCORES[None],
    }
    settings = {"box_format": "yxyx", "relative": True, "order": "yx"}
    assert_people(predict(outputs, [SIZE], manifest, settings)[0])


@each_rule
@pytest.mark.parametrize(("objectness", "transposed"), [(False, False), (False, True), (True, True)])
def test_yolos_poses_are_in_pixels_of_the_image(rule, objectness, transposed):
    manifest = manifest_of("yolo", **rule)
    boxes, points = to_input(manifest, BOXES), to_input(manifest, POINTS)
    table = np.zeros((4 + objectness + 1 + 9, 100), np.float32)
    for person in range(2):
        for copy in range(2):
            column = 20 * copy + person
            low, high = boxes[person, :2], boxes[person, 2:]
            table[:4, column] = *(low + high) / 2, *(high - low)
            table[4 : 5 + objectness, column] = 0.9 - 0.1 * person - 0.2 * copy
            own = np.concatenate([points[person] + copy, SCORES[person][:, None]], axis=1)
            table[5 + objectness :, column] = own.ravel()
    (found,) = predict({"predictions": (table.T if transposed else table)[None]}, [SIZE], manifest, {})
    assert_people(found)


@each_rule
def test_regressed_points_are_one_person(rule):
    manifest = manifest_of("points", **rule)
    points = to_input(manifest, POINTS[0]) / place(manifest.input, SIZE).input
    values = np.concatenate([points[:, ::-1], SCORES[0][:, None]], axis=1).astype(np.float32)
    for shape in ((1, 3, 3), (1, 1, 3, 3)):
        (found,) = predict({"points": values.reshape(shape)}, [SIZE], manifest, {})
        np.testing.assert_allclose(points_of(found[0])[:, :2], POINTS[0], atol=0.01)
        assert list(found[0]["box"].values()) == pytest.approx([110, 130, 200, 400], abs=0.01)
        assert found[0]["score"] == pytest.approx(0.8)
    assert predict({"points": values[None]}, [SIZE], manifest, {"score_threshold": 0.85}) == [[]]


@each_fixed_rule
def test_maxima_of_heat_maps_are_one_person(rule):
    manifest = manifest_of("heatmap", **rule)
    cells = to_input(manifest, POINTS[0]) / 4  # 32 x 40 cells
    x, y = np.meshgrid(np.arange(40) + 0.5, np.arange(32) + 0.5)
    maps = np.stack(
        [s * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 8) for (cx, cy), s in zip(cells, SCORES[0], strict=True)]
    )
    (found,) = predict({"heatmap": maps[None].astype(np.float32)}, [SIZE], manifest, {})
    placement = place(manifest.input, SIZE)
    half = 4 / 2 * np.divide(SIZE, placement.resized)  # of a cell, in pixels of the image
    assert (abs(points_of(found[0])[:, :2] - POINTS[0]) <= half).all()
    np.testing.assert_allclose(points_of(found[0])[:, 2], SCORES[0], atol=0.05)


def center_maps(manifest) -> dict[str, np.ndarray]:
    """What CenterFace would give: centers at a quarter of the input."""
    shapes = {"heatmap": 1, "sizes": 2, "offsets": 2, "landmarks": 6}
    maps = {name: np.zeros((count, 32, 40), np.float32) for name, count in shapes.items()}
    for box, points, score in zip(to_input(manifest, BOXES), to_input(manifest, POINTS), (0.9, 0.8), strict=True):
        center, sides = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        for step in (0, 1):  # its right neighbor sees the same object
            column, row = int(center[0] / 4) + step, int(center[1] / 4)
            maps["heatmap"][0, row, column] = score - 0.1 * step
            maps["sizes"][:, row, column] = np.log(sides / 4)[::-1]
            maps["offsets"][:, row, column] = (center / 4 - 0.5 - (column, row))[::-1]
            maps["landmarks"][:, row, column] = ((points - box[:2]) / sides)[:, ::-1].ravel()
    return {name: values[None] for name, values in maps.items()}


@each_fixed_rule
def test_centers_on_a_map_are_objects_with_landmarks(rule):
    manifest = manifest_of("centernet", **rule)
    (found,) = predict(center_maps(manifest), [SIZE], manifest, {})
    assert_people(found, np.broadcast_to([[0.9], [0.8]], (2, 3)), tolerance=0.05)


def test_sizes_and_landmarks_may_be_cells():
    manifest = manifest_of("centernet")
    maps = center_maps(manifest)
    rows, columns = np.nonzero(maps["heatmap"][0, 0])
    sizes, offsets = (maps[role][0, ::-1, rows, columns] for role in ("sizes", "offsets"))
    landmarks = maps["landmarks"][0][:, rows, columns].T.reshape(-1, 3, 2)[..., ::-1]
    cells = np.exp(sizes)
    corner = offsets + 0.5 - cells / 2  # from the cell's own corner
    maps["sizes"][0][:, rows, columns] = cells.T
    maps["offsets"][0][:, rows, columns] = (offsets + 0.5).T
    maps["landmarks"][0][:, rows, columns] = (corner[:, None] + landmarks * cells[:, None]).reshape(-1, 6).T
    settings = {"sizes": "cells", "landmarks": "center", "order": "xy", "center": 0}
    (found,) = predict(maps, [SIZE], manifest, settings)
    assert_people(found, np.broadcast_to([[0.9], [0.8]], (2, 3)), tolerance=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0])
def test_a_damaged_networks_numbers_give_points_within_the_image_or_none(value):
    shapes = {
        "end_to_end": {"boxes": (5, 4), "scores": (5,), "keypoints": (5, 3, 3)},
        "yolo": {"predictions": (14, 100)},
        "points": {"points": (3, 3)},
        "ssd": {"offsets": (5, 10), "scores": (5, 1)},
        "anchor_free": {"scores": (420, 1), "distances": (420, 4), "landmarks": (420, 6)},
        "simcc": {"simcc_x": (3, 320), "simcc_y": (3, 256)},
        "heatmap": {"heatmap": (3, 8, 8)},
        "centernet": {"heatmap": (1, 8, 8), "sizes": (2, 8, 8), "offsets": (2, 8, 8), "landmarks": (6, 8, 8)},
    }
    assert set(shapes) == set(DECODERS[TASK])
    for decoder, own in shapes.items():
        outputs = {name: np.full((1, *shape), value, np.float32) for name, shape in own.items()}
        with np.errstate(all="ignore"):
            (found,) = predict(outputs, [SIZE], manifest_of(decoder), {}, {"priors.npy": np.full((5, 4), 0.5)})
        for p in found:
            points = points_of(p)[:, :2]
            assert (points >= 0).all() and (points <= SIZE).all()


def test_outputs_are_told_apart_by_shape_and_range():
    generator = np.random.default_rng(0)
    maps = {name: generator.normal(0, 3, (1, count, 32, 40)) for name, count in (("a", 2), ("b", 10))}
    maps |= {"c": generator.random((1, 1, 32, 40)), "d": generator.random((1, 2, 32, 40)) - 0.5}
    assert suggest(TASK, maps, 1) == "centernet"
    roles = {"heatmap": "c", "sizes": "a", "offsets": "d", "landmarks": "b"}
    assert DECODERS[TASK]["centernet"].assign_roles(maps, 1) == roles
    assert suggest(TASK, {"x": generator.random((1, 1, 17, 3))}, 1) == "points"
    assert suggest(TASK, {"x": generator.random((1, 17, 64, 48))}, 1) == "heatmap"
    assert suggest(TASK, {"x": generator.random((1, 56, 8400))}, 1) == "yolo"
    rcnn = {"b": generator.random((1, 5, 4)) * 9, "s": generator.random((1, 5)), "l": np.ones((1, 5))}
    rcnn |= {"k": generator.random((1, 5, 17, 3)) * 9, "ks": generator.normal(0, 3, (1, 5, 17))}
    assert suggest(TASK, rcnn, 1) == "end_to_end"
    expected = {"boxes": "b", "scores": "s", "classes": "l", "keypoints": "k", "keypoint_scores": "ks"}
    assert DECODERS[TASK]["end_to_end"].assign_roles(rcnn, 1) == expected


def test_points_in_pixels_are_told_by_their_values():
    decoder, shares = DECODERS[TASK]["points"], np.random.default_rng(0).random((1, 17, 3))
    assert decoder.suggest_parameters({"points": shares}, 1) == {}
    assert decoder.suggest_parameters({"points": shares * [128, 128, 1]}, 1) == {"relative": False, "order": "xy"}


WALK = np.cumsum(np.random.default_rng(0).normal(0, 2, (21, 3)), axis=0).astype(np.float32) + 40  # points of a line


@pytest.mark.parametrize(
    ("points", "parameters"),
    [
        (WALK[:, :2], {"relative": False, "order": "xy"}),
        (WALK, {"relative": False, "order": "xy", "third": "other"}),
        (WALK[:, :2].ravel(), {"relative": False, "order": "xy", "numbers": 2}),
        (WALK.ravel(), {"relative": False, "order": "xy", "numbers": 3, "third": "other"}),
        ((WALK[:, :2] / (160, 128)).ravel(), {"order": "xy", "numbers": 2}),
    ],
    ids=["x, y", "x, y, depth", "a row of x, y", "a row of x, y, depth", "a row of relative x, y"],
)
def test_what_a_points_numbers_are_is_told_by_their_values(points, parameters):
    assert suggest(TASK, {"x": points[None]}, 1) == "points"
    told = DECODERS[TASK]["points"].suggest_parameters({"points": points[None]}, 1)
    assert told == parameters
    (found,) = predict({"points": points[None]}, [(160, 128)], manifest_of("points"), told)
    np.testing.assert_allclose(points_of(found[0])[:, :2], WALK[:, :2], rtol=1e-4)
    assert found[0]["score"] == 1


def test_scores_of_points_or_of_all_may_be_another_output():
    manifest, settings = manifest_of("points"), {"relative": False, "order": "xy", "third": "other"}
    for scores, expected in ((np.full((1, 21, 1), 0.25), 0.25), (np.array([[0.75]]), 0.75)):
        (found,) = predict({"points": WALK[None], "scores": scores}, [(96, 64)], manifest, settings)
        assert found[0]["score"] == pytest.approx(expected)
    logits = {"points": WALK[None], "scores": np.array([[-5.0]])}
    assert DECODERS[TASK]["points"].suggest_parameters(logits, 1) == {**settings, "activation": "sigmoid"}
    assert predict(logits, [(96, 64)], manifest, {**settings, "activation": "sigmoid"}) == [[]]
    assert DECODERS[TASK]["points"].assign_roles({"a": WALK[None], "b": np.ones((1, 1))}, 1) == {
        "points": "a",
        "scores": "b",
    }


@each_fixed_rule
def test_points_are_where_the_bins_of_either_axis_are_largest(rule):
    manifest = manifest_of("simcc", **rule)
    points = to_input(manifest, POINTS[0])
    outputs = {"simcc_x": np.zeros((1, 3, 320), np.float32), "simcc_y": np.zeros((1, 3, 256), np.float32)}
    for n, (point, score) in enumerate(zip(points, SCORES[0], strict=True)):
        for values, place_of in zip(outputs.values(), np.rint(2 * point).astype(int), strict=True):
            values[0, n, place_of] = score
    assert suggest(TASK, {f"net.{name}": values for name, values in outputs.items()}, 1) == "simcc"
    (found,) = predict(outputs, [SIZE], manifest, {})
    np.testing.assert_allclose(points_of(found[0])[:, :2], POINTS[0], atol=1)
    np.testing.assert_allclose(points_of(found[0])[:, 2], SCORES[0])
    with pytest.raises(OutputError, match="simcc_x has 256 bins, and the input 160 pixels"):
        predict({"simcc_x": outputs["simcc_y"], "simcc_y": outputs["simcc_x"]}, [SIZE], manifest, {})


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("sizes", ["log", "linear"])
def test_points_may_be_offsets_from_anchors_as_boxes_are(together, sizes):
    anchors = np.float32([[0.5, 0.5, 0.25, 0.5], [0.25, 0.25, 0.5, 0.5]])
    growth = np.log(2) / 0.2 if sizes == "log" else 2 / 0.2
    offsets = np.float32([[1, 0, growth, growth], [0, 0, 1, 1]])
    landmarks = np.float32([[0, 0, 2, -1], [0, 0, 0, 0]])
    outputs = {"offsets": offsets, "landmarks": landmarks}
    outputs = {"offsets": np.concatenate([offsets, landmarks], axis=1)} if together else outputs
    outputs = {name: values[None] for name, values in outputs.items()} | {"scores": np.float32([[[9], [-9]]])}
    assert suggest(TASK, outputs, 1) == "ssd"
    manifest = manifest_of("ssd")  # whose input is 96 x 64
    settings = {"activation": "sigmoid", "sizes": sizes}
    (found,) = predict(outputs, [(96, 64)], manifest, settings, {"priors.npy": anchors})
    assert len(found) == 1
    np.testing.assert_allclose(list(found[0]["box"].values()), [26.4, 0, 74.4, 64], rtol=1e-4)
    np.testing.assert_allclose(points_of(found[0])[:, :2], [[48, 32], [52.8, 28.8]], rtol=1e-4)


def test_parameters_that_cannot_be_are_named():
    manifest = make_manifest(TASK, "points", outputs={"points": (17, 3)})
    with pytest.raises(ConfigError, match=r"postprocess\.order is not one of xy, yx"):
        parameters_for(manifest, {"order": "zx"})


def test_points_are_drawn_in_the_color_of_their_class():
    manifest = manifest_of("centernet")
    (found,) = predict(center_maps(manifest), [SIZE], manifest, {})
    image = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    drawn = draw(image, found)
    without = draw(image, [{**p, "keypoints": None} for p in found])
    for x, y in POINTS.reshape(-1, 2).astype(int).tolist():
        assert drawn[y, x].any()
    assert (drawn != without).any()
