import numpy as np
import pytest
import torch
from manifests import LABELS, make_manifest
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.ssd import SSD
from torchvision.ops import batched_nms, nms

from helpers.errors import BundleError, ConfigError
from helpers.images.geometry import place
from helpers.tasks import DECODERS, OutputError, parameters_for, predict, suggest
from helpers.tasks.boxes import suppress
from helpers.tasks.classification import softmax

SIZE = (480, 640)
SCENE = [  # class, score, box in pixels of the image
    (1, 0.9, (40.0, 60.0, 200.0, 300.0)),
    (0, 0.8, (300.0, 200.0, 460.0, 620.0)),
    (2, 0.7, (45.0, 65.0, 205.0, 305.0)),  # where the first is, but of another class
]
RULES = [
    {"resize": "stretch"},
    {"resize": "letterbox"},
    {"resize": "letterbox", "position": "top_left"},
    {"resize": "crop"},
    {"resize": "shortest_edge"},
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
DETECTION = DECODERS["detection"]


def in_input(manifest, size=SIZE, scene=SCENE) -> np.ndarray:
    """The scene's boxes as a network sees them: corners in pixels of its input."""
    placement = place(manifest.input, size)
    scale = np.tile(np.divide(placement.resized, size), 2)
    return (np.array([box for *_, box in scene]) * scale + np.tile(placement.offset, 2)).astype(np.float32)


def centers(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def assert_scene(predictions, scene=SCENE, tolerance=0.01) -> None:
    assert [p["class_id"] for p in predictions] == [class_id for class_id, *_ in scene]
    np.testing.assert_allclose([p["score"] for p in predictions], [score for _, score, _ in scene], rtol=1e-5)
    boxes = [list(p["box"].values()) for p in predictions]
    np.testing.assert_allclose(boxes, [box for *_, box in scene], atol=tolerance)
    for p in predictions:
        assert list(p) == ["class_id", "label", "score", "box", "mask", "keypoints"]
        assert p["label"] == LABELS[p["class_id"]] and p["mask"] is None and p["keypoints"] is None


CLASSES = np.array([[class_id for class_id, *_ in SCENE]], np.float32)
SCORES = np.array([[score for _, score, _ in SCENE]], np.float32)


@each_rule
def test_boxes_of_an_end_to_end_network_are_in_pixels_of_the_image(rule):
    manifest = make_manifest("detection", **rule)
    outputs = {"boxes": in_input(manifest)[None], "scores": SCORES, "classes": CLASSES}
    (found,) = predict(outputs, [SIZE], manifest, {})
    assert_scene(found)


@pytest.mark.parametrize("box_format", ["xyxy", "yxyx", "xywh", "cxcywh"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("first_class", [0, 1])
def test_every_format_of_boxes_and_classes_can_be_said(box_format, relative, first_class):
    manifest = make_manifest("detection")
    boxes = in_input(manifest)
    low, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    written = {
        "xyxy": boxes,
        "yxyx": boxes[:, [1, 0, 3, 2]],
        "xywh": np.concatenate([low, sides], 1),
        "cxcywh": np.concatenate([low + sides / 2, sides], 1),
    }[box_format]
    if relative:
        written = written / np.array([64, 96] * 2 if box_format == "yxyx" else [96, 64] * 2)
    outputs = {"boxes": written[None], "scores": SCORES, "classes": CLASSES + first_class}
    settings = {"box_format": box_format, "relative": relative, "first_class": first_class}
    assert_scene(predict(outputs, [SIZE], manifest, settings)[0])


def test_one_table_of_boxes_scores_and_classes_is_enough():
    manifest = make_manifest("detection")
    rows = np.concatenate([in_input(manifest), SCORES.T, CLASSES.T], axis=1)
    assert_scene(predict({"detections": rows[None]}, [SIZE], manifest, {})[0])


def test_the_list_of_openvinos_detection_output_ends_at_an_image_below_zero():
    manifest = make_manifest("detection")
    relative = in_input(manifest) / [96, 64, 96, 64]
    rows = np.concatenate([np.zeros((3, 1)), CLASSES.T, SCORES.T, relative], axis=1)
    end = np.array([[-1, 0, 0, 0, 0, 0, 0], [0, 1, 0.99, 0, 0, 1, 1]])
    outputs = {"detections": np.concatenate([rows, end])[None, None].astype(np.float32)}
    assert_scene(predict(outputs, [SIZE], manifest, {})[0])


def test_a_table_of_other_columns_than_said_is_named():
    manifest = make_manifest("detection")
    with pytest.raises(OutputError, match=r"have 6 columns, and not 'image box score class': mend postprocess.columns"):
        predict({"detections": np.ones((1, 3, 6))}, [SIZE], manifest, {"columns": "image box score class"})


def test_boxes_may_hold_their_scores():
    manifest = make_manifest("detection")
    boxes = np.concatenate([in_input(manifest), SCORES.T], axis=1)
    assert_scene(predict({"boxes": boxes[None], "classes": CLASSES}, [SIZE], manifest, {})[0])


def test_rows_beyond_the_count_do_not_count():
    manifest = make_manifest("detection")
    outputs = {"boxes": in_input(manifest)[None], "scores": SCORES, "classes": CLASSES}
    (found,) = predict({**outputs, "count": np.array([2.0])}, [SIZE], manifest, {})
    assert_scene(found, SCENE[:2])
    assert predict({**outputs, "count": np.array([[0.0]])}, [SIZE], manifest, {}) == [[]]


def test_a_class_without_a_label_says_what_to_mend():
    manifest = make_manifest("detection")
    outputs = {"boxes": in_input(manifest)[None], "scores": SCORES, "classes": CLASSES + 1}
    with pytest.raises(OutputError, match=r"class 3.*3 labels.*postprocess\.first_class"):
        predict(outputs, [SIZE], manifest, {})


def test_boxes_are_clipped_to_the_image_and_those_outside_of_it_are_left_out():
    manifest = make_manifest("detection", resize="letterbox", width=64)
    boxes = np.array([[-5, 10, 30, 20], [0, 0, 3, 20], [50, 50, 40, 60], [60, -9, 99, 99], [np.nan, 1, 2, 3]])
    outputs = {"boxes": boxes[None].astype(np.float32), "scores": np.full((1, 5), 0.5), "classes": np.zeros((1, 5))}
    (found,) = predict(outputs, [SIZE], manifest, {})  # 48 of 64 pixels show the image, from the 8th on
    assert [list(p["box"].values()) for p in found] == [[0, 100, 220, 200]]


@pytest.mark.parametrize("decoder", DETECTION)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 0])
def test_a_damaged_networks_numbers_give_no_detection_that_is_no_box(decoder, value):
    shapes = {
        "end_to_end": {"boxes": (5, 4), "scores": (5,), "classes": (5,)},
        "candidates": {"boxes": (5, 4), "scores": (5, 3)},
        "ssd": {"offsets": (5, 4), "scores": (5, 4)},
        "yolo": {"predictions": (7, 20)},
        "detr": {"logits": (5, 4), "boxes": (5, 4)},
        "anchor_free": {"scores": (126, 3), "distances": (126, 4)},
        "centernet": {"heatmap": (3, 8, 8), "sizes": (2, 8, 8), "offsets": (2, 8, 8)},
    }[decoder]
    outputs = {name: np.full((1, *shape), value, np.float32) for name, shape in shapes.items()}
    if decoder == "end_to_end":
        outputs["classes"] = np.zeros((1, 5), np.float32)
    manifest = make_manifest("detection", decoder, outputs=shapes)
    arrays = {"priors.npy": np.full((5, 4), 0.5, np.float32)}
    with np.errstate(all="ignore"):
        (found,) = predict(outputs, [SIZE], manifest, parameters_for(manifest, {}), arrays)
    for p in found:
        x1, y1, x2, y2 = p["box"].values()
        assert 0 <= x1 < x2 <= SIZE[0] and 0 <= y1 < y2 <= SIZE[1] and np.isfinite(p["score"])
    assert not (np.isnan(value) and found)


def test_suppression_is_that_of_torchvision():
    generator = np.random.default_rng(0)
    corners = generator.random((800, 2)) * 100
    boxes = np.concatenate([corners, corners + generator.random((800, 2)) * 60], axis=1).astype(np.float32)
    scores, classes = generator.random(800).astype(np.float32), generator.integers(0, 5, 800)
    tensors = torch.from_numpy(boxes), torch.from_numpy(scores)
    for threshold in (0.3, 0.5, 0.7):
        assert suppress(boxes, scores, threshold).tolist() == nms(*tensors, threshold).tolist()
        expected = batched_nms(*tensors, torch.from_numpy(classes), threshold).tolist()
        assert suppress(boxes, scores, threshold, classes).tolist() == expected


def yolo_table(manifest, objectness: bool = False, anchors: int = 200) -> np.ndarray:
    """The scene thrice in float32 `[4 + C, A]`, the copies less probable and a little aside."""
    table = np.zeros((8 if objectness else 7, anchors), np.float32)
    for copy in range(3):
        for i, ((class_id, score, _), box) in enumerate(zip(SCENE, in_input(manifest), strict=True)):
            column = 10 * copy + 3 * i
            table[:4, column] = centers(box[None] + copy * 0.2)[0]
            table[4 + objectness + class_id, column] = score - copy * 0.1
            if objectness:
                table[4, column], table[5:, column] = 0.5, table[5:, column] * 2
    return table


@each_rule
@pytest.mark.parametrize(("objectness", "transposed"), [(False, False), (False, True), (True, True)])
def test_yolos_candidates_become_one_detection_per_object(rule, objectness, transposed):
    manifest = make_manifest("detection", "yolo", **rule)
    table = yolo_table(manifest, objectness)
    (found,) = predict({"predictions": (table.T if transposed else table)[None]}, [SIZE], manifest, {})
    assert_scene(found)


def test_yolos_boxes_may_be_relative_to_the_input():
    manifest, table = make_manifest("detection", "yolo"), yolo_table(make_manifest("detection"))
    table[:4] /= np.float32([[96], [64], [96], [64]])
    assert told("yolo", predictions=table) == {"relative": True}
    assert_scene(predict({"predictions": table[None]}, [SIZE], manifest, {"relative": True})[0])


def test_classes_suppress_each_other_if_asked():
    manifest = make_manifest("detection", "yolo")
    outputs = {"predictions": yolo_table(manifest)[None]}
    assert_scene(predict(outputs, [SIZE], manifest, {"class_agnostic": True})[0], SCENE[:2])
    assert_scene(predict(outputs, [SIZE], manifest, {"score_threshold": 0.75})[0], SCENE[:2])
    assert_scene(predict(outputs, [SIZE], manifest, {"max_detections": 1})[0], SCENE[:1])


def test_raw_grids_are_decoded_as_yolox_defines_them():
    manifest = make_manifest("detection", "yolo")  # 64 x 96: grids of 8 x 12, 4 x 6, 2 x 3
    table = np.zeros((126, 8), np.float32)
    for row, (x, y, stride), (class_id, score, _), center in zip(
        (0 * 12 + 5, 96 + 2 * 6 + 4, 120 + 0 * 3 + 1),
        ((5, 0, 8), (4, 2, 16), (1, 0, 32)),
        SCENE,
        centers(in_input(manifest)),
        strict=True,
    ):
        table[row, :4] = *(center[:2] / stride - (x, y)), *np.log(center[2:] / stride)
        table[row, 4], table[row, 5 + class_id] = 1, score
    (found,) = predict({"predictions": table[None]}, [SIZE], manifest, {"grid": "strides"})
    assert_scene(found, tolerance=0.1)
    with pytest.raises(OutputError, match=r"an input of 96 x 64 have 125 cells: mend"):
        predict({"predictions": table[None, :125]}, [SIZE], manifest, {"grid": "strides"})


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_detrs_queries_are_detections_or_no_object(activation):
    manifest = make_manifest("detection", "detr", resize="letterbox")
    boxes = np.tile([[0.5, 0.5, 0.2, 0.2]], (10, 1)).astype(np.float32)
    boxes[2:5] = centers(in_input(manifest)) / [96, 64, 96, 64]
    scores = np.full((10, 4 if activation == "softmax" else 3), 1e-6)
    if activation == "softmax":
        scores[:, 3] = 1
    for query, (class_id, score, _) in zip(range(2, 5), SCENE, strict=True):
        scores[query, class_id] = score
        if activation == "softmax":
            scores[query, 3] = 1 - scores[query, :3].sum()
    logits = np.log(scores) if activation == "softmax" else np.log(scores / (1 - scores))
    outputs = {"logits": logits[None].astype(np.float32), "boxes": boxes[None]}
    assert_scene(predict(outputs, [SIZE], manifest, {"activation": activation})[0])


def ssd_outputs(seed: int = 0, anchors: int = 300):
    generator = np.random.default_rng(seed)
    priors = np.concatenate([generator.random((anchors, 2)), 0.1 + 0.3 * generator.random((anchors, 2))], axis=1)
    offsets = generator.normal(0, 1, (anchors, 4))
    return (
        priors.astype(np.float32),
        offsets.astype(np.float32),
        generator.normal(0, 2, (anchors, 4)).astype(np.float32),
    )


def torchvision_ssd(priors, offsets, logits, **settings):
    """torchvision's own post-processing, of a network that has none of its layers."""
    network = SSD.__new__(SSD)
    torch.nn.Module.__init__(network)
    network.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    for name, value in settings.items():
        setattr(network, name, value)
    width, height = 96, 64
    corners = np.concatenate([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2], axis=1)
    anchors = torch.from_numpy(corners) * torch.tensor([width, height, width, height])
    heads = {"bbox_regression": torch.from_numpy(offsets)[None], "cls_logits": torch.from_numpy(logits)[None]}
    (result,) = network.postprocess_detections(heads, [anchors], [(height, width)])
    return result


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_ssd_finds_what_torchvision_finds(order):
    priors, offsets, logits = ssd_outputs()
    settings = {"score_thresh": 0.1, "topk_candidates": 40, "nms_thresh": 0.4, "detections_per_img": 60}
    expected = torchvision_ssd(priors, offsets, logits, **settings)
    manifest = make_manifest("detection", "ssd", outputs={"offsets": (300, 4), "scores": (300, 4)})
    own = {"score_threshold": 0.1, "top_k": 40, "nms_threshold": 0.4, "max_detections": 60, "order": order}
    written = offsets[:, [1, 0, 3, 2]] if order == "yx" else offsets
    outputs = {"offsets": written[None], "scores": logits[None]}
    (found,) = predict(outputs, [(96, 64)], manifest, parameters_for(manifest, own), {"priors.npy": priors})
    assert len(found) == len(expected["scores"]) == 60
    np.testing.assert_allclose([p["score"] for p in found], expected["scores"], atol=1e-5)
    assert [p["class_id"] + 1 for p in found] == expected["labels"].tolist()
    np.testing.assert_allclose([list(p["box"].values()) for p in found], expected["boxes"], atol=1e-3)


def test_the_background_may_stand_first_or_last_or_nowhere():
    priors, offsets, logits = ssd_outputs()
    rolled = np.roll(logits, -1, axis=1)
    manifest = make_manifest("detection", "ssd")
    arrays = {"priors.npy": priors}

    def detect(scores, **settings):
        return predict({"offsets": offsets[None], "scores": scores[None]}, [(96, 64)], manifest, settings, arrays)

    scores = [p["score"] for p in detect(logits)[0]]
    assert len(scores) > 50
    assert [p["score"] for p in detect(rolled, background="last")[0]] == pytest.approx(scores)
    assert [p["score"] for p in detect(rolled)[0]][:50] != pytest.approx(scores[:50])
    foreground = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))[:, 1:]
    alone = detect(foreground, background="none", activation="none")
    assert [p["class_id"] for p in alone[0]] == [p["class_id"] for p in detect(logits)[0]]


