"""8 bits, with what they lose measured on a small trained network and mended by layers that stay in floating point."""

import logging
from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
import torch
from manifests import make_manifest
from openvino import opset13 as ops

from fashion_data import load
from helpers.bundle.manifest import load_bundle
from helpers.errors import BundleError
from helpers.export import conversion as export
from helpers.export import evaluation, quantization
from helpers.export.architectures import get_architecture
from helpers.export.quantization import Validation
from helpers.storage import open_storage


@pytest.fixture(scope="module")
def architecture():
    return get_architecture("fashion_cnn")


@pytest.fixture(scope="module")
def images(fashion_mnist_root) -> np.ndarray:
    return load(fashion_mnist_root, train=False)[0][:200, ..., None]


@pytest.fixture(scope="module")
def sensitive(architecture, tmp_path_factory):
    """A network whose first layer 8 bits harm: one of its channels is a thousand times as large as the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = architecture.build().eval()
    with torch.inference_mode():
        network.features[0][1].weight[0] *= 1000
        network.features[1][0].weight[:, 0] /= 1000
    path = tmp_path_factory.mktemp("sensitive") / "weights.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def converted(sensitive, architecture):
    return export.to_openvino(export.to_onnx(export.load_network(architecture, sensitive), architecture), architecture)


@pytest.fixture(scope="module")
def make(converted, architecture, sensitive, images, tmp_path_factory):
    def bundle(validation: Validation | None):
        target = open_storage(str(tmp_path_factory.mktemp("int8")))
        return export.make_bundle(converted, architecture, sensitive, target, "int8", images[:64], validation)

    return bundle


@pytest.fixture(scope="module")
def classes(converted, images) -> list[int]:
    """What the network said before it was quantised."""
    return quantization.compile_exactly(converted)(images)["logits"].argmax(axis=1).tolist()


def agreement(bundle, images: np.ndarray, classes: list[int]) -> float:
    model = ov.Core().read_model(bundle.read("model.xml"), bundle.read("model.bin"))
    return float((quantization.compile_exactly(model)(images)["logits"].argmax(axis=1) == classes).mean())


@pytest.fixture(scope="module")
def careless(make, images):
    return make(Validation(list(images), max_drop=1.0))


@pytest.fixture(scope="module")
def careful(make, images):
    return make(Validation(list(images), max_drop=0.1))


def test_what_was_lost_is_measured_and_recorded(careless, images, classes):
    record = careless.manifest.quantization
    assert record["measure"] == "accuracy against the model before" and record["before"] == 1
    assert record["after"] == pytest.approx(agreement(careless, images, classes), abs=1e-4)
    assert record["after"] < 0.5  # or the next test would show nothing
    assert record["float_layers"] == []
    assert load_bundle(careless.storage).manifest.quantization == record


def test_layers_that_lose_too_much_stay_in_floating_point(careful, careless, images, classes):
    record = careful.manifest.quantization
    assert record["after"] >= 0.9
    assert agreement(careful, images, classes) >= 0.9
    assert record["float_layers"] == ["features.1.1/Conv"]  # what takes the channels of unequal size
    assert len(careful.read("model.bin")) > len(careless.read("model.bin"))


def test_layers_are_not_looked_for_without_end(make, images, classes, caplog, monkeypatch):
    monkeypatch.setattr(quantization, "MAX_SECONDS", 0)
    with caplog.at_level(logging.WARNING):
        bundle = make(Validation(images, classes, 0.01))
    assert bundle.manifest.quantization["float_layers"] == []
    assert "all are of 8 bits" in caplog.text and "int8 loses more than asked for" in caplog.text


def test_a_graph_that_nncf_does_not_take_is_one_sentence(make, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr("nncf.quantize", refuse)
    with pytest.raises(BundleError, match=r"fashion_cnn \(no such operation\); export it with --precision fp16"):
        make(None)


def test_branches_of_a_graph_do_not_keep_it_from_8_bits():
    image = ops.parameter([1, 8, 8, 3], np.uint8, name="images")
    values = ops.convert(image, np.float32)
    bodies = []
    for offset in (0, 1):
        inside = ops.parameter([1, 8, 8, 3], np.float32)
        bodies.append(ov.Model([ops.result(ops.add(inside, np.float32(offset)))], [inside]))
    is_bright = ops.greater(ops.reduce_mean(values, [0, 1, 2, 3]), np.float32(9))
    branch = ops.if_op(is_bright.output(0))
    branch.set_then_body(bodies[0])
    branch.set_else_body(bodies[1])
    branch.set_input(values.output(0), bodies[0].get_parameters()[0], bodies[1].get_parameters()[0])
    out = branch.set_output(bodies[0].get_results()[0], bodies[1].get_results()[0])
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    layer = ops.convolution(ops.transpose(out, [0, 3, 1, 2]), weights, [1, 1], [0, 0], [0, 0], [1, 1])
    logits = ops.reduce_mean(layer, [2, 3])
    logits.output(0).get_tensor().set_names({"logits"})
    model = ov.Model([ops.result(logits)], [image])
    manifest = make_manifest("classification", "", labels=tuple("abcd"), outputs={"logits": (4,)})
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (8, 8, 3), np.uint8) for _ in range(4)]
    quantized, record, _ = quantization.quantize(model, pictures, manifest, {})
    assert any(node.get_type_name() == "FakeQuantize" for node in quantized.get_ops())
    assert record.float_layers == []


def test_truth_is_what_is_measured_by_where_it_is_given(make, images, classes):
    wrong = [(c + 1) % 10 for c in classes[:100]] + classes[100:]
    record = make(Validation(list(images), wrong, max_drop=1.0)).manifest.quantization
    assert record["measure"] == "accuracy" and record["before"] == 0.5


def test_a_loss_that_cannot_be_mended_is_warned_of(make, images, caplog, monkeypatch):
    monkeypatch.setattr(quantization, "MAX_GROUPS", 1)
    with caplog.at_level(logging.WARNING, logger="helpers"):
        make(Validation(list(images), max_drop=0.05))  # which takes two
    assert "loses more than asked for" in caplog.text


def test_without_validation_the_calibration_images_show_the_loss(make, monkeypatch):
    seen = []
    predict = evaluation.predict

    def spy(engine, images, *rest):
        seen.append(len(images))
        return predict(engine, images, *rest)

    monkeypatch.setattr(evaluation, "predict", spy)
    monkeypatch.setattr(quantization, "MAX_DISAGREEMENT", 1.0)
    assert make(None).manifest.quantization["measure"] == "accuracy against the model before"
    assert max(seen) == 64


def test_images_in_which_nothing_is_found_show_no_loss_and_that_is_said(converted, make, images, caplog, monkeypatch):
    manifest = replace(make(Validation(list(images[:4]), max_drop=1.0)).manifest, task="instance_segmentation")
    monkeypatch.setattr(evaluation, "predict", lambda *_: [[]])
    measure = quantization.Measure.of(
        evaluation.compiled_engine(quantization.compile_exactly(converted)), Validation([images[0]]), manifest, {}
    )
    assert measure.before == 1 and "nothing is found" in caplog.text


def test_what_follows_the_last_convolution_stays_out_of_8_bits():
    images = ops.parameter([1, 8, 8, 8], np.float32, "images")
    weights = ops.constant(np.ones((4, 8, 3, 3), np.float32))
    hidden = ops.relu(ops.convolution(images, weights, [1, 1], [0, 0], [0, 0], [1, 1]), name="hidden")
    scores = ops.matmul(
        ops.reduce_mean(hidden, [2, 3]), ops.constant(np.ones((4, 5), np.float32)), False, False, name="scores"
    )
    classes = ops.add(
        ops.convert(ops.topk(scores, 1, 1, "max", "value").output(1), "f32", name="number"), np.float32(1), name="id"
    )
    tail = quantization.find_tail(ov.Model([scores, classes], [images]))
    assert {"number", "id"} <= {*tail} and not {"hidden", "scores", "images"} & {*tail}
