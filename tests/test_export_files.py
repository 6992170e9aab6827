"""Models of other makers become bundles: what their files say, what is tried before anything is written."""

import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import openvino as ov
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from test_torchvision import predict

import first_look_data
from helpers import cli
from helpers.bundle.manifest import Bundle, load_bundle
from helpers.config import load_config
from helpers.errors import BundleError, UserError
from helpers.export import checks
from helpers.export.conversion import PREVIEW, convert_file, make_bundle
from helpers.storage import open_storage

# One object in a network's input of 8 x 8 pixels: a box from 2, 1 to 6, 7 of the second of three classes.
BOXES = np.float32([[2, 1, 6, 7], [0, 0, 8, 8], [0, 0, 1, 1]])
SCORES = np.float32([0.9, 0.01, 0.02])
CLASSES = np.float32([1, 2, 0])
YOLO = np.float32([[4, 4, 4, 6, 0.05, 0.9, 0], [4, 4, 8, 8, 0, 0, 0.01], *[[1, 1, 1, 1, 0, 0, 0]] * 20]).T
DETECTION = {"task": "detection", "labels": ["a", "b", "c"]}
CLASSIFICATION = {"task": "classification", "labels": ["a", "b", "c"]}


def save_onnx(
    path: Path,
    outputs: dict[str, np.ndarray],
    sides: tuple[Any, ...] = ("batch", 3, 8, 8),
    metadata: dict[str, str] | None = None,
    first_only: bool = False,
    has_batch: bool = True,
) -> Path:
    """A network that gives the same outputs for every image, or for the first image of a batch only.

    Outputs may lack the dimension of a batch, which is of one image then.
    """
    nodes, constants = [], [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])]
    axes = [0, 1, 2, 3] if first_only else [1, 2, 3]
    constants.append(helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes))
    nodes.append(helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=1))
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    for name, values in outputs.items():
        rank = values.ndim + has_batch
        constants.append(numpy_helper.from_array(values, f"{name}_values"))
        constants.append(helper.make_tensor(f"{name}_shape", TensorProto.INT64, [rank], [-1] + [1] * (rank - 1)))
        nodes.append(helper.make_node("Reshape", ["nothing", f"{name}_shape"], [f"{name}_nothing"]))
        nodes.append(helper.make_node("Add", [f"{name}_nothing", f"{name}_values"], [name]))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, sides)
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "constant", [images], results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def bundle_of(path: Path, card: dict | None, output: Path) -> Bundle:
    """The bundle of a file, with a card's entries."""
    written = None
    if card is not None:
        written = path.with_name("card.yaml")
        written.write_text(yaml.safe_dump(card))
    converted = convert_file(path, written)
    target = open_storage(str(output))
    make_bundle(converted.model, converted.architecture, converted.file, target, "fp32")
    return load_bundle(target)


def pictures(*sizes: tuple[int, int]) -> list[bytes]:
    """PNG files of widths and heights."""
    return [cv2.imencode(".png", np.full((h, w, 3), 90, np.uint8))[1].tobytes() for w, h in sizes]


def boxes(predictions: list[dict]) -> list[list[float]]:
    return [list(prediction["box"].values()) for prediction in predictions]


NAMES = [("boxes", "scores", "classes"), ("scores", "classes", "boxes"), ("z", "y", "x")]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_outputs_are_told_apart_whatever_their_names_and_order(tmp_path, names):
    outputs = dict(sorted(zip(names, (BOXES, SCORES, CLASSES), strict=True)))
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", outputs), DETECTION, tmp_path / "bundle")
    assert {output.name for output in bundle.manifest.outputs} == {"boxes", "scores", "classes"}
    for predictions, (width, height) in zip(
        predict(bundle, pictures((16, 8), (80, 80))), [(16, 8), (80, 80)], strict=True
    ):
        assert [p["label"] for p in predictions] == ["b"]
        x, y = width / 8, height / 8
        np.testing.assert_allclose(boxes(predictions), [[2 * x, y, 6 * x, 7 * y]], rtol=1e-5)