def test_decoded_candidates_are_suppressed_within_each_class():
    manifest = make_manifest("detection", "candidates")
    boxes, scores = np.repeat(in_input(manifest), 3, axis=0), np.zeros((9, 3), np.float32)
    for row in range(9):
        class_id, score, _ = SCENE[row // 3]
        scores[row, class_id] = score - 0.1 * (row % 3)
    for own in (scores, scores.T):  # PP-YOLOE has a row per class
        outputs = {"boxes": boxes[None], "scores": own[None]}
        assert suggest("detection", outputs, 3) == "candidates"
        assert_scene(predict(outputs, [SIZE], manifest, {})[0])


def test_anchors_must_be_there_and_as_many_as_offsets():
    manifest = make_manifest("detection", "ssd")
    priors, offsets, logits = ssd_outputs()
    outputs = {"offsets": offsets[None], "scores": logits[None]}
    with pytest.raises(BundleError, match=r"no priors\.npy"):
        predict(outputs, [SIZE], manifest, {})
    with pytest.raises(BundleError, match=r"priors\.npy is \(299, 4\)"):
        predict(outputs, [SIZE], manifest, {}, {"priors.npy": priors[1:]})


BOXES = np.array([[[1, 2, 30, 40], [5, 6, 70, 80], [0, 0, 0, 0]]], np.float32)
SAMPLES = {
    "end_to_end": {
        "b": BOXES,
        "s": np.array([[0.9, 0.5, 0]], np.float32),
        "c": np.array([[2, 1, 0]], np.float32),
        "n": np.array([2.0], np.float32),
    },
    "yolo": {"y": np.random.default_rng(0).random((2, 7, 50), np.float32) * 90},
    "detr": {
        "l": np.random.default_rng(0).normal(0, 3, (1, 20, 4)),
        "b": np.random.default_rng(1).random((1, 20, 4)),
        "hidden": np.random.default_rng(1).normal(0, 3, (1, 20, 256)),
    },
    "ssd": {
        "loc": np.random.default_rng(0).normal(0, 2, (1, 50, 4)),
        "conf": np.random.default_rng(1).normal(0, 2, (1, 50, 3)),
    },
    "candidates": {"b": np.tile(BOXES, (1, 9, 1)), "s": np.random.default_rng(0).random((1, 27, 3))},
}
ROLES = {
    "end_to_end": {"boxes": "b", "scores": "s", "classes": "c", "count": "n"},
    "yolo": {"predictions": "y"},
    "detr": {"logits": "l", "boxes": "b"},
    "ssd": {"offsets": "loc", "scores": "conf"},
    "candidates": {"boxes": "b", "scores": "s"},
}


@pytest.mark.parametrize("decoder", ROLES)
def test_outputs_are_told_apart_by_shape_and_range(decoder):
    samples = dict(reversed(SAMPLES[decoder].items()))
    assert suggest("detection", samples, 3) == decoder
    assert DETECTION[decoder].assign_roles(samples, 3) == ROLES[decoder]


def test_scores_that_are_all_zero_are_told_by_their_neighbors_or_by_name():
    samples = {**SAMPLES["end_to_end"], "s": np.zeros((1, 3))}
    samples["c"] = samples["c"] + 1
    assert DETECTION["end_to_end"].assign_roles(samples, 3) == ROLES["end_to_end"]
    same = {"b": BOXES, "det_classes": np.zeros((1, 3)), "det_scores": np.zeros((1, 3))}
    assert DETECTION["end_to_end"].assign_roles(same, 3) == {
        "boxes": "b",
        "scores": "det_scores",
        "classes": "det_classes",
    }
    unnamed = {"b": BOXES, "x": np.zeros((1, 3)), "y": np.zeros((1, 3))}
    with pytest.raises(OutputError, match=r"outputs x and y could each be scores \[N\].*outputs: {scores: NAME}"):
        DETECTION["end_to_end"].assign_roles(unnamed, 3)


def test_a_role_that_no_output_fits_is_named_with_the_outputs():
    samples = {"b": BOXES, "s": np.array([[0.9, 0.5, 0.1]])}
    with pytest.raises(OutputError, match=r"no output is classes \[N\] \(whole numbers\).*b \[3, 4\], s \[3\]"):
        DETECTION["end_to_end"].assign_roles(samples, 3)


@pytest.mark.parametrize(
    ("decoder", "shapes", "message"),
    [
        ("yolo", {"predictions": (84, 8400)}, r"its output predictions is \[84, 8400\], and 3 labels need"),
        ("ssd", {"offsets": (10, 4), "scores": (11, 4)}, r"its output scores is \[11, 4\]"),
        ("detr", {"boxes": (10, 4)}, r"it has no output logits"),
        ("end_to_end", {"boxes": (10, 4), "scores": (10,), "classes": (9,)}, r"its output classes is \[9\]"),
        ("end_to_end", {"boxes": (10, 4), "hits": (10,)}, r"an output is hits, and the decoder takes boxes, scores"),
    ],
)
def test_outputs_that_do_not_fit_the_labels_are_refused_before_a_run(decoder, shapes, message):
    with pytest.raises(BundleError, match=f"net: {message}.*export the bundle again"):
        parameters_for(make_manifest("detection", decoder, outputs=shapes), {})


def test_an_open_side_fits():
    shapes = {"boxes": (-1, 4), "scores": (-1,), "classes": (-1,)}
    assert parameters_for(make_manifest("detection", outputs=shapes), {"first_class": 1}) == {"first_class": 1}


@pytest.mark.parametrize(
    ("decoder", "parameter", "value"),
    [
        ("end_to_end", "box_format", "wxyz"),
        ("end_to_end", "first_class", 2),
        ("end_to_end", "first_class", True),
        ("end_to_end", "relative", 1),
        ("ssd", "variances", [0.1, "x"]),
        ("ssd", "variances", [0.1]),
        ("ssd", "background", "middle"),
        ("detr", "activation", "relu"),
        ("candidates", "nms_threshold", 2),
    ],
)
def test_parameters_that_cannot_be_are_named(decoder, parameter, value):
    shapes = {
        "end_to_end": {"boxes": (5, 4), "scores": (5,), "classes": (5,)},
        "candidates": {"boxes": (5, 4), "scores": (5, 3)},
        "ssd": {"offsets": (5, 4), "scores": (5, 4)},
        "detr": {"logits": (5, 4), "boxes": (5, 4)},
    }[decoder]
    with pytest.raises(ConfigError, match=rf"postprocess\.{parameter} is not"):
        parameters_for(make_manifest("detection", decoder, outputs=shapes), {parameter: value})


def told(decoder: str, labels: int = 3, **samples) -> dict:
    return DETECTION[decoder].suggest_parameters({name: values[None] for name, values in samples.items()}, labels)


def test_the_format_of_boxes_is_told_by_their_values():
    corners = in_input(make_manifest("detection"))
    others = {"scores": SCORES[0], "classes": CLASSES[0]}
    assert told("end_to_end", boxes=corners, **others) == {}
    assert told("end_to_end", boxes=corners / 96, **others) == {"relative": True}
    assert told("end_to_end", boxes=centers(corners) / 96, **others) == {"relative": True, "box_format": "cxcywh"}
    assert told("candidates", boxes=corners / 96, scores=SCORES.T) == {"relative": True}
    assert told("end_to_end", boxes=corners[:0], scores=SCORES[0, :0], classes=CLASSES[0, :0]) == {}
    rows = np.concatenate([corners / 96, SCORES.T, CLASSES.T + 1], axis=1)
    assert told("end_to_end", detections=rows) == {"relative": True, "first_class": 1}
    assert told("end_to_end", detections=np.concatenate([rows[:, :3], rows[:, :4]], axis=1)) == {}


def test_classes_begin_at_one_where_the_last_labels_number_is_one_more():
    boxes = in_input(make_manifest("detection"))
    assert told("end_to_end", boxes=boxes, scores=SCORES[0], classes=CLASSES[0] + 1) == {"first_class": 1}
    assert told("end_to_end", labels=0, boxes=boxes, scores=SCORES[0], classes=CLASSES[0] + 1) == {}


def test_how_scores_are_meant_is_told_by_their_range_and_number():
    _, offsets, logits = ssd_outputs()
    assert told("ssd", offsets=offsets, scores=logits) == {}
    assert told("ssd", 4, offsets=offsets, scores=logits) == {"activation": "sigmoid"}
    assert told("ssd", offsets=offsets, scores=softmax(logits)) == {"activation": "none"}
    assert told("detr", logits=logits, boxes=offsets) == {}
    assert told("detr", 4, logits=logits, boxes=offsets) == {"activation": "sigmoid"}


@pytest.mark.parametrize("transposed", [False, True])
def test_raw_grids_are_told_by_sides_below_zero(transposed):
    table = yolo_table(make_manifest("detection"))
    raw = table.copy()
    raw[2] -= 1
    assert told("yolo", predictions=table.T if transposed else table) == {}
    assert told("yolo", predictions=raw.T if transposed else raw) == {"grid": "strides"}
