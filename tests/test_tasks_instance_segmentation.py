import numpy as np
import pytest
import torch
from manifests import make_manifest
from pycocotools import mask as coco
from torchvision.models.detection.roi_heads import paste_masks_in_image

from helpers.errors import BundleError, ConfigError
from helpers.images import rle
from helpers.images.geometry import place
from helpers.tasks import DECODERS, parameters_for, predict, suggest

SIZE = (240, 180)
RULES = [{"resize": "stretch"}, {"resize": "letterbox"}, {"resize": "crop"}]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["resize"])


def disk(center, radius: float, size=SIZE) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 < radius**2


def iou(one: rle.Mask, other: np.ndarray) -> float:
    return float(coco.iou([one], [rle.encode(other)], [0])[0, 0])


def to_input(manifest, points: np.ndarray, size=SIZE) -> np.ndarray:
    placement = place(manifest.input, size)
    return (points * np.divide(placement.resized, size) + placement.offset).astype(np.float32)


@each_rule
@pytest.mark.parametrize("shape", [(28, 28), (1, 14, 28)])
def test_masks_of_boxes_are_pasted_as_torchvision_pastes_them(rule, shape):
    manifest = make_manifest("instance_segmentation", "mask_rcnn", **rule)
    generator = np.random.default_rng(0)
    # One box, small and large, that reach beyond the image, too.
    boxes = np.array([[10.3, 20.7, 200.2, 170.9], [-20, -10, 60, 50], [100, 100, 104, 190], [5, 5, 6.5, 6.5]])
    maps = generator.random((4, *shape), np.float32)
    written = to_input(manifest, boxes.reshape(-1, 2)).reshape(-1, 4)
    outputs = {"boxes": written, "scores": np.linspace(0.9, 0.5, 4), "classes": np.array([0, 1, 2, 0]), "masks": maps}
    (found,) = predict({name: values[None] for name, values in outputs.items()}, [SIZE], manifest, {})
    assert [p["class_id"] for p in found] == [0, 1, 2, 0]
    clipped = torch.tensor([list(p["box"].values()) for p in found])
    square = torch.from_numpy(maps.reshape(4, 1, *shape[-2:]))
    if shape == (28, 28):
        expected = paste_masks_in_image(square, clipped, (SIZE[1], SIZE[0]))[:, 0].numpy() > 0.5
        for p, mask in zip(found, expected, strict=True):
            assert iou(p["mask"], mask) >= 0.99 if mask.any() else coco.area(p["mask"]) == 0
    assert all(p["mask"]["size"] == [SIZE[1], SIZE[0]] for p in found)


def test_a_mask_has_its_threshold():
    manifest = make_manifest("instance_segmentation", "mask_rcnn")
    outputs = {
        "boxes": np.array([[[10, 10, 50, 50]]], np.float32),
        "scores": np.array([[0.9]]),
        "classes": np.array([[1.0]]),
        "masks": np.full((1, 1, 28, 28), 0.6, np.float32),
    }
    areas = [
        coco.area(predict(outputs, [SIZE], manifest, {"mask_threshold": threshold})[0][0]["mask"])
        for threshold in (0.3, 0.5, 0.7)
    ]
    assert areas[0] >= areas[1] > areas[2] == 0


@each_rule
@pytest.mark.parametrize("transposed", [False, True])
def test_yolos_prototypes_become_masks_within_their_boxes(rule, transposed):
    manifest = make_manifest("instance_segmentation", "yolo", height=128, width=160, **rule)
    circles = [((70.0, 90.0), 40.0), ((160.0, 80.0), 30.0)]
    # A prototype of each circle at a quarter of the input: how far inside a cell's center is.
    centers = np.stack(np.meshgrid(np.arange(40) + 0.5, np.arange(32) + 0.5), axis=-1) * 4
    prototypes, table = np.zeros((3, 32, 40), np.float32), np.zeros((4 + 3 + 3, 120), np.float32)
    for i, (center, radius) in enumerate(circles):
        distance = np.linalg.norm(place(manifest.input, SIZE).to_image(centers) - center, axis=-1)
        prototypes[i] = (radius - distance) / 10
        corners = to_input(manifest, np.add.outer([-radius, radius], center))
        table[:4, i] = *corners.mean(axis=0), *(corners[1] - corners[0])
        table[4 + i, i], table[7 + i, i] = 0.9 - 0.1 * i, 2.0
    outputs = {"predictions": (table.T if transposed else table)[None], "prototypes": prototypes[None]}
    (found,) = predict(outputs, [SIZE], manifest, {})
    assert [p["class_id"] for p in found] == [0, 1]
    for p, (center, radius) in zip(found, circles, strict=True):
        assert iou(p["mask"], disk(center, radius)) > 0.96
        x, y, width, height = coco.toBbox(p["mask"])
        box = p["box"]
        assert x >= box["x1"] - 0.5 and y >= box["y1"] - 0.5
        assert x + width <= box["x2"] + 0.5 and y + height <= box["y2"] + 0.5