def test_boxes_of_a_letterboxed_image_are_in_its_own_pixels(tmp_path):
    path = save_onnx(tmp_path / "model.onnx", {"out": YOLO})
    bundle = bundle_of(path, {**DETECTION, "input": {"resize": "letterbox"}}, tmp_path / "bundle")
    assert bundle.manifest.decoder == "yolo"
    (predictions,) = predict(bundle, pictures((16, 8)))  # half as large, with 2 rows of padding above
    np.testing.assert_allclose(boxes(predictions), [[4, 0, 12, 8]])
    assert predictions[0]["label"] == "b" and predictions[0]["score"] == pytest.approx(0.9)


def test_parameters_that_outputs_tell_are_in_the_manifest_unless_a_card_says_others(tmp_path):
    shifted = {"boxes": BOXES / 8, "scores": SCORES, "classes": CLASSES + 1}
    path = save_onnx(tmp_path / "model.onnx", shifted)
    bundle = bundle_of(path, DETECTION, tmp_path / "bundle")
    assert bundle.manifest.postprocess == {"relative": True, "first_class": 1}
    (predictions,) = predict(bundle, pictures((16, 8)))
    assert [p["label"] for p in predictions] == ["b"]
    np.testing.assert_allclose(boxes(predictions), [[4, 1, 12, 7]], rtol=1e-5)
    card = {**DETECTION, "labels": ["-", "a", "b", "c"], "postprocess": {"relative": True, "first_class": 0}}
    assert bundle_of(path, card, tmp_path / "other").manifest.postprocess == card["postprocess"]


def test_a_file_is_compiled_once_unless_other_pictures_are_to_be_drawn(tmp_path, monkeypatch):
    compiled = []
    compile_exactly = checks.compile_exactly
    monkeypatch.setattr(checks, "compile_exactly", lambda model: compiled.append(model) or compile_exactly(model))
    path = save_onnx(tmp_path / "model.onnx", {"boxes": BOXES, "scores": SCORES, "classes": CLASSES})
    bundle_of(path, DETECTION, tmp_path / "bundle")
    assert len(compiled) == 1
    preview = (tmp_path / "bundle" / PREVIEW).read_bytes()
    converted, others = convert_file(path, tmp_path / "card.yaml"), [np.zeros((8, 8, 3), np.uint8)]
    target = open_storage(str(tmp_path / "other"))
    make_bundle(converted.model, converted.architecture, converted.file, target, "fp32", pictures=others)
    assert len(compiled) == 3 and target.read(PREVIEW) != preview


def ultralytics(task: str, **others: str) -> dict[str, str]:
    return {"names": "{0: 'a', 1: 'b', 2: 'c'}", "stride": "32", "task": task, "imgsz": "[8, 8]", **others}


@pytest.mark.parametrize(
    ("task", "outputs", "expected"),
    [
        ("detect", {"output0": YOLO}, ("detection", "yolo")),
        ("classify", {"output0": np.float32([0.1, 0.7, 0.2])}, ("classification", "probabilities")),
        (
            "segment",
            {"output0": np.vstack([YOLO, np.ones((4, 22), np.float32)]), "output1": np.ones((4, 2, 2), np.float32)},
            ("instance_segmentation", "yolo"),
        ),
    ],
)
def test_files_of_ultralytics_need_no_card(tmp_path, task, outputs, expected):
    path = save_onnx(tmp_path / "model.onnx", outputs, ("batch", 3, "height", "width"), ultralytics(task))
    manifest = bundle_of(path, None, tmp_path / "bundle").manifest
    assert (manifest.task, manifest.decoder) == expected
    assert manifest.labels == ("a", "b", "c")
    assert manifest.input.shape == (8, 8, 3) and manifest.input.std == (255.0,) * 3
    assert manifest.input.resize == ("crop" if task == "classify" else "letterbox")
    (predictions,) = predict(load_bundle(open_storage(str(tmp_path / "bundle"))), pictures((16, 8)))
    assert predictions[0]["label"] == "b"


