"""Detectors whose ONNX files end at the outputs of each stride: a bundle finds what the published decoding finds."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_export_files import bundle_of, pictures, save_onnx
from test_torchvision import predict
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import batched_nms

from helpers.errors import UserError
from helpers.export.checks import generate_pictures
from helpers.export.preparation import find_strides
from helpers.images.spec import InputSpec
from helpers.tasks.boxes import make_cells
from helpers.tasks.interface import OutputError

SIDE = 64  # of the inputs, in pixels
LABELS = ["cat", "dog", "cup"]
FACES = {"task": "keypoints", "labels": ["face"], "input": {"mean": 127.5, "std": 128}}
OBJECTS = {"task": "detection", "labels": LABELS, "input": {"std": 255}}
POSTPROCESS = {"score_threshold": 0.3, "nms_threshold": 0.5}
# What each network's paper and code say: shapes of a stride's outputs (anchors A, cells H and W), how many anchors a
# cell has, where in it a box's point is, what distances are counted in, and the power of scores times objectness.
NETWORKS = {
    "SCRFD": {
        "card": {**FACES, "postprocess": {**POSTPROCESS, "center": 0}},
        "outputs": {"score": "A 1", "bbox": "A 4", "kps": "A 10"},
        "anchors": 2,
        "center": 0,
        "batch": False,
    },
    "SCRFD of maps": {
        "card": {**FACES, "postprocess": {**POSTPROCESS, "center": 0}},
        "outputs": {"score": "1 H W", "bbox": "4 H W", "kps": "10 H W"},
        "anchors": 2,
        "center": 0,
    },
    "YuNet": {
        "card": {
            **FACES,
            "postprocess": {**POSTPROCESS, "center": 0, "boxes": "offsets"},
        },
        "outputs": {"cls": "A 1", "obj": "A 1", "bbox": "A 4", "kps": "A 10"},
        "center": 0,
    },
    "NanoDet": {
        "card": {**OBJECTS, "postprocess": POSTPROCESS},
        "outputs": {"cls_pred": "A 3", "dis_pred": "A 32"},
    },
    "PicoDet": {
        "card": {**OBJECTS, "postprocess": POSTPROCESS},
        "outputs": {"save_infer_model/scale_0": "A 3", "save_infer_model/scale_4": "A 32"},
        "strides": (8, 16, 32, 64),
    },
    "YOLOv8 without its last layer": {
        "card": {**OBJECTS, "postprocess": POSTPROCESS},
        "outputs": {"table": "67 H W"},
        "logits": True,
    },
    "RTMDet without its last layer": {
        "card": {**OBJECTS, "postprocess": {**POSTPROCESS, "center": 0, "unit": "pixel"}},
        "outputs": {"cls": "3 H W", "bbox": "4 H W"},
        "logits": True,
        "center": 0,
        "unit": 1,
    },
    "FCOS of channels last": {
        "card": {**OBJECTS, "postprocess": {**POSTPROCESS, "objectness": "product"}},
        "outputs": {"cls": "H W 3", "ctr": "H W 1", "bbox": "H W 4"},
        "logits": True,
        "strides": (8, 16, 32, 64),
        "power": 1,
    },
}


def generate(network: dict) -> list[dict[str, np.ndarray]]:
    """Random numbers per stride, `[H, W, anchors, n]` by the outputs' names; few of them are probable objects."""
    generator = np.random.default_rng(7)
    levels = []
    for stride in network.get("strides", (8, 16, 32)):
        cells, level = -(-SIDE // stride), {}
        for name, shape in network["outputs"].items():
            count = next(int(side) for side in shape.split() if side.isdigit())
            values = generator.random((cells, cells, network.get("anchors", 1), count)).astype(np.float32)
            if count in (1, 3):  # of a score
                level[name] = np.log(values / (1 - values)) - 1 if network.get("logits") else values**2
            elif count == 67:
                level[name] = np.concatenate([6 * values[..., :64], 5 * values[..., 64:] - 4], axis=-1)
            else:
                level[name] = values * (6 if count == 32 else 16 if "unit" in network else 2)
        levels.append(level)
    return levels


def arrange(values: np.ndarray, shape: str) -> np.ndarray:
    """Numbers `[H, W, anchors, n]` as a network gives them, without the batch."""
    height, width, anchors, count = values.shape
    if shape.startswith("A"):
        return values.reshape(-1, count)
    flat = values.reshape(height, width, anchors * count)
    return flat if shape.startswith("H") else flat.transpose(2, 0, 1)


def find_by_definition(network: dict, levels: list[dict[str, np.ndarray]]) -> list[tuple]:
    """Class, score, box and landmarks of each object, cell by cell as the networks' papers have it."""
    candidates, offsets = [], network["card"].get("postprocess", {}).get("boxes") == "offsets"
    for stride, level in zip(network.get("strides", (8, 16, 32)), levels, strict=True):
        unit = network.get("unit", stride)
        for (row, column, anchor), _ in np.ndenumerate(next(iter(level.values()))[..., 0]):
            own = [torch.from_numpy(values[row, column, anchor]).double() for values in level.values()]
            if len(own) == 1:
                own = [own[0][64:], own[0][:64]]
            own[0], *others = own
            scores = own[0].sigmoid() if network.get("logits") else own[0]
            if len(others[0]) == 1:
                objectness = others.pop(0)
                objectness = objectness.sigmoid() if network.get("logits") else objectness
                scores = (scores * objectness) ** network.get("power", 0.5)
            x, y = ((place + network.get("center", 0.5)) * stride for place in (column, row))
            numbers = others[0]
            if len(numbers) > 4:
                bins = numbers.reshape(4, -1)
                numbers = (bins.softmax(dim=1) * torch.arange(bins.shape[1])).sum(dim=1)
            a, b, c, d = (numbers * unit).tolist()
            if offsets:
                w, h = (numbers[2:].exp() * unit).tolist()
                box = [x + a - w / 2, y + b - h / 2, x + a + w / 2, y + b + h / 2]
            else:
                box = [x - a, y - b, x + c, y + d]
            points = (
                [(x + dx * unit, y + dy * unit) for dx, dy in others[1].reshape(-1, 2).tolist()] if others[1:] else []
            )
            candidates += [
                (k, s, box, points) for k, s in enumerate(scores.tolist()) if s > POSTPROCESS["score_threshold"]
            ]
    boxes = torch.tensor([box for _, _, box, _ in candidates]).clamp(0, SIDE)
    classes = torch.tensor([k for k, *_ in candidates])
    rows = batched_nms(boxes, torch.tensor([s for _, s, *_ in candidates]), classes, POSTPROCESS["nms_threshold"])
    rows = [row for row in rows.tolist() if (boxes[row, 2:] > boxes[row, :2]).all()]  # within the image
    return [(*candidates[row][:2], boxes[row].tolist(), candidates[row][3]) for row in rows]


def assert_same(found: list[dict], expected: list[tuple]) -> None:
    assert len(found) == len(expected) > 3
    assert [p["class_id"] for p in found] == [class_id for class_id, *_ in expected]
    np.testing.assert_allclose([p["score"] for p in found], [score for _, score, *_ in expected], rtol=1e-4)
    np.testing.assert_allclose([list(p["box"].values()) for p in found], [box for *_, box, _ in expected], atol=1e-2)
    for p, (*_, points) in zip(found, expected, strict=True):
        own = [(point["x"], point["y"]) for point in p["keypoints"] or []]
        np.testing.assert_allclose(np.reshape(own, (-1, 2)), np.clip(np.reshape(points, (-1, 2)), 0, SIDE), atol=1e-2)


def save(path: Path, network: dict, levels: list[dict[str, np.ndarray]]) -> Path:
    strides = network.get("strides", (8, 16, 32))
    has_batch = network.get("batch", True)
    outputs = {
        f"{name}_{stride}": arrange(level[name], shape)
        for name, shape in network["outputs"].items()
        for stride, level in zip(strides, levels, strict=True)
    }
    sides = ("batch", 3, SIDE, SIDE) if has_batch else (1, 3, SIDE, SIDE)
    return save_onnx(path, outputs, sides, has_batch=has_batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_of_each_stride_are_decoded_as_the_networks_define_them(tmp_path, name):
    network = NETWORKS[name]
    levels = generate(network)
    bundle = bundle_of(save(tmp_path / "model.onnx", network, levels), network["card"], tmp_path / "bundle")
    assert bundle.manifest.decoder == "anchor_free"
    assert bundle.manifest.batch == (0 if network.get("batch", True) else 1)
    for found in predict(bundle, pictures((SIDE, SIDE), (SIDE, SIDE))):
        assert_same(found, find_by_definition(network, levels))


def test_one_table_of_all_strides_is_read_as_nanodet_plus_has_it(tmp_path):
    network = {**NETWORKS["PicoDet"], "center": 0}
    levels = generate(network)
    rows = [np.concatenate([arrange(values, "A") for values in level.values()], axis=1) for level in levels]
    path = save_onnx(tmp_path / "model.onnx", {"output": np.concatenate(rows)}, ("n", 3, SIDE, SIDE))
    card = {**OBJECTS, "postprocess": {**POSTPROCESS, "center": 0}}
    bundle = bundle_of(path, card, tmp_path / "bundle")
    assert bundle.manifest.postprocess == {**card["postprocess"], "first": "scores"}
    assert_same(predict(bundle, pictures((SIDE, SIDE)))[0], find_by_definition(network, levels))


class Levels(nn.Module):
    """A detector of torchvision without its last layer: the heads' outputs for each level of its pyramid."""

    def __init__(self, network: FCOS):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = list(self.network.backbone(images).values())
        heads = [self.network.head([feature]) for feature in features]
        return [head[name] for name in ("cls_logits", "bbox_regression", "bbox_ctrness") for head in heads]


class Pyramid(nn.Module):
    """Features at strides of 8, 16 and 32 pixels."""

    out_channels = 32

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, stride=8)
        self.layers = nn.ModuleList(nn.Conv2d(32, 32, 2, stride=2) for _ in range(2))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = [self.stem(images)]
        features += [self.layers[0](features[-1])]
        features += [self.layers[1](features[-1])]
        return {str(level): feature for level, feature in enumerate(features)}


@torch.no_grad()
def test_torchvisions_fcos_without_its_last_layer_finds_what_the_whole_one_finds(tmp_path):
    torch.manual_seed(0)
    network = FCOS(
        Pyramid(),
        len(LABELS),
        min_size=128,
        max_size=128,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3),
        score_thresh=0.3,
        nms_thresh=0.5,
        topk_candidates=10_000,
    ).eval()
    for layer, spread in (("classification_head.cls_logits", 0.6), ("regression_head.bbox_reg", 0.02)):
        network.head.get_submodule(layer).weight.normal_(0, spread)
    network.head.classification_head.cls_logits.bias.fill_(0)
    network.head.regression_head.bbox_reg.bias.fill_(2)  # no box without an area, which no prediction has
    pictures = [cv2.resize(picture, (128, 128)) for picture in generate_pictures(2)]
    torch.onnx.export(Levels(network).eval(), (torch.zeros(1, 3, 128, 128),), tmp_path / "model.onnx", dynamo=False)
    card = {**OBJECTS, "postprocess": {**POSTPROCESS, "center": 0, "top_k": 10_000, "max_detections": 100}}
    bundle = bundle_of(tmp_path / "model.onnx", card, tmp_path / "bundle")
    tensors = [torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1) / 255 for picture in pictures]
    found = predict(bundle, [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures])
    for own, whole in zip(found, network(tensors), strict=True):
        assert len(own) == len(whole["scores"]) > 20 and len(set(whole["labels"].tolist())) > 1
        np.testing.assert_allclose([p["score"] for p in own], whole["scores"], atol=1e-3)
        assert [p["class_id"] for p in own] == whole["labels"].tolist()
        np.testing.assert_allclose([list(p["box"].values()) for p in own], whole["boxes"], atol=1)


