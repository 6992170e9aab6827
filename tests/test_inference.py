import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import openvino as ov
import openvino.opset13 as opset
import pyarrow as pa
import pytest

from helpers.bundle import runtime
from helpers.bundle.manifest import Bundle, Manifest, OutputSpec, load_bundle, save_bundle
from helpers.bundle.runtime import batch_size, compile_options, get_model
from helpers.errors import BundleError
from helpers.images.decoding import fit
from helpers.images.spec import InputSpec
from helpers.pipeline import stages
from helpers.storage import open_storage


@pytest.fixture
def bundle(bundle_uri, monkeypatch) -> Bundle:
    monkeypatch.setattr(runtime, "_models", {})  # as in a new worker
    return load_bundle(open_storage(bundle_uri))


@pytest.fixture
def copy(bundle, tmp_path) -> Bundle:
    """A bundle that a test may spoil."""
    return save_bundle(open_storage(str(tmp_path)), bundle.manifest, {n: bundle.read(n) for n in bundle.manifest.files})


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28, 1), np.uint8)


def one_by_one(model, images: np.ndarray) -> np.ndarray:
    return np.concatenate([outputs["logits"] for _, outputs in model.infer((None, image[None]) for image in images)])


def test_a_process_loads_a_model_once_for_many_calls(bundle, bundle_uri, caplog):
    caplog.set_level(logging.INFO, "helpers.bundle.runtime")
    first = get_model(bundle)
    for _ in range(3):
        again = load_bundle(open_storage(bundle_uri))  # another object, as each task unpickles its own
        assert get_model(again) is first
        assert list(stages.infer([], again, None, 1)) == []
    assert sum("loaded" in record.message for record in caplog.records) == 1


def test_other_settings_are_another_model(bundle):
    assert get_model(bundle) is get_model(bundle, "f32", 1)
    assert get_model(bundle, threads=2) is not get_model(bundle)


def test_batches_of_any_size_and_empty_ones_keep_their_order(bundle):
    model, sizes = get_model(bundle), [3, 0, 1, 7, 0, 0, 2, 64, 1, 0]
    batches = [pixels(size, seed) for seed, size in enumerate(sizes)]
    found = list(model.infer(enumerate(batches)))
    assert [item for item, _ in found] == list(range(len(sizes)))
    for (_, outputs), batch in zip(found, batches, strict=True):
        if len(batch):
            np.testing.assert_allclose(outputs["logits"], one_by_one(model, batch), atol=1e-5)
        else:
            assert outputs == {}


def test_results_stay_as_they_were_when_later_batches_run(bundle):
    found = list(get_model(bundle).infer((seed, pixels(4, seed)) for seed in range(6)))
    for seed, outputs in found:
        np.testing.assert_array_equal(
            outputs["logits"], next(get_model(bundle).infer([(0, pixels(4, seed))]))[1]["logits"]
        )
    assert len({outputs["logits"].tobytes() for _, outputs in found}) == 6


def test_no_batches_give_nothing(bundle):
    assert list(get_model(bundle).infer([])) == []


def test_a_failing_reader_leaves_the_model_usable(bundle):
    def broken():
        yield 0, pixels(2)
        yield 1, pixels(2)
        raise RuntimeError("reader")

    model = get_model(bundle)
    with pytest.raises(RuntimeError, match="reader"):
        list(model.infer(broken()))
    assert len(list(model.infer([(0, pixels(2))]))) == 1


def test_the_compiled_model_has_the_tasks_options(bundle):
    assert compile_options("bf16", 3) == {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": 3,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = get_model(bundle, threads=1).compiled
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("NUM_STREAMS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_a_batch_stays_within_its_memory_and_its_limit(bundle):
    image = 28 * 28 + 4 * 10
    assert batch_size(bundle, 64, 32) == 32
    assert batch_size(bundle, 1, 10**6) == 2**20 // image
    assert batch_size(bundle, 0, 64) == 1  # never less than one image


def test_weights_that_are_not_the_manifests_are_refused(copy):
    weights = copy.read("model.bin")
    copy.storage.write("model.bin", weights[::-1])
    with pytest.raises(BundleError, match=r"model\.bin is damaged.*export the bundle again"):
        get_model(copy)


def test_truncated_weights_are_refused(copy):
    copy.storage.write("model.bin", copy.read("model.bin")[:-100])
    with pytest.raises(BundleError, match=r"model\.bin is damaged"):
        get_model(copy)


def spec(**values) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, input=replace(manifest.input, **values))


def outputs(*shapes: tuple[str, tuple[int, ...]]) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, outputs=tuple(OutputSpec(*shape) for shape in shapes))