def test_poses_of_ultralytics_need_no_card(tmp_path):
    pose = np.vstack([YOLO[:4], YOLO[5:6], np.full((6, 22), 3, np.float32)])  # two points: x, y, score
    names = {**ultralytics("pose"), "names": "{0: 'person'}", "kpt_shape": "[2, 3]"}
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", {"output0": pose}, metadata=names), None, tmp_path / "bundle")
    assert (bundle.manifest.task, bundle.manifest.decoder) == ("keypoints", "yolo")
    (predictions,) = predict(bundle, pictures((8, 8)))
    assert [(p["x"], p["y"]) for p in predictions[0]["keypoints"]] == [(3, 3), (3, 3)]


def test_what_openvinos_model_api_says_of_a_model_needs_no_card(tmp_path):
    model = ov.convert_model(save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}))
    about = {"model_type": "Classification", "labels": "a b c", "mean_values": "1 2 3", "scale_values": "4"}
    for key, value in {**about, "reverse_input_channels": "YES", "resize_type": "crop"}.items():
        model.set_rt_info(value, ["model_info", key])
    ov.save_model(model, tmp_path / "saved.xml")
    bundle = bundle_of(tmp_path / "saved.xml", None, tmp_path / "bundle")
    spec = bundle.manifest.input
    assert (spec.color, spec.resize, spec.mean, spec.std) == ("rgb", "crop", (1.0, 2.0, 3.0), (4.0,) * 3)
    assert [p["label"] for p in predict(bundle, pictures((9, 9)))[0]] == ["b", "c", "a"]


def test_an_exported_program_of_pytorch_becomes_a_bundle(tmp_path):
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    torch.export.save(torch.export.export(network, (torch.zeros(1, 3, 8, 8),)), tmp_path / "model.pt2")
    card = {**CLASSIFICATION, "decoder": "softmax", "labels": ["r", "g", "b"], "input": {"std": [255] * 3}}
    bundle = bundle_of(tmp_path / "model.pt2", card, tmp_path / "bundle")
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., 1] = 200
    (predictions,) = predict(bundle, [cv2.imencode(".png", picture)[1].tobytes()])
    assert predictions[0]["label"] == "g"


def test_a_graph_that_answers_for_the_first_image_only_gets_one_at_a_time(tmp_path):
    path = save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}, first_only=True)
    bundle = bundle_of(path, CLASSIFICATION, tmp_path / "bundle")
    assert bundle.manifest.batch == 1
    assert [p[0]["label"] for p in predict(bundle, pictures((8, 8), (9, 9), (10, 10)))] == ["b"] * 3
    several = save_onnx(tmp_path / "other.onnx", {"logits": np.float32([0, 3, 1])})
    assert bundle_of(several, CLASSIFICATION, tmp_path / "others").manifest.batch == 0


def test_rows_of_detections_are_no_batch_though_every_picture_has_one(tmp_path):
    ops = ov.opset13
    image = ops.parameter([1, 3, 8, 8], np.float32, "image")
    is_any = ops.greater(ops.reduce_max(image, [1, 2, 3]), np.float32(0))
    rows = ops.squeeze(ops.non_zero(is_any, "i64"), [0])
    outputs = {"boxes": BOXES[:1], "scores": SCORES[:1], "classes": CLASSES[:1]}
    results = [ops.gather(ops.constant(values), rows, ops.constant(0)) for values in outputs.values()]
    for node, name in zip(results, outputs, strict=True):
        node.output(0).set_names({name})
    ov.save_model(ov.Model(results, [image]), tmp_path / "model.xml", compress_to_fp16=False)
    bundle = bundle_of(tmp_path / "model.xml", DETECTION, tmp_path / "bundle")
    found = predict(bundle, [*pictures((8, 8)), cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()])
    assert [boxes(predictions) for predictions in found] == [[[2, 1, 6, 7]], []]