@pytest.mark.parametrize("decoder", ["mask_rcnn", "yolo"])
def test_an_image_without_instances_has_an_empty_list(decoder):
    shapes = {
        "mask_rcnn": {"boxes": (6, 4), "scores": (6,), "classes": (6,), "masks": (6, 28, 28)},
        "yolo": {"predictions": (10, 60), "prototypes": (3, 16, 16)},
    }[decoder]
    manifest = make_manifest("instance_segmentation", decoder, outputs=shapes)
    outputs = {name: np.zeros((2, *shape), np.float32) for name, shape in shapes.items()}
    assert predict(outputs, [SIZE, (1, 1)], manifest, parameters_for(manifest, {})) == [[], []]
    outputs = {name: np.full((1, *shape), np.nan, np.float32) for name, shape in shapes.items()}
    assert predict(outputs, [SIZE], manifest, {}) == [[]]


def test_outputs_are_told_apart_by_shape_and_range():
    generator = np.random.default_rng(0)
    yolo = {"a": generator.random((1, 32, 40, 40)), "b": generator.random((1, 39, 300))}
    assert suggest("instance_segmentation", yolo, 3) == "yolo"
    roles = DECODERS["instance_segmentation"]["yolo"].assign_roles(yolo, 3)
    assert roles == {"prototypes": "a", "predictions": "b"}
    rcnn = {
        "m": generator.random((1, 5, 1, 28, 28)),
        "b": generator.random((1, 5, 4)) * 90,
        "s": generator.random((1, 5)),
        "l": np.array([[1.0, 2, 3, 1, 2]]),
    }
    assert suggest("instance_segmentation", rcnn, 3) == "mask_rcnn"
    yolact = {
        "w": generator.normal(0, 1, (1, 50, 4)),
        "x": generator.random((1, 50, 4)),
        "y": generator.normal(0, 1, (1, 50, 32)),
        "z": generator.random((1, 20, 20, 32)),
    }
    assert suggest("instance_segmentation", yolact, 3) == "yolact"
    assert DECODERS["instance_segmentation"]["yolact"].assign_roles(yolact, 3) == {
        "loc": "w",
        "conf": "x",
        "mask": "y",
        "proto": "z",
    }


def test_heads_of_yolact_must_agree():
    shapes = {"loc": (50, 4), "conf": (50, 4), "mask": (50, 32), "proto": (20, 20, 32)}
    assert parameters_for(make_manifest("instance_segmentation", outputs=shapes), {"top_k": 9}) == {"top_k": 9}
    for name, shape in (("conf", (50, 5)), ("mask", (49, 32)), ("proto", (20, 20, 31))):
        manifest = make_manifest("instance_segmentation", outputs={**shapes, name: shape})
        with pytest.raises(BundleError, match=rf"its output {name} is \[{shape[0]}, .*export the bundle again"):
            parameters_for(manifest, {})
    with pytest.raises(ConfigError, match=r"postprocess\.nms is not one of fast, cross_class, traditional"):
        parameters_for(make_manifest("instance_segmentation", outputs=shapes), {"nms": "soft"})


@pytest.mark.parametrize("seed", range(20))
def test_a_part_is_encoded_as_the_whole_would_be(seed):
    generator = np.random.default_rng(seed)
    width, height = generator.integers(1, 30, 2).tolist()
    left, top = int(generator.integers(0, width)), int(generator.integers(0, height))
    shape = int(generator.integers(0, height - top + 1)), int(generator.integers(0, width - left + 1))
    part = generator.random(shape) < generator.choice([0.0, 0.2, 0.8, 1.0])
    whole = np.zeros((height, width), bool)
    whole[top : top + shape[0], left : left + shape[1]] = part
    assert rle.encode_part(part, (left, top), width, height) == rle.encode(whole)
