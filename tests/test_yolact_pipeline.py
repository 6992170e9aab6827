"""From an official kind of checkpoint to results, with a ResNet-50 network of arbitrary weights."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pyarrow as pa
import pytest
import torch
import yolact_oracle as oracle
from pycocotools import mask as coco
from torch import nn

from helpers.bundle.manifest import Bundle, load_bundle
from helpers.bundle.runtime import compile_options
from helpers.cli import main
from helpers.config import load_config
from helpers.errors import BundleError, ConfigError
from helpers.export import conversion as export
from helpers.export.architectures import get_architecture
from helpers.images import drawing as pictures
from helpers.pipeline import make_task, stages
from helpers.pipeline.listing import assign, list_images, plan
from helpers.storage import open_storage
from helpers.tasks import get_arrays, parameters_for, predict
from helpers.yolact import build
from helpers.yolact.configurations import COCO_CLASSES

NAME = "yolact_resnet50"
SIZES = [(640, 480), (300, 500), (1280, 720)]


def photograph(seed: int, width: int, height: int) -> np.ndarray:
    """Shapes of all colors on a gradient with texture, uint8 BGR."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(8):
        centre = tuple(int(v) for v in rng.integers(0, (width, height)))
        axes = tuple(int(v) for v in rng.integers(10, min(width, height) // 3, 2))
        cv2.ellipse(image, centre, axes, float(rng.integers(180)), 0, 360, rng.integers(0, 256, 3).tolist(), -1)
    return cv2.add(image, rng.integers(0, 25, image.shape).astype(np.uint8))


def normalize(images: list[np.ndarray]) -> torch.Tensor:
    """What the network takes, from decoded BGR images, in plain steps."""
    spec = get_architecture(NAME).input
    pixels = np.stack([cv2.resize(i, (spec.width, spec.height))[..., ::-1] for i in images]).astype(np.float32)
    values = (pixels - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Three JPEG files, and one that is none."""
    folder = tmp_path_factory.mktemp("photographs")
    for i, size in enumerate(SIZES):
        cv2.imwrite(str(folder / f"{i}.jpg"), photograph(i, *size))
    (folder / "3.jpg").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def decoded(photographs) -> list[np.ndarray]:
    return [cv2.imread(str(photographs / f"{i}.jpg")) for i in range(len(SIZES))]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Arbitrary weights that keep the signal's size through the layers and leave a few hundred probable anchors."""
    torch.manual_seed(5)
    net = build(NAME)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # of running averages: those of one batch
    images = normalize([photograph(9, 550, 550)])
    with torch.inference_mode():
        head = net.prediction_layers[0]
        conf = net.train()(images)[1]
        head.mask_layer.weight *= 0.7 / conf.std()  # it has as many inputs, so its outputs are as large
        head.conf_layer.weight *= 1.2 / conf.std()
        loc, conf, *_ = net.train()(images)
        head.bbox_layer.weight *= 1.5 / loc.std()
        foreground = conf[0, :, 1:].max(dim=1).values - conf[0, :, 0]
        # 300 anchors have a class as probable as the background.
        head.conf_layer.bias.view(3, 81)[:, 0] += foreground.sort(descending=True).values[300]
        net.proto_net[10].weight *= 1 / net(images)[4].std()
    return net.eval()


@pytest.fixture(scope="module")
def checkpoint_file(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official") / "yolact_resnet50_54_800000.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint_file, tmp_path_factory) -> tuple[Bundle, onnx.ModelProto]:
    """The bundle that the command of users makes, and the simplified ONNX graph on the way to it."""
    graphs: list[onnx.ModelProto] = []

    def simplify(model: onnx.ModelProto, original=export.simplify) -> onnx.ModelProto:
        graphs.append(original(model))
        return graphs[-1]

    folder = str(tmp_path_factory.mktemp("yolact_bundle"))
    command = ["export", "--architecture", NAME, "--checkpoint", str(checkpoint_file), "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "simplify", simplify)
        assert main(command) == 0
    (graph,) = graphs
    return load_bundle(open_storage(folder)), graph


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return exported[0]


@pytest.fixture(scope="module")
def heads(network, decoded) -> list[np.ndarray]:
    with torch.inference_mode():
        return [output.numpy() for output in network(normalize(decoded))]


@pytest.fixture(scope="module")
def expected(heads, decoded) -> list[tuple]:
    """What the specification makes of the network's own outputs."""
    loc, conf, mask, priors, proto = heads
    return [
        oracle.postprocess(loc[i], conf[i], mask[i], priors, proto[i], image.shape[1], image.shape[0])
        for i, image in enumerate(decoded)
    ]


def results(photographs, bundle, tmp_path, **settings) -> list[dict]:
    config = load_config("local", **settings)
    task = make_task(str(photographs), bundle.storage.root, str(tmp_path), config)
    images = list_images(task.source, config).images
    table = pa.Table.from_batches(list(task.results(assign(images, plan(images, 1, config)).to_batches())))
    assert table.schema == stages.RESULT_SCHEMA
    return table.sort_by("path").to_pylist()


@pytest.fixture(scope="module")
def rows(photographs, bundle, tmp_path_factory) -> list[dict]:
    return results(photographs, bundle, tmp_path_factory.mktemp("output"))


def agree(found: dict[str, np.ndarray], heads: list[np.ndarray], count: int) -> None:
    for name, expected in zip(("loc", "conf", "mask", "proto"), [*heads[:3], heads[4]], strict=True):
        assert found[name].shape == expected[:count].shape
        error = np.linalg.norm(found[name] - expected[:count]) / np.linalg.norm(expected[:count])
        assert error <= 1e-4, (name, error)


def test_the_bundle_says_how_it_is_run(bundle):
    made = bundle.manifest
    assert (made.name, made.task, made.arithmetic) == (f"{NAME}-fp32", "instance_segmentation", "f32")
    assert made.labels == COCO_CLASSES
    assert {o.name: o.shape for o in made.outputs} == {
        "loc": (19248, 4),
        "conf": (19248, 81),
        "mask": (19248, 32),
        "proto": (138, 138, 32),
    }
    assert set(made.files) == {"model.xml", "model.bin", "priors.npy"}
    assert made.postprocess == {
        "score_threshold": 0.05,
        "nms": "fast",
        "nms_threshold": 0.5,
        "top_k": 200,
        "max_detections": 100,
        "mask_threshold": 0.5,
    }
    assert made.checkpoint["file"] == "yolact_resnet50_54_800000.pth"
    assert made.input.mean == (123.68, 116.78, 103.94) and made.input.std == (58.40, 57.12, 57.38)


def test_the_bundles_anchors_are_the_networks(bundle, network):
    arrays = get_arrays(bundle.manifest, bundle.read)
    np.testing.assert_array_equal(arrays["priors.npy"], network.priors)
    assert get_arrays(bundle.manifest, bundle.read) is arrays  # read once a worker


@pytest.mark.parametrize("batch", [1, 2])
def test_openvino_gives_the_networks_outputs(bundle, decoded, heads, batch):
    core = ov.Core()
    model = core.read_model(bundle.read("model.xml"), bundle.read("model.bin"))
    compiled = core.compile_model(model, "CPU", compile_options("f32", 2))
    images = np.stack([cv2.resize(image, (550, 550))[..., ::-1] for image in decoded[:batch]])
    found = compiled(images)
    agree({name: found[name] for name in ("loc", "conf", "mask", "proto")}, heads, batch)


def test_simplified_onnx_gives_the_networks_outputs_for_any_batch(exported, decoded, heads):
    architecture = get_architecture(NAME)
    session = onnxruntime.InferenceSession(exported[1].SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 2):
        outputs = session.run(None, {"images": normalize(decoded[:batch]).numpy()})
        agree(dict(zip(architecture.outputs, outputs, strict=True)), heads, batch)


def test_the_pipeline_finds_what_the_specification_finds(rows, expected):
    assert [(row["width"], row["height"]) for row in rows[:3]] == SIZES
    for row, found in zip(rows, expected, strict=False):
        assert len(row["predictions"]) == len(found[0]) == 100
        assert [p["score"] for p in row["predictions"]] == sorted(
            (p["score"] for p in row["predictions"]), reverse=True
        )
        assert all(p["label"] == COCO_CLASSES[p["class_id"]] for p in row["predictions"])
        assert sum(coco.area(p["mask"]) for p in row["predictions"]) > 0.1 * row["width"] * row["height"]
        same = [any(is_same(p, *one) for p in row["predictions"]) for one in zip(*found, strict=True)]
        # The last of a hundred, or one near a threshold, may be another after a different order of additions.
        assert sum(same) >= 97


def is_same(prediction: dict, box, class_id, score, mask) -> bool:
    place = np.abs(np.array(list(prediction["box"].values())) - box.numpy()).max()
    if prediction["class_id"] != class_id or abs(prediction["score"] - float(score)) > 1e-3 or place > 1:
        return False
    other = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return coco.iou([prediction["mask"]], [other], [0])[0, 0] >= 0.99 or coco.area(other) < 100


def test_a_file_that_is_no_image_is_an_error_between_detections(rows):
    assert len(rows) == 4 and rows[3]["predictions"] is None and "not an image" in rows[3]["error"]
    assert all(row["error"] is None for row in rows[:3])


def test_a_run_can_set_the_thresholds(photographs, bundle, rows, tmp_path):
    settings = {"postprocess.score_threshold": 0.3, "postprocess.max_detections": 5}
    changed = results(photographs, bundle, tmp_path, **settings)
    assert changed[0]["model"] != rows[0]["model"]
    for row, before in zip(changed[:3], rows, strict=False):
        assert row["predictions"] == [p for p in before["predictions"] if p["score"] > 0.3][:5]
    assert any(row["predictions"] for row in changed[:3])


def test_an_image_without_detections_has_an_empty_list(photographs, bundle, tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("2.jpg", "3.jpg"):
        shutil.copy(photographs / name, tmp_path / "two")
    found = results(tmp_path / "two", bundle, tmp_path / "output", **{"postprocess.score_threshold": 1})
    assert [row["predictions"] for row in found] == [[], None]
    assert [row["error"] is None for row in found] == [True, False]


def test_a_parameter_that_cannot_be_is_told_before_a_run(bundle):
    with pytest.raises(ConfigError, match="postprocess.nms is not one of fast, cross_class, traditional"):
        parameters_for(bundle.manifest, {"nms": "soft"})
    with pytest.raises(ConfigError, match=r"postprocess\.iou.*nms_threshold"):
        parameters_for(bundle.manifest, {"iou": 0.5})


def test_damaged_anchors_are_found_by_their_hash(bundle, tmp_path):
    storage = open_storage(str(tmp_path))
    for name in ("manifest.json", "priors.npy"):
        storage.write(name, bundle.storage.read(name))
    changed = np.load(io.BytesIO(storage.read("priors.npy")))
    np.save(tmp_path / "priors.npy", changed + 1)
    damaged = load_bundle(storage)
    other = replace(damaged.manifest, name="other")  # of which nothing has been read yet
    with pytest.raises(BundleError, match="priors.npy is damaged"):
        get_arrays(other, damaged.read)


def test_a_bundle_without_anchors_says_so(bundle, heads):
    outputs = dict(zip(("loc", "conf", "mask", "proto"), [*heads[:3], heads[4]], strict=True))
    with pytest.raises(BundleError, match="no priors.npy"):
        predict(outputs, SIZES, bundle.manifest, bundle.manifest.postprocess)


def test_pictures_show_probable_detections_in_the_colors_of_their_classes(decoded, rows):
    predictions = rows[0]["predictions"]
    before = decoded[0].copy()
    assert sum(p["score"] >= 0.3 for p in predictions) > 0
    drawn = pictures.draw(decoded[0], predictions)
    np.testing.assert_array_equal(decoded[0], before)
    assert drawn.shape == before.shape and (drawn != before).any()
    np.testing.assert_array_equal(drawn, pictures.draw(before, [p for p in predictions if p["score"] >= 0.3]))
    np.testing.assert_array_equal(before, pictures.draw(before, [p for p in predictions if p["score"] < 0.3]))


def test_a_damaged_networks_outputs_give_no_detections(bundle, heads):
    outputs = {name: np.full_like(v[:1], np.nan) for name, v in zip(("loc", "conf", "mask"), heads, strict=False)}
    outputs["proto"] = np.full_like(heads[4][:1], np.nan)
    arrays = get_arrays(bundle.manifest, bundle.read)
    assert predict(outputs, SIZES[:1], bundle.manifest, bundle.manifest.postprocess, arrays) == [[]]


def test_a_class_has_its_own_color_in_every_picture():
    colors = [pictures.color_of(c) for c in range(80)]
    assert len(set(colors)) > 70 and all(max(color) == 255 for color in colors)
    image = np.zeros((300, 300, 3), np.uint8)
    one = {"class_id": 3, "label": "x", "score": 0.5, "mask": None, "box": {"x1": 50, "y1": 60, "x2": 250, "y2": 260}}
    drawn = pictures.draw(image, [one])
    assert drawn[160, 50].tolist() == list(pictures.color_of(3)) and not drawn[:40].any()
    assert not pictures.draw(image, [one], threshold=0.6).any()
    outside = {**one, "box": {"x1": 310, "y1": -20, "x2": 300, "y2": 5}}
    assert pictures.draw(image, [outside]).shape == image.shape