@pytest.mark.parametrize("sides", [(3, 8, 8), (8, 8, 3), (1, 8, 8, 3)], ids=str)
def test_a_graph_may_lack_the_batch_or_have_its_channels_last(tmp_path, sides):
    model = ov.convert_model(save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}))
    ops = ov.opset13
    image = ops.parameter(list(sides), np.float32, "image")
    batch = image if len(sides) == 4 else ops.unsqueeze(image, ops.constant([0]))
    batch = ops.transpose(batch, ops.constant([0, 3, 1, 2])) if sides[-1] == 3 else batch
    model.get_parameters()[0].output(0).replace(batch.output(0))
    ov.save_model(ov.Model(model.get_results(), [image]), tmp_path / "saved.xml")
    bundle = bundle_of(tmp_path / "saved.xml", CLASSIFICATION, tmp_path / "bundle")
    assert [p[0]["label"] for p in predict(bundle, pictures((8, 8), (9, 9)))] == ["b"] * 2


def test_a_preview_lies_beside_the_bundle(tmp_path):
    path = save_onnx(tmp_path / "model.onnx", {"b": BOXES, "s": SCORES, "c": CLASSES})
    bundle = bundle_of(path, DETECTION, tmp_path / "bundle")
    preview = cv2.imread(str(tmp_path / "bundle" / PREVIEW))
    assert preview.shape[1] > 2 * preview.shape[0] and PREVIEW not in bundle.manifest.files


WRONG = {
    "no task": ({"labels": ["a"]}, {}, "does not say what it is for: write a card"),
    "an unknown task": ({"task": "detecton", "labels": ["a"]}, {}, "did you mean 'detection'"),
    "an unknown decoder": ({**DETECTION, "decoder": "yoloo"}, {}, "did you mean 'yolo'"),
    "too few labels": ({**CLASSIFICATION, "labels": ["a", "b"]}, {}, r"\[3\].*2 labels"),
    "no labels": ({"task": "detection", "decoder": "yolo"}, {"outputs": {"out": YOLO}}, "add `labels: "),
    "no such output": ({**CLASSIFICATION, "outputs": {"logits": "nowhere"}}, {}, "no output 'nowhere'.* are logits"),
    "another task's outputs": (DETECTION, {}, r"the outputs logits \[3\] fit no decoder of task detection"),
    "sides of any length": (CLASSIFICATION, {"sides": ("n", 3, "h", "w")}, "add `height` and `width`"),
    "channels at both ends": (CLASSIFICATION, {"sides": ("n", 3, 8, 3)}, "add `layout: NCHW` or"),
    "two channels": (CLASSIFICATION, {"sides": ("n", 2, 8, 8)}, r"\?,2,8,8\], where no side is of 1 or 3 channels"),
    "means of another color": (
        {**CLASSIFICATION, "input": {"mean": [1, 2, 3]}},
        {"sides": ("n", 1, 8, 8)},
        "mean has 3 values, and images of color gray need 1",
    ),
    "means of pixels from 0 to 1": (
        {**CLASSIFICATION, "input": {"mean": [0.5, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}},
        {},
        r"of gray levels: write mean: \[127.5, 102.0, 102.0\], std: \[51.0, 51.0, 51.0\]",
    ),
    "a mean of pixels from 0 to 1": (
        {**CLASSIFICATION, "input": {"mean": 0.5}},
        {},
        r"write mean: \[127.5, 127.5, 127.5\], std: \[255.0, 255.0, 255.0\]",
    ),
    "one output for two roles": (
        {**DETECTION, "outputs": {"boxes": "logits", "scores": "logits"}},
        {},
        "for two roles",
    ),
    "an input without entries": ({**CLASSIFICATION, "input": "rgb"}, {}, "input is 'rgb', and has entries of its own"),
    "labels that are no list": ({**CLASSIFICATION, "labels": 3}, {}, "labels: Input should be a list"),
    "an input of any memory": (
        {**CLASSIFICATION, "input": {"height": 10**6, "width": 10**6}},
        {"sides": ("n", 3, "h", "w")},
        "16384 at most",
    ),
    "more cut than there is": (
        {**CLASSIFICATION, "input": {"resize": "crop", "resize_size": 4}},
        {},
        "resize_size is 4, and 8 pixels are cut",
    ),
    "a label too few of candidates": ({**DETECTION, "labels": ["a", "b"]}, {"outputs": {"out": YOLO}}, "fit 3 labels"),
    "a task that is not built": ({"task": "depth_estimation"}, {}, "there are classification, embedding, detection"),
    "outputs of a detector with masks": (
        DETECTION,
        {"outputs": {"out": np.tile(YOLO, (4, 1))[:23], "maps": np.ones((16, 2, 2), np.float32)}},
        "decoder yolo of task instance_segmentation: correct the task",
    ),
    "several maps": (
        {"task": "semantic_segmentation", "labels": ["a"]},
        {"outputs": {name: np.full((1, 8, 8), 0.3, np.float32) for name in ("a", "b")}},
        r"outputs a and b could each be scores .*add|`outputs: {scores: NAME}`",
    ),
    "several outputs of points": (
        {"task": "keypoints", "labels": ["a"]},
        {"outputs": {"brows": np.arange(213, dtype=np.float32), "iris": np.arange(15, dtype=np.float32)}},
        r"outputs brows and iris could each be points .*name it in the card, `outputs: {points: NAME}`",
    ),
    "no finite values": (CLASSIFICATION, {"outputs": {"logits": np.float32([np.nan, 1, 2])}}, "not finite"),
    "another size": (
        {**CLASSIFICATION, "input": {"color": "gray"}},
        {},
        "where no side is of 1 channels: correct `color`",
    ),
    "a wrong parameter": ({**CLASSIFICATION, "postprocess": {"top_k": 0}}, {}, "postprocess.top_k"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, kind):
    card, changes, message = WRONG[kind]
    path = save_onnx(tmp_path / "model.onnx", **{"outputs": {"logits": np.float32([0, 3, 1])}, **changes})
    with pytest.raises(UserError, match=message) as raised:
        bundle_of(path, card, tmp_path / "bundle")
    assert "\n" not in str(raised.value) and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("a.pt", "name its network with --architecture"), ("a.keras", "model.export"), ("a.engine", "to ONNX")],
)
def test_files_of_other_kinds_have_their_remedy(tmp_path, name, remedy):
    with pytest.raises(BundleError, match=f"{name} is .*{remedy}"):
        bundle_of(tmp_path / name, CLASSIFICATION, tmp_path / "bundle")


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.tflite", "model.pb", "model.pt2"])
@pytest.mark.parametrize("content", [b"", b"this is a text", bytes(range(256)) * 9], ids=["empty", "text", "bytes"])
def test_a_file_that_is_no_model_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")) as raised:
        bundle_of(tmp_path / name, CLASSIFICATION, tmp_path / "bundle")
    assert "\n" not in str(raised.value) and not (tmp_path / "bundle").exists()