def test_several_anchors_of_a_cell_may_have_boxes_of_their_own_sizes(tmp_path):
    network = NETWORKS["SCRFD of maps"]
    levels = [{name: level[name] for name in ("score", "bbox")} for level in generate(network)]
    shapes = {"outputs": {"score": "1 H W", "bbox": "4 H W"}, "anchors": 2}
    rows = 2 * (64 + 16 + 4)
    np.save(tmp_path / "anchors.npy", np.tile([0.5, 0.5, 0.25, 0.25], (rows, 1)))
    card = {"task": "detection", "labels": ["face"], "priors": "anchors.npy"}
    bundle = bundle_of(save(tmp_path / "model.onnx", shapes, levels), card, tmp_path / "bundle")
    assert bundle.manifest.decoder == "ssd"
    assert {output.name: output.shape for output in bundle.manifest.outputs} == {
        "offsets": (rows, 4),
        "scores": (rows, 1),
    }


def test_yolox_without_its_last_layer_is_decoded_as_yolo(tmp_path):
    table = np.zeros((84, 8), np.float32)
    table[64 + 5] = 0.25, 0.5, np.log(1.5), 0, 0.9, 0, 1, 0  # the second row of the grid of 16 pixels, its second cell
    outputs = {
        f"out_{stride}": part.reshape(cells, cells, 8).transpose(2, 0, 1)
        for stride, cells, part in zip((8, 16, 32), (8, 4, 2), np.split(table, [64, 80]), strict=True)
    }
    outputs["out_8"][2] = -1  # of no object
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", outputs, ("n", 3, SIDE, SIDE)), OBJECTS, tmp_path / "bundle")
    assert (bundle.manifest.decoder, bundle.manifest.postprocess) == ("yolo", {"grid": "strides"})
    (found,) = predict(bundle, pictures((SIDE, SIDE)))
    assert [p["label"] for p in found] == ["dog"] and found[0]["score"] == pytest.approx(0.9)
    np.testing.assert_allclose(list(found[0]["box"].values()), [8, 16, 32, 32], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"outputs": {}},
            r"outputs \[cls_8, cls_16, .*\] and \[ctr_8, ctr_16, ctr_32\] could each be scores .*: name it in the card",
        ),
        (
            {"outputs": {"scores": ["cls_8", "bbox_16"]}},
            r"scores is outputs of \[64, 1\], \[16, 4\] in its card, which",
        ),
        (
            {"outputs": {"scores": ["cls_8", "cls_99"]}},
            "no output 'cls_99', which its card names; its outputs are cls_8",
        ),
        ({"outputs": {"scores": ["cls_8", "cls_8"]}}, "names one output for two roles"),
    ],
)
def test_a_mistake_about_strides_says_what_to_change(tmp_path, changes, message):
    shapes = {"outputs": {"cls": "A 1", "ctr": "A 1", "bbox": "A 4", "kps": "A 10"}}
    path = save(tmp_path / "model.onnx", shapes, generate(shapes))
    card = {**FACES, "postprocess": {**POSTPROCESS, "center": 0}}
    with pytest.raises(UserError, match=message) as raised:
        bundle_of(path, {**card, **changes}, tmp_path / "bundle")
    assert "\n" not in str(raised.value) and not (tmp_path / "bundle").exists()


