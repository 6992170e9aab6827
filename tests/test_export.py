import re

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch

from fashion_data import CLASSES, load
from fashion_mnist import FashionCNN, compute_logits
from helpers.bundle import runtime
from helpers.bundle.manifest import load_bundle
from helpers.bundle.runtime import compile_options, get_model, has_bf16
from helpers.config import PROJECT
from helpers.errors import BundleError
from helpers.export import conversion as export
from helpers.export.architectures import get_architecture
from helpers.export.quantization import Validation
from helpers.storage import open_storage
from studies.formats import onnx_engine, torch_engine

BATCHES = [1, 3, 64]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def architecture():
    return get_architecture("fashion_cnn")


@pytest.fixture(scope="module")
def network(architecture, checkpoint):
    return export.load_network(architecture, checkpoint)


@pytest.fixture(scope="module")
def exported(network, architecture):
    return export.to_onnx(network, architecture)


@pytest.fixture(scope="module")
def simplified(exported):
    return export.simplify(exported)


@pytest.fixture(scope="module")
def converted(simplified, architecture):
    return export.to_openvino(simplified, architecture)


@pytest.fixture(scope="module")
def images(fashion_mnist_root) -> np.ndarray:
    """Test images, uint8 [N, 28, 28, 1]."""
    return load(fashion_mnist_root, train=False)[0][:512, ..., None]


@pytest.fixture(scope="module")
def expected(network, images) -> np.ndarray:
    return compute_logits(network, torch.as_tensor(images[..., 0])).numpy()


def logits_of(bundle, images: np.ndarray) -> np.ndarray:
    return next(get_model(bundle).infer([(None, images)]))[1]["logits"]


def test_a_network_is_loaded_for_evaluation(network):
    assert not network.training


def test_the_onnx_graph_is_valid_and_of_a_recent_opset(exported):
    onnx.checker.check_model(exported, full_check=True)
    assert exported.opset_import[0].version >= 17
    assert [i.name for i in exported.graph.input] == ["images"]
    assert [o.name for o in exported.graph.output] == ["logits"]
    assert not exported.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", ["exported", "simplified"])
def test_onnx_gives_the_networks_outputs_for_any_batch(request, form, batch, architecture, images, expected, tmp_path):
    onnx.save(request.getfixturevalue(form), tmp_path / "model.onnx")
    found = onnx_engine(tmp_path / "model.onnx", architecture)(images[:batch])
    np.testing.assert_allclose(found["logits"], expected[:batch], atol=TOLERANCE)


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_the_opset_can_be_chosen_and_changes_no_output(opset, network, architecture, images, expected, tmp_path):
    model = export.simplify(export.to_onnx(network, architecture, opset))
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    onnx.save(model, tmp_path / "model.onnx")
    for batch in (1, 3):
        found = onnx_engine(tmp_path / "model.onnx", architecture)(images[:batch])
        np.testing.assert_allclose(found["logits"], expected[:batch], atol=TOLERANCE)


@pytest.mark.parametrize("opset", [10, 99])
def test_an_opset_that_cannot_be_exported_names_those_that_can(opset, network, architecture):
    with pytest.raises(BundleError, match=f"opset {opset}.*from 11 to 23"):
        export.to_onnx(network, architecture, opset)


@pytest.mark.parametrize("opset", [11, 18])
def test_yolact_is_converted_for_old_engines_and_new_with_the_networks_outputs(opset, tmp_path):
    architecture = get_architecture("yolact_scenes")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = architecture.build().eval()
    model = export.simplify(export.to_onnx(network, architecture, opset))
    assert model.opset_import[0].version == opset
    onnx.save(model, tmp_path / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, *architecture.input.shape), np.uint8)
    for batch in (1, 3):
        expected = torch_engine(network, architecture)(pixels[:batch])
        found = onnx_engine(tmp_path / "model.onnx", architecture)(pixels[:batch])
        assert set(found) == {"loc", "conf", "mask", "proto"}
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=TOLERANCE)


def test_nodes_are_named_after_modules_and_tell_nothing_of_the_machine(exported, converted):
    assert [node.name for node in exported.graph.node][:3] == [
        "features.0.1/Conv",
        "features.0.2/Relu",
        "features.0.3/MaxPool",
    ]
    assert len({node.name for node in exported.graph.node}) == len(exported.graph.node)
    assert str(PROJECT).encode() not in exported.SerializeToString()
    assert "features.0.1/Conv" in {node.get_friendly_name() for node in converted.get_ops()}