OFFSETS = {"loc": np.float32([[0, 0, 0, 0], [1, 0, 0, 0]]), "conf": np.float32([[0, 0, 9, 0], [9, 0, 0, 0]])}
SSD = {**DETECTION, "decoder": "ssd", "priors": "anchors.npy", "outputs": {"offsets": "loc", "scores": "conf"}}


def test_boxes_that_are_offsets_are_placed_at_the_cards_anchors(tmp_path):
    np.save(tmp_path / "anchors.npy", np.array([[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.5, 0.5]]))
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", OFFSETS), SSD, tmp_path / "bundle")
    (predictions,) = predict(bundle, pictures((16, 8)))
    assert [p["label"] for p in predictions] == ["b"]
    np.testing.assert_allclose(boxes(predictions), [[4, 3, 12, 5]])


@pytest.mark.parametrize(
    ("priors", "message"),
    [
        (None, "add `priors: FILE.npy`"),
        (b"boxes", r"anchors.npy is no array"),
        (np.zeros((2, 5)), r"anchors.npy is \(2, 5\)"),
        (np.zeros((3, 4)), r"priors.npy is \(3, 4\)"),
    ],
    ids=["none", "another file", "five numbers", "too many"],
)
def test_anchors_that_do_not_fit_are_one_sentence(tmp_path, priors, message):
    path, card = save_onnx(tmp_path / "model.onnx", OFFSETS), dict(SSD)
    if priors is None:
        card.pop("priors")
    elif isinstance(priors, bytes):
        (tmp_path / "anchors.npy").write_bytes(priors)
    else:
        np.save(tmp_path / "anchors.npy", priors)
    with pytest.raises(BundleError, match=message) as raised:
        bundle_of(path, card, tmp_path / "bundle")
    assert "\n" not in str(raised.value) and not (tmp_path / "bundle").exists()