def test_a_card_may_name_the_outputs_of_each_stride(tmp_path):
    network = NETWORKS["YuNet"]
    levels, names = generate(network), {"scores": "cls", "objectness": "obj", "distances": "bbox", "landmarks": "kps"}
    outputs = {role: [f"{name}_{stride}" for stride in (32, 8, 16)] for role, name in names.items()}
    path = save(tmp_path / "model.onnx", network, levels)
    bundle = bundle_of(path, {**network["card"], "outputs": outputs}, tmp_path / "bundle")
    assert_same(predict(bundle, pictures((SIDE, SIDE)))[0], find_by_definition(network, levels))


@pytest.mark.parametrize(
    ("shapes", "groups"),
    [
        ({"a": (64, 3), "b": (16, 3), "c": (4, 3)}, ["[a, b, c]"]),
        ({"b": (3, 4, 4), "a": (3, 8, 8), "d": (1, 4, 4), "c": (1, 8, 8)}, ["[a, b]", "[c, d]"]),
        ({"a": (8, 8, 3), "b": (4, 4, 3)}, ["[a, b]"]),
        ({"a": (84, 16), "b": (84, 1)}, []),  # of one grid or of all
        ({"a": (3, 16, 16), "b": (2, 16, 16)}, []),
        ({"a": (64, 3), "b": (16, 3), "c": (64, 4)}, []),  # one is missing
        ({"a": (100, 4), "b": (310, 4)}, []),  # of no grids
        ({"a": (3, 8, 8, 85), "b": (3, 4, 4, 85)}, []),
        ({"a": (64,), "b": (16,)}, []),
    ],
)
def test_outputs_are_of_strides_only_where_their_cells_are_those_of_grids(shapes, groups):
    spec = InputSpec(SIDE, SIDE, "rgb", (0.0,) * 3, (1.0,) * 3)
    assert [*find_strides(shapes, spec, False)] == groups
    if groups:
        assert [*find_strides(shapes, replace(spec, width=3 * SIDE, height=5 * SIDE), False)] == []