LIES = {
    "the input's height": (spec(height=29), r"the input is u8 \[\?,29,28,1\], and the graph's is u8 \[\?,28,28,1\]"),
    "the input's width": (spec(width=14), "the input"),
    "the input's channels": (spec(color="rgb", mean=(0.0,) * 3, std=(1.0,) * 3), "the input"),
    "a large input": (spec(height=2000, width=2000), "the input"),
    "an output of half the size": (outputs(("logits", (5,))), r"'logits' is f32 \[\?,5\].*\[\?,10\]"),
    "an output of another form": (outputs(("logits", (2, 5))), "'logits'"),
    "an output that is none": (outputs(("scores", (10,))), "'scores', and the graph's are logits"),
    "two outputs": (outputs(("logits", (10,)), ("more", (10,))), "'more'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_does_not_say_what_the_graph_is_is_refused_with_the_first_difference(copy, lie):
    change, words = LIES[lie]
    files = {name: copy.read(name) for name in copy.manifest.files}
    with pytest.raises(BundleError, match=rf"manifest\.json says .*{words}.*export the bundle again") as error:
        get_model(save_bundle(copy.storage, change(copy.manifest), files))
    assert "\n" not in str(error.value)


def serialized(model: ov.Model) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, f"{folder}/model.xml", compress_to_fp16=False)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def graph(shape: list[int], element: ov.Type = ov.Type.f32, inputs: int = 1, named: bool = True) -> ov.Model:
    """Sums over each image, ten times."""
    images = [opset.parameter([*shape, 28, 28, 1], ov.Type.u8) for _ in range(inputs)]
    sums = opset.reduce_sum(opset.convert(images[0], "f32"), np.array([1, 2]), keep_dims=False)
    model = ov.Model([opset.convert(opset.concat([sums] * 10, 1), element)], images)
    if named:
        model.outputs[0].set_names({"logits"})
    return model


GRAPHS = {
    "two inputs": (graph([-1], inputs=2), "one input, and the graph has 2"),
    "a batch of one": (graph([1]), "the input is"),
    "an output of 16 bits": (graph([-1], ov.Type.f16), "'logits' is f32 .* is f16"),
    "an output without a name": (graph([-1], named=False), "'logits'"),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(copy, kind):
    model, words = GRAPHS[kind]
    with pytest.raises(BundleError, match=words):
        get_model(save_bundle(copy.storage, copy.manifest, serialized(model)))


def test_a_graph_that_is_what_the_manifest_says_is_taken(copy):
    model = get_model(save_bundle(copy.storage, copy.manifest, serialized(graph([-1]))))
    np.testing.assert_allclose(one_by_one(model, pixels(2))[:, 0], pixels(2).sum((1, 2, 3)))


@pytest.mark.parametrize("graph", [b"<net/>", b"not xml", b""])
def test_a_graph_openvino_cannot_read_names_the_bundle(copy, graph):
    files = dict(copy.manifest.files, **{"model.xml": hashlib.sha256(graph).hexdigest()})
    spoilt = save_bundle(copy.storage, copy.manifest, {"model.xml": graph, "model.bin": copy.read("model.bin")})
    assert spoilt.manifest.files == files
    with pytest.raises(BundleError) as error:
        get_model(spoilt)
    assert "OpenVINO" in str(error.value) and copy.storage.root in str(error.value)


@pytest.mark.parametrize("taken", [False, True])
def test_compiled_models_are_kept_where_nobody_else_can_write_or_nowhere(bundle, monkeypatch, tmp_path, taken):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = tmp_path / f"spark-vision-{os.geteuid()}"
    if taken:
        folder.mkdir()
        folder.chmod(0o777)
    assert len(one_by_one(get_model(bundle), pixels(2))) == 2
    assert len(list(folder.rglob("*.blob"))) == (0 if taken else 1)
    assert folder.stat().st_mode & 0o777 == (0o777 if taken else 0o700)


def test_another_networks_weights_in_the_same_graph_are_another_model(bundle, tmp_path):
    # OpenVINO keeps compiled graphs on disk; it must not hand out the first network's weights.
    import torch

    from fashion_mnist import FashionCNN, compute_logits
    from helpers.export.conversion import export

    images = pixels(3)
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = FashionCNN()
        torch.save(network.state_dict(), tmp_path / "other.pt")
        other = export("fashion_cnn", tmp_path / "other.pt", open_storage(str(tmp_path / str(seed))))
        assert other.manifest.model != bundle.manifest.model
        expected = compute_logits(network, torch.from_numpy(images[..., 0])).numpy()
        np.testing.assert_allclose(one_by_one(get_model(other), images), expected, atol=1e-4)


def test_a_model_of_large_images_takes_one_at_a_time_and_gives_the_same(bundle, monkeypatch):
    images, errors = pixels(5), [None, "damaged", None]
    batches = []
    for part in (images[:3], images[3:]):
        rows = [
            {
                "path": "a",
                "length": 1,
                "modified": None,
                "width": 28,
                "height": 28,
                "error": e,
                "tensor": None if e else p,
            }
            for e, p in zip(errors, [part[0].tobytes(), b"", part[1].tobytes()], strict=True)
        ]
        batches.append(pa.RecordBatch.from_pylist(rows, schema=stages.TENSOR_SCHEMA))
    together = pa.Table.from_batches(stages.infer(batches, bundle, None, 1))
    monkeypatch.setattr(runtime, "_models", {})
    monkeypatch.setattr(runtime, "SINGLE_MEGABYTES", 0)  # as if not even one image were within it
    alone = pa.Table.from_batches(stages.infer(batches, bundle, None, 1))
    assert get_model(bundle).single and alone.num_rows == together.num_rows == 6
    assert alone.drop_columns("logits").equals(together.drop_columns("logits"))
    assert alone["logits"].is_null().to_pylist() == [False, True, False] * 2
    values = [table["logits"].drop_null().combine_chunks().flatten() for table in (alone, together)]
    np.testing.assert_allclose(*values, atol=1e-4)


def test_memory_for_a_new_size_of_batch_is_taken_before_the_next_batch_is_decoded(monkeypatch):
    """Decoding may not take a process beyond its memory, and inference that runs meanwhile must not suffer from it."""
    events: list[str] = []

    class Request:
        def __init__(self):
            self.number = 0

        def start_async(self, inputs, share_inputs):
            self.number = sum(event.startswith("start") for event in events)
            events.append(f"start {self.number}")

        def wait(self):
            events.append(f"wait {self.number}")

        def get_tensor(self, name):
            return SimpleNamespace(data=np.zeros((1, 10), np.float32))

    def batches():
        for number, size in enumerate((2, 2, 3)):
            events.append(f"decode {number}")
            yield number, pixels(size)

    model = runtime.Model(SimpleNamespace(create_infer_request=Request), ("logits",), 0.0)
    assert [item for item, _ in model.infer(batches())] == [0, 1, 2]
    assert events.index("wait 0") < events.index("decode 1") < events.index("start 1") < events.index("wait 1")
    assert events.index("start 2") + 1 == events.index("wait 2")
    assert events[events.index("start 1") + 1] != "wait 1"  # of a size that was inferred before: at the same time


def any_size_bundle(folder: Path, like: Manifest, rule: str) -> Bundle:
    """A network of images of any size: the mean of each channel, and the whole first channel."""
    image = opset.parameter([1, -1, -1, 3], np.uint8, name="images")
    values = opset.convert(image, "f32")
    means = opset.reduce_mean(values, opset.constant([1, 2]))
    red = opset.squeeze(
        opset.slice(values, opset.constant([0]), opset.constant([1]), opset.constant([1]), opset.constant([3])),
        opset.constant([3]),
    )
    graph = ov.Model([opset.result(means), opset.result(red)], [image])
    for output, name in zip(graph.outputs, ("means", "red"), strict=True):
        output.set_names({name})
    manifest = replace(
        like,
        input=InputSpec(40, 60, "rgb", (0.0,) * 3, (1.0,) * 3, rule),
        outputs=(OutputSpec("means", (3,)), OutputSpec("red", (-1, -1))),
        batch=1,
    )
    ov.save_model(graph, folder / "model.xml", compress_to_fp16=False)
    files = {name: (folder / name).read_bytes() for name in ("model.xml", "model.bin")}
    return save_bundle(open_storage(str(folder / "bundle")), manifest, files)


@pytest.mark.parametrize("rule", ["none", "shortest_edge"])
def test_a_network_of_any_size_gets_each_image_in_its_own(bundle, tmp_path, rule):
    sizes = [(50, 30), (33, 70), (300, 20)]  # width, height
    images = [np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8) for i, (w, h) in enumerate(sizes)]
    contents = [cv2.imencode(".png", image)[1].tobytes() for image in images]
    rows = [{"path": f"{i}", "content": content} for i, content in enumerate([*contents[:2], b"none", contents[2]])]
    batch = pa.RecordBatch.from_pylist(rows, schema=stages.IMAGE_SCHEMA)
    bundle = any_size_bundle(tmp_path, bundle.manifest, rule)
    tensors = list(stages.preprocess([batch], bundle.manifest.input, 64, 10**6))
    merged = pa.Table.from_batches(tensors).combine_chunks().to_batches()  # as Spark may between two stages
    outputs = pa.Table.from_batches(list(stages.infer(merged, bundle, None, 1))).to_pylist()
    assert outputs[2]["error"] and outputs[2]["red"] is None is outputs[2]["red.shape"]
    for row, image in zip([outputs[0], outputs[1], outputs[3]], images, strict=True):
        expected = fit(image, bundle.manifest.input)
        np.testing.assert_allclose(row["means"], expected.mean(axis=(0, 1)), rtol=1e-5)
        assert row["red.shape"] == list(expected.shape[:2])
        np.testing.assert_array_equal(np.reshape(row["red"], row["red.shape"]), expected[..., 0])


def test_a_graph_for_one_image_gets_one_at_a_time(bundle, tmp_path):
    """Some graphs take four images and answer for the first."""
    graph = ov.Core().read_model(model=bundle.read("model.xml"), weights=bundle.read("model.bin"))
    graph.reshape([1, *bundle.manifest.input.shape])
    ov.save_model(graph, tmp_path / "model.xml", compress_to_fp16=False)
    files = {name: (tmp_path / name).read_bytes() for name in ("model.xml", "model.bin")}
    fixed = save_bundle(open_storage(str(tmp_path / "bundle")), replace(bundle.manifest, batch=1), files)
    model = get_model(fixed)
    assert model.single
    np.testing.assert_allclose(one_by_one(model, pixels(3)), one_by_one(get_model(bundle), pixels(3)), atol=1e-5)