def test_weights_that_lie_elsewhere_are_asked_for(tmp_path):
    model = onnx.load(save_onnx(tmp_path / "model.onnx", {"logits": np.zeros(4000, np.float32)}))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=10)
    (tmp_path / "weights.data").unlink()
    with pytest.raises(BundleError, match="keeps its weights in 'weights.data', which is not beside it"):
        bundle_of(tmp_path / "model.onnx", CLASSIFICATION, tmp_path / "bundle")


def test_a_graph_of_several_inputs_names_them(tmp_path):
    images = [ov.opset13.parameter([1, 3, 8, 8], np.float32, name) for name in ("left", "right")]
    model = ov.Model([ov.opset13.reduce_mean(ov.opset13.add(*images), [2, 3])], images)
    for port, name in zip(model.inputs, ("left", "right"), strict=True):
        port.set_names({name})
    ov.save_model(model, tmp_path / "two.xml")
    with pytest.raises(BundleError, match=r"has the inputs left \[1,3,8,8\], right .*add `inputs: {NAME: \[...\]}`"):
        bundle_of(tmp_path / "two.xml", CLASSIFICATION, tmp_path / "bundle")


def save_scaled_boxes(path: Path) -> Path:
    """A detector of relative boxes that takes the image's size too, and a vector of the texts' network beside it."""
    ops = ov.opset13
    image, size = ops.parameter([-1, 3, 8, 8], np.float32, "image"), ops.parameter([-1, 2], np.int64, "size")
    nothing = ops.multiply(ops.reduce_mean(image, [1, 2, 3], keep_dims=True), np.float32(0))
    scale = ops.convert(ops.tile(ops.unsqueeze(size, 1), [1, 1, 2]), np.float32)
    outputs = {
        "boxes": ops.multiply(ops.add(ops.squeeze(nothing, [3]), BOXES[None] / 8), scale),
        "scores": ops.add(ops.squeeze(nothing, [2, 3]), SCORES[None]),
        "classes": ops.add(ops.squeeze(nothing, [2, 3]), CLASSES[None]),
        "lengths": ops.convert(ops.reduce_sum(size, [1], keep_dims=True), np.float32),
    }
    for name, node in outputs.items():
        node.output(0).set_names({name})
    model = ov.Model(list(outputs.values()), [image, size])
    for port, name in zip(model.inputs, ("image", "size"), strict=True):
        port.set_names({name})
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def test_other_inputs_than_the_image_are_constants_of_the_card(tmp_path):
    path = save_scaled_boxes(tmp_path / "model.xml")
    with pytest.raises(BundleError, match=r"add `inputs: {size: \[...\]}` to its card, with what they are"):
        bundle_of(path, DETECTION, tmp_path / "bundle")
    bundle = bundle_of(path, {**DETECTION, "inputs": {"size": [8, 8]}}, tmp_path / "bundle")
    (predictions,) = predict(bundle, pictures((16, 8)))
    np.testing.assert_allclose(boxes(predictions), [[4, 1, 12, 7]], rtol=1e-5)
    for constant, message in (("ten", "which takes numbers"), ([8, 8, 8], r"takes \[\?,2\]")):
        with pytest.raises(BundleError, match=f"its card has .* for the input size, {message}|size, which {message}"):
            bundle_of(path, {**DETECTION, "inputs": {"size": constant}}, tmp_path / "none")
    with pytest.raises(BundleError, match="no input 'sizes', which its card names; its inputs are image, size"):
        bundle_of(path, {**DETECTION, "inputs": {"sizes": [8, 8]}}, tmp_path / "none")


def test_inputs_that_no_output_needs_are_left_out(tmp_path):
    path = save_scaled_boxes(tmp_path / "model.xml")
    (tmp_path / "card.yaml").write_text("{task: embedding, outputs: {embedding: scores}}")
    model = convert_file(path, tmp_path / "card.yaml").model
    assert len(model.inputs) == 1
    np.testing.assert_allclose(ov.compile_model(model)(np.zeros((1, 8, 8, 3), np.uint8))[0], SCORES[None])