def test_simplification_leaves_fewer_nodes_and_the_same_outputs(exported, simplified):
    onnx.checker.check_model(simplified, full_check=True)
    assert len(simplified.graph.node) <= len(exported.graph.node)
    inputs = {"images": np.random.default_rng(0).standard_normal((5, 1, 28, 28), np.float32)}
    before, after = (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for model in (exported, simplified)
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_openvino_counts_no_users():
    """Each count would be a fork of this process, and a request to a server."""
    from openvino.tools.ovc import convert_impl

    assert convert_impl.tm.__name__ == "openvino.tools.ovc.telemetry_stub"


def test_openvino_takes_uint8_images_with_channels_last(converted):
    (taken,) = converted.inputs
    assert taken.get_element_type() == ov.Type.u8
    assert taken.get_partial_shape() == ov.PartialShape([-1, 28, 28, 1])
    assert [output.get_names() for output in converted.outputs] == [{"logits"}]


@pytest.mark.parametrize("batch", BATCHES)
def test_openvino_gives_the_networks_outputs_for_any_batch(converted, batch, images, expected):
    compiled = ov.Core().compile_model(converted, "CPU", compile_options("f32", 1))
    np.testing.assert_allclose(compiled(images[:batch])["logits"], expected[:batch], atol=TOLERANCE)


def test_a_bundle_gives_the_networks_outputs(bundle_uri, images, expected):
    bundle = load_bundle(open_storage(bundle_uri))
    np.testing.assert_allclose(logits_of(bundle, images), expected, atol=TOLERANCE)
    np.testing.assert_array_equal(logits_of(bundle, images).argmax(axis=1), expected.argmax(axis=1))


def test_a_bundles_manifest_says_what_a_pipeline_needs(bundle_uri, checkpoint, architecture):
    manifest = load_bundle(open_storage(bundle_uri)).manifest
    assert (manifest.name, manifest.task, manifest.precision) == ("fashion_cnn-fp32", "classification", "fp32")
    assert manifest.input == architecture.input
    assert manifest.labels == tuple(CLASSES)
    assert [(output.name, output.shape) for output in manifest.outputs] == [("logits", (10,))]
    assert manifest.checkpoint["file"] == checkpoint.name
    assert re.fullmatch(r"[0-9a-f]{64}", manifest.checkpoint["sha256"])
    assert set(manifest.files) == {"model.xml", "model.bin"}


def test_the_same_checkpoint_gives_the_same_model(bundle_uri, checkpoint, tmp_path):
    again = export.export("fashion_cnn", checkpoint, open_storage(str(tmp_path)))
    assert again.manifest.model == load_bundle(open_storage(bundle_uri)).manifest.model


def test_half_precision_halves_the_weights_and_keeps_the_outputs(
    converted, architecture, checkpoint, bundle_uri, tmp_path, images, expected
):
    half = export.make_bundle(converted, architecture, checkpoint, open_storage(str(tmp_path)), "fp16")
    full = load_bundle(open_storage(bundle_uri))
    assert len(half.read("model.bin")) / len(full.read("model.bin")) == pytest.approx(0.5, abs=0.03)
    np.testing.assert_allclose(logits_of(half, images), expected, atol=1e-2)
    assert half.manifest.name == "fashion_cnn-fp16" and half.manifest.arithmetic == "f32"


def test_bfloat16_is_half_precision_weights_and_an_arithmetic_that_is_written_down(
    converted, architecture, checkpoint, tmp_path, images, expected
):
    made = {
        precision: export.make_bundle(
            converted, architecture, checkpoint, open_storage(str(tmp_path / precision)), precision
        )
        for precision in ("fp16", "bf16")
    }
    assert made["bf16"].manifest.name == "fashion_cnn-bf16"
    assert (made["bf16"].manifest.precision, made["bf16"].manifest.arithmetic) == ("bf16", "bf16")
    assert made["bf16"].manifest.files == made["fp16"].manifest.files
    compiled = get_model(load_bundle(open_storage(str(tmp_path / "bf16")))).compiled
    wanted = ov.Type.bf16 if has_bf16() else ov.Type.f32
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == wanted
    difference = np.abs(logits_of(made["bf16"], images) - expected).max()
    assert difference < 0.05 * np.abs(expected).max()
    assert not has_bf16() or difference > 10 * np.abs(logits_of(made["fp16"], images) - expected).max() > 0


def test_bfloat16_on_a_processor_without_it_is_warned_of(
    converted, architecture, checkpoint, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(export, "has_bf16", lambda: False)
    monkeypatch.setattr(runtime, "has_bf16", lambda: False)
    bundle = export.make_bundle(converted, architecture, checkpoint, open_storage(str(tmp_path)), "bf16")
    assert "no bfloat16" in caplog.text
    caplog.clear()
    get_model(bundle, threads=2)  # of which the cache of models knows nothing yet
    assert "no bfloat16" in caplog.text and bundle.manifest.model in caplog.text


def test_eight_bits_are_smaller_still_and_close(
    converted, architecture, checkpoint, bundle_uri, tmp_path, images, expected
):
    # A processor without 8-bit units loses more, and then layers would be returned to floating point.
    anything = Validation(list(images[:64]), max_drop=1.0)
    target = open_storage(str(tmp_path))
    small = export.make_bundle(converted, architecture, checkpoint, target, "int8", images[:64], anything)
    full = load_bundle(open_storage(bundle_uri))
    assert len(small.read("model.bin")) < 0.4 * len(full.read("model.bin"))
    assert b"FakeQuantize" in small.read("model.xml")
    difference = np.abs(logits_of(small, images) - expected).mean()
    assert 0 < difference < 0.2 * expected.std()
    # The model that was quantised is not changed by it.
    assert not [node for node in converted.get_ops() if node.get_type_name() == "FakeQuantize"]


@pytest.mark.parametrize("calibration", [(), iter([])])
def test_eight_bits_without_images_to_calibrate_with_is_explained(
    converted, architecture, checkpoint, tmp_path, calibration
):
    with pytest.raises(BundleError, match="--calibration"):
        export.make_bundle(converted, architecture, checkpoint, open_storage(str(tmp_path)), "int8", calibration)
    assert list(tmp_path.iterdir()) == []


def test_calibration_images_are_prepared_as_the_pipelines_and_damaged_ones_left_out(samples, architecture, config):
    found = list(export.calibration_images(open_storage(str(samples)), architecture, config))
    assert len(found) == 60
    assert {image.shape for image in found} == {(28, 28, 1)} and {image.dtype for image in found} == {np.dtype("uint8")}


def test_calibration_takes_a_bounded_number_from_all_over_the_folder(test_images, architecture, config):
    from helpers.images.decoding import decode, fit

    found = list(export.calibration_images(open_storage(str(test_images)), architecture, config))
    assert len(found) == export.CALIBRATION_IMAGES
    late = [
        fit(decode(p.read_bytes(), 10**6), architecture.input) for p in sorted((test_images / "09").iterdir())[-200:]
    ]
    assert any(np.array_equal(image, other) for image in late for other in found[-10:])


def test_an_unknown_precision_lists_the_known(converted, architecture, checkpoint, tmp_path):
    with pytest.raises(BundleError, match="fp4.*fp32, fp16, bf16, int8"):
        export.make_bundle(converted, architecture, checkpoint, open_storage(str(tmp_path)), "fp4")


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(BundleError, match="'lenet'.*fashion_cnn"):
        get_architecture("lenet")


def changed(name: str, value) -> dict:
    state = FashionCNN().state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    return state


OTHERS = {
    "wider network": (lambda: FashionCNN(width=8).state_dict(), "features.0.0.weight", r"\(8, 1, 5, 5\)"),
    "more classes": (lambda: FashionCNN(classes=11).state_dict(), "classifier.weight", r"\(11, 1568\)"),
    "missing key": (lambda: changed("features.1.0.bias", None), "features.1.0.bias", "missing"),
    "extra key": (lambda: changed("head.weight", torch.zeros(2)), "head.weight", "unknown"),
    "wrapped in another dictionary": (lambda: {"model": FashionCNN().state_dict()}, "features.0.0.weight", "missing"),
    "a number beside the weights": (lambda: changed("epoch", 3), "epoch", ""),
    "a number in place of weights": (lambda: changed("classifier.bias", 3), "classifier.bias", ""),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_network_names_the_first_difference(architecture, tmp_path, other):
    make, key, detail = OTHERS[other]
    torch.save(make(), tmp_path / "other.pt")
    with pytest.raises(BundleError, match=f"other.pt.*fashion_cnn.*{key}.*{detail}"):
        export.load_network(architecture, tmp_path / "other.pt")


GARBAGE = {
    "empty": b"",
    "words": b"hello world, this is no checkpoint\n" * 10,
    "one dot": b".",
    "html": b"<html>404</html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
    "zip header": b"PK\x03\x04rest",
    "zeros": bytes(1000),
    "all bytes": bytes(range(256)),
}


@pytest.mark.parametrize("content", GARBAGE)
def test_a_file_that_is_no_checkpoint_is_named(architecture, tmp_path, content):
    (tmp_path / "file.pt").write_bytes(GARBAGE[content])
    with pytest.raises(BundleError, match="file.pt is no PyTorch checkpoint"):
        export.load_network(architecture, tmp_path / "file.pt")


def test_a_truncated_checkpoint_is_named(architecture, checkpoint, tmp_path):
    (tmp_path / "file.pt").write_bytes(checkpoint.read_bytes()[:50_000])
    with pytest.raises(BundleError, match="file.pt is no PyTorch checkpoint or is damaged"):
        export.load_network(architecture, tmp_path / "file.pt")


def test_a_whole_pickled_network_is_refused(architecture, tmp_path):
    torch.save(FashionCNN(), tmp_path / "file.pt")  # loading it would run code
    with pytest.raises(BundleError, match="file.pt"):
        export.load_network(architecture, tmp_path / "file.pt")


def test_a_missing_checkpoint_says_what_makes_one(architecture, tmp_path):
    with pytest.raises(BundleError, match="gone.pt: no such checkpoint.*notebook 01"):
        export.load_network(architecture, tmp_path / "gone.pt")