def test_anchors_of_a_card_may_be_of_any_number_per_grid():
    spec = InputSpec(128, 128, "rgb", (0.0,) * 3, (1.0,) * 3)
    blazeface = {"s8": (512, 1), "s16": (384, 1), "o8": (512, 16), "o16": (384, 16)}
    assert find_strides(blazeface, spec, True) == {"[s8, s16]": ["s8", "s16"], "[o8, o16]": ["o8", "o16"]}
    assert find_strides(blazeface, spec, False) == {}


def test_outputs_of_one_class_need_no_anchor_more(tmp_path):
    table = np.zeros((84, 6), np.float32)  # YOLOX
    table[5] = 0.5, 0.5, 0.5, 0, 0.9, 0.9
    outputs = {f"out_{n}": part for n, part in enumerate(np.split(table, [64, 80]))}
    outputs["out_0"][0, 2] = -1
    path = save_onnx(tmp_path / "model.onnx", outputs, ("n", 3, SIDE, SIDE))
    bundle = bundle_of(path, {**OBJECTS, "labels": ["cat"]}, tmp_path / "bundle")
    assert [p["label"] for p in predict(bundle, pictures((SIDE, SIDE)))[0]] == ["cat"]


def test_cells_of_grids_are_told_by_their_number():
    assert len(make_cells(3598, (416, 416))) == 3598  # NanoDet-Plus: strides of 8 to 64, the last one of 7 cells
    cells = make_cells(2 * 84, (64, 64))
    assert cells[:4].tolist() == [[0, 0, 8], [0, 0, 8], [1, 0, 8], [1, 0, 8]]
    assert cells[-1].tolist() == [1, 1, 32]
    with pytest.raises(OutputError, match="an input of 64 x 64 have 87 cells: mend the input's size"):
        make_cells(87, (64, 64))