@pytest.mark.parametrize(
    ("columns", "order"),
    [
        ("", "box score class"),
        ("class score box", "class score box"),
        ("image box class score", "image box class score"),
        ("image box score class", "image box score class"),
    ],
)
def test_the_columns_of_a_table_are_told_by_their_values(tmp_path, columns, order):
    parts = {"box": BOXES, "score": SCORES[:, None], "class": CLASSES[:, None], "image": np.zeros((3, 1), np.float32)}
    table = np.concatenate([parts[name] for name in order.split()], axis=1)
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", {"out": table}), DETECTION, tmp_path / "bundle")
    assert bundle.manifest.postprocess.get("columns", "") == columns
    (predictions,) = predict(bundle, pictures((8, 8)))
    assert [p["label"] for p in predictions] == ["b"] and boxes(predictions) == [[2, 1, 6, 7]]


def test_boxes_with_scores_and_classes_are_enough_for_a_bundle(tmp_path):
    outputs = {"dets": np.concatenate([BOXES, SCORES[:, None]], axis=1), "labels": CLASSES}
    bundle = bundle_of(save_onnx(tmp_path / "model.onnx", outputs), DETECTION, tmp_path / "bundle")
    assert boxes(predict(bundle, pictures((8, 8)))[0]) == [[2, 1, 6, 7]]


@pytest.mark.parametrize(("layer", "decoder"), [("Sigmoid", "multi_label"), ("Softmax", "probabilities")])
def test_the_last_layer_says_what_a_classifiers_numbers_are(tmp_path, layer, decoder):
    model = onnx.load(save_onnx(tmp_path / "model.onnx", {"logits": np.float32([2, -1, 1])}))
    model.graph.node.append(helper.make_node(layer, ["logits"], ["out"]))
    model.graph.output[0].name = "out"
    onnx.save(model, tmp_path / "model.onnx")
    bundle = bundle_of(tmp_path / "model.onnx", CLASSIFICATION, tmp_path / "bundle")
    assert bundle.manifest.decoder == decoder
    (predictions,) = predict(bundle, pictures((8, 8)))
    labels = {p["label"]: round(p["score"], 2) for p in predictions}
    assert labels == ({"a": 0.88, "c": 0.73} if layer == "Sigmoid" else {"a": 0.71, "c": 0.26, "b": 0.04})


def test_an_outputs_name_may_be_a_number(tmp_path):
    path = save_onnx(tmp_path / "model.onnx", {"604": np.float32([0, 3, 1]), "618": np.float32([3, 0, 1])})
    bundle = bundle_of(path, {**CLASSIFICATION, "outputs": {"logits": 604}}, tmp_path / "bundle")
    assert predict(bundle, pictures((8, 8)))[0][0]["label"] == "b"


def test_a_missing_normalization_is_said(tmp_path, caplog):
    path = save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])})
    bundle_of(path, CLASSIFICATION, tmp_path / "bundle")
    assert "its card has no mean and std" in caplog.text
    caplog.clear()
    bundle_of(path, {**CLASSIFICATION, "input": {"std": 255}}, tmp_path / "other")
    assert "mean" not in caplog.text


def test_one_number_is_that_of_every_channel(tmp_path):
    for channels in (1, 3):
        path = save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}, ("n", channels, 8, 8))
        card = {**CLASSIFICATION, "input": {"mean": 100, "std": [50, 50, 50]}}
        spec = bundle_of(path, card, tmp_path / "bundle").manifest.input
        assert (spec.mean, spec.std) == ((100.0,) * channels, (50.0,) * channels)


def test_outputs_without_a_role_are_said(tmp_path, caplog):
    outputs = {"logits": np.float32([0, 3, 1]), "features": np.ones((4, 2, 2), np.float32)}
    path = save_onnx(tmp_path / "model.onnx", outputs)
    bundle_of(path, CLASSIFICATION, tmp_path / "bundle")
    assert "outputs features have no role" in caplog.text
    caplog.clear()
    bundle_of(path, {**CLASSIFICATION, "outputs": {"logits": "logits"}}, tmp_path / "other")
    assert "no role" not in caplog.text


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT32])
def test_a_graph_of_whole_numbers_normalizes_them_itself(tmp_path, kind):
    model = onnx.load(save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}))
    model.graph.input[0].type.tensor_type.elem_type = kind
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "real"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="takes whole numbers and normalizes them itself: leave mean and std out"):
        bundle_of(tmp_path / "model.onnx", {**CLASSIFICATION, "input": {"std": 255}}, tmp_path / "none")
    bundle = bundle_of(tmp_path / "model.onnx", CLASSIFICATION, tmp_path / "bundle")
    assert predict(bundle, pictures((8, 8)))[0][0]["label"] == "b"


def test_layers_that_openvino_lacks_are_named(tmp_path):
    model = onnx.load(save_onnx(tmp_path / "model.onnx", {"logits": np.float32([0, 3, 1])}))
    model.graph.node.append(helper.make_node("Unheard", ["logits"], ["out"], domain="com.example"))
    model.graph.output[0].name = "out"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BundleError, match=r"operations: com.example.Unheard.*export it without these"):
        bundle_of(tmp_path / "model.onnx", CLASSIFICATION, tmp_path / "bundle")


def test_the_command_makes_a_bundle_of_a_file_and_explains_mistakes(tmp_path, capsys):
    path = save_onnx(tmp_path / "model.onnx", {"output0": YOLO}, metadata=ultralytics("detect"))
    assert cli.main(["export", "--file", str(path), "--output", str(tmp_path / "bundle"), "--keep-onnx"]) == 0
    assert json.loads(capsys.readouterr().out)["model"].startswith("model-fp32@")
    assert "model.onnx" in load_bundle(open_storage(str(tmp_path / "bundle"))).manifest.files
    for mistake in (
        ["--architecture", "fashion_cnn"],
        ["--checkpoint", str(path)],
        ["--card", str(tmp_path / "no.yaml")],
    ):
        arguments = ["export", "--file", str(path), "--output", str(tmp_path / "none"), *mistake]
        assert cli.main(arguments) == 2 and not (tmp_path / "none").exists()
        assert capsys.readouterr().err.count("error: ") == 1


@pytest.fixture(scope="module")
def first_look() -> Path:
    return first_look_data.download(load_config("local").paths.data)


def test_a_person_is_pointed_at_by_a_file_for_one_image(first_look, tmp_path):
    labels = [f"point {number}" for number in range(17)]
    card = {
        "task": "keypoints",
        "labels": ["person"],
        "input": {"resize": "letterbox"},
        "postprocess": {"order": "yx"},
    }
    path = tmp_path / "movenet.tflite"
    path.write_bytes((first_look / "models" / "movenet_lightning.tflite").read_bytes())
    bundle = bundle_of(path, card, tmp_path / "bundle")
    assert bundle.manifest.batch == 1
    photograph = (first_look / "media/photographs/astronaut.png").read_bytes()
    (prediction,) = predict(bundle, [photograph])[0]
    assert len(prediction["keypoints"]) == len(labels)
    nose = prediction["keypoints"][0]
    assert np.hypot(nose["x"] - 226, nose["y"] - 110) < 15  # where it is on the photograph


@pytest.mark.parametrize("name", ["metadata.json", "temp_meta.txt"])
def test_ultralytics_files_of_tensorflow_lite_need_no_card(first_look, tmp_path, name):
    path = tmp_path / "model.tflite"
    path.write_bytes((first_look / "models" / "efficientnet_lite3.tflite").read_bytes())
    about = {"names": {n: f"class {n}" for n in range(1000)}, "stride": 1, "task": "classify", "args": {"nms": None}}
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, json.dumps(about) if name.endswith("json") else str(about))
    manifest = bundle_of(path, None, tmp_path / "bundle").manifest
    assert (manifest.task, manifest.labels[7], manifest.input.std) == ("classification", "class 7", (1.0,) * 3)