def test_centers_are_the_peaks_of_a_map_that_may_be_logits(tmp_path):
    heatmap = np.full((3, 16, 16), -9, np.float32)
    heatmap[1, 4:7, 5:8] = [[1, 2, 1], [2, 3, 2], [1, 2, 1]]
    heatmap[2, 5, 6] = 1
    sizes, offsets = np.full((2, 16, 16), 2, np.float32), np.full((2, 16, 16), 0.25, np.float32)
    sizes[1] = 4
    path = save_onnx(tmp_path / "model.onnx", {"hm": heatmap, "wh": sizes, "reg": offsets}, ("n", 3, SIDE, SIDE))
    card = {
        **OBJECTS,
        "outputs": {"heatmap": "hm", "sizes": "wh", "offsets": "reg"},
        "postprocess": {"order": "xy", "sizes": "cells", "center": 0, "peaks": True, "nms_threshold": 1},
    }
    bundle = bundle_of(path, card, tmp_path / "bundle")
    assert (bundle.manifest.decoder, bundle.manifest.postprocess["activation"]) == ("centernet", "sigmoid")
    (found,) = predict(bundle, pictures((SIDE, SIDE)))
    assert [p["label"] for p in found] == ["dog", "cup"]
    np.testing.assert_allclose([p["score"] for p in found], 1 / (1 + np.exp([-3, -1])), rtol=1e-5)
    np.testing.assert_allclose([list(p["box"].values()) for p in found], [[21, 13, 29, 29]] * 2, rtol=1e-5)
