import io
import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from helpers.bundle.manifest import OutputSpec, load_bundle
from helpers.errors import BundleError, ConfigError, StorageError
from helpers.images.decoding import decode, fit
from helpers.memory import resident_megabytes
from helpers.pipeline import make_task, stages
from helpers.pipeline.listing import assign, list_images, plan
from helpers.pipeline.rows import without
from helpers.pipeline.schemas import KEY
from helpers.storage import open_storage
from helpers.tasks import DECODERS, parameters_for, predict

NAMES = ["0.png", "1 missing.png", "2.jpg", "3 empty.png", "4 text.png", "5 folder.png", "6.png", "7 loop.png"]
GOOD = [0, 2, 6]
MEGABYTE = 2**20


def png(side: int, value: int = 0) -> bytes:
    image = np.random.default_rng(value).integers(0, 256, (side, side + 2), np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Good images with every kind of damage between them."""
    storage = open_storage(str(tmp_path_factory.mktemp("mixed")))
    storage.write("0.png", png(28))
    storage.write("2.jpg", png(56, 2))
    storage.write("3 empty.png", b"")
    storage.write("4 text.png", b"not an image")
    storage.write("5 folder.png/x", b"")
    storage.write("6.png", png(40, 6))
    Path(storage.join("7 loop.png")).symlink_to(storage.join("7 loop.png"))
    return storage


@pytest.fixture(scope="module")
def bundle(bundle_uri):
    return load_bundle(open_storage(bundle_uri))


@pytest.fixture(scope="module")
def listed(storage) -> pa.RecordBatch:
    rows = [
        {"path": storage.join(name), "length": 100 + i, "modified": i, "partition": 0} for i, name in enumerate(NAMES)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=stages.ASSIGNED_SCHEMA)


@pytest.fixture(scope="module")
def read(listed, storage) -> list[pa.RecordBatch]:
    return list(stages.read_images([listed], storage, 64, MEGABYTE))


@pytest.fixture(scope="module")
def tensors(read, bundle) -> list[pa.RecordBatch]:
    return list(stages.preprocess(read, bundle.manifest.input, 64, 10**6))


@pytest.fixture(scope="module")
def outputs(tensors, bundle) -> list[pa.RecordBatch]:
    return list(stages.infer(tensors, bundle, None, 1))


@pytest.fixture(scope="module")
def results(outputs, bundle) -> list[pa.RecordBatch]:
    return list(stages.postprocess(outputs, bundle.manifest, bundle.manifest.postprocess, "net@1"))


def rows_of(batches: list[pa.RecordBatch]) -> list[dict]:
    return pa.Table.from_batches(batches).to_pylist()


STAGES = {
    "read": (stages.IMAGE_SCHEMA, ["content"]),
    "tensors": (stages.TENSOR_SCHEMA, ["tensor"]),
    "outputs": (None, ["logits"]),
    "results": (stages.RESULT_SCHEMA, ["predictions"]),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_one_row_an_image_in_order_with_its_key(stage, request, listed, bundle):
    schema, outputs = STAGES[stage]
    batches = request.getfixturevalue(stage)
    assert all(batch.schema == (schema or stages.output_schema(bundle.manifest)) for batch in batches)
    for batch in batches:
        batch.validate(full=True)
    rows = rows_of(batches)
    for name in ("path", "length", "modified"):
        assert [row[name] for row in rows] == listed[name].to_pylist()
    for row in rows:
        assert all((row[name] is None) == (row["error"] is not None) for name in outputs)


def test_what_cannot_be_read_is_an_error_with_words(read):
    errors = {name: row["error"] for name, row in zip(NAMES, rows_of(read), strict=True)}
    assert "the file is gone" in errors["1 missing.png"]
    assert "directory" in errors["5 folder.png"]
    assert "link leads back to itself" in errors["7 loop.png"]
    assert [name for name, error in errors.items() if error is None] == [NAMES[i] for i in (0, 2, 3, 4, 6)]


def test_bytes_are_those_of_the_file(read, storage):
    assert rows_of(read)[2]["content"] == storage.read("2.jpg")
    assert rows_of(read)[3]["content"] == b""


def test_what_cannot_be_decoded_is_an_error_and_earlier_errors_stay(tensors, read):
    rows = rows_of(tensors)
    assert rows[3]["error"] == "the file is empty"
    assert "not an image" in rows[4]["error"]
    for i in (1, 5, 7):
        assert rows[i]["error"] == rows_of(read)[i]["error"]
    assert [i for i, row in enumerate(rows) if row["error"] is None] == GOOD


def test_tensors_hold_the_fitted_pixels_and_sizes_the_originals(tensors, storage, bundle):
    rows, spec = rows_of(tensors), bundle.manifest.input
    for i in GOOD:
        image = decode(storage.read(NAMES[i]), 10**6)
        assert rows[i]["tensor"] == fit(image, spec).tobytes()
        assert (rows[i]["width"], rows[i]["height"]) == (image.shape[1], image.shape[0])
    assert all(rows[i]["width"] is None and rows[i]["height"] is None for i in range(8) if i not in GOOD)


def test_images_larger_than_allowed_are_errors(read, bundle):
    rows = rows_of(list(stages.preprocess(read, bundle.manifest.input, 64, 28 * 30)))
    assert rows[0]["error"] is None
    assert "58 x 56 pixels" in rows[2]["error"] and "840" in rows[2]["error"]


@pytest.mark.parametrize("max_images", [1, 3, 64])
def test_batches_have_at_most_so_many_rows(listed, storage, bundle, max_images):
    read = list(stages.read_images([listed, listed], storage, max_images, MEGABYTE))
    assert max(batch.num_rows for batch in read) == min(max_images, 8)
    tensors = list(
        stages.preprocess(stages.read_images([listed], storage, 64, MEGABYTE), bundle.manifest.input, max_images, 10**6)
    )
    assert max(batch.num_rows for batch in tensors) == min(max_images, 8)
    assert [row["path"] for row in rows_of(read)] == 2 * listed["path"].to_pylist()


def test_batches_have_at_most_so_many_bytes_unless_one_image_has_more(tmp_path):
    storage = open_storage(str(tmp_path))
    lengths = [10, 20, 30, 500, 40, 40, 40, 0, 0, 90]
    for i, length in enumerate(lengths):
        storage.write(f"{i}.png", bytes(length))
    rows = [{"path": storage.join(f"{i}.png"), "length": length, "partition": 0} for i, length in enumerate(lengths)]
    batch = pa.RecordBatch.from_pylist(rows, schema=stages.ASSIGNED_SCHEMA)
    read = list(stages.read_images([batch], storage, 64, 100))
    assert [batch["length"].to_pylist() for batch in read] == [[10, 20, 30], [500], [40, 40], [40, 0, 0], [90]]


def test_no_rows_give_no_rows(listed, storage, bundle):
    nothing = listed.slice(0, 0)
    assert rows_of([*stages.read_images([nothing], storage, 4, 100), listed.slice(0, 0)]) == []
    empty = {
        schema: pa.RecordBatch.from_pylist([], schema=schema) for schema in (stages.IMAGE_SCHEMA, stages.TENSOR_SCHEMA)
    }
    assert sum(b.num_rows for b in stages.preprocess([empty[stages.IMAGE_SCHEMA]], bundle.manifest.input, 4, 100)) == 0
    outputs = list(stages.infer([empty[stages.TENSOR_SCHEMA]], bundle, None, 1))
    assert sum(batch.num_rows for batch in outputs) == 0
    assert sum(b.num_rows for b in stages.postprocess(outputs, bundle.manifest, {"top_k": 1}, "net")) == 0


def test_a_batch_in_which_every_image_failed_passes_all_stages(listed, storage, bundle):
    failed = listed.take(pa.array([i for i in range(8) if i not in GOOD]))
    read = stages.read_images([failed], storage, 64, MEGABYTE)
    outputs = stages.infer(stages.preprocess(read, bundle.manifest.input, 64, 10**6), bundle, None, 1)
    rows = rows_of(list(stages.postprocess(outputs, bundle.manifest, {"top_k": 1}, "net")))
    assert len(rows) == 5
    assert all(row["error"] and row["predictions"] is None and row["model"] == "net" for row in rows)


@pytest.mark.parametrize(("start", "count"), [(0, 3), (1, 4), (2, 1), (3, 3), (5, 3), (7, 1)])
def test_a_slice_of_a_batch_gives_the_same_rows_as_the_whole(read, tensors, outputs, results, bundle, start, count):
    def window(batches):
        return pa.Table.from_batches(batches).combine_chunks().to_batches()[0].slice(start, count)

    assert (
        rows_of(list(stages.preprocess([window(read)], bundle.manifest.input, 64, 10**6)))
        == rows_of(tensors)[start : start + count]
    )
    assert rows_of(list(stages.infer([window(tensors)], bundle, None, 1))) == rows_of(outputs)[start : start + count]
    found = list(stages.postprocess([window(outputs)], bundle.manifest, bundle.manifest.postprocess, "net@1"))
    assert rows_of(found) == rows_of(results)[start : start + count]


def test_tensors_and_pixels_are_each_others_inverse_also_in_slices(bundle):
    spec = bundle.manifest.input
    pixels = np.random.default_rng(0).integers(0, 256, (5, *spec.shape), np.uint8)
    failed = [False, True, False, False, True, True, False, False]
    keys = pa.RecordBatch.from_pylist([{"path": "a"}] * len(failed), pa.schema(KEY))
    errors = ["damaged" if bad else None for bad in failed]
    column = stages.tensor_batch(keys, [None] * len(failed), errors, pixels[: failed.count(False)])["tensor"]
    column.validate(full=True)
    assert [value is None for value in column.to_pylist()] == failed
    batch = pa.RecordBatch.from_arrays([column], names=["tensor"])
    for start in range(9):
        for stop in range(start, 9):
            good_before, good = failed[:start].count(False), failed[start:stop].count(False)
            found = stages._pixels(batch.slice(start, stop - start), spec)
            np.testing.assert_array_equal(found, pixels[good_before : good_before + good])


def test_batches_that_travelled_through_arrows_stream_are_understood(tensors, outputs, bundle):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, stages.TENSOR_SCHEMA) as writer:
        for batch in tensors:
            writer.write_batch(batch.slice(2, 5))
    received = list(pa.ipc.open_stream(sink.getvalue()))
    assert rows_of(list(stages.infer(received, bundle, None, 1))) == rows_of(outputs)[2:7]


@pytest.mark.parametrize("top_k", [1, 3, 10, 99])
def test_predictions_are_the_top_k_classes_in_order(outputs, bundle, top_k):
    labels = bundle.manifest.labels
    rows = rows_of(list(stages.postprocess(outputs, bundle.manifest, {"top_k": top_k}, "net")))
    for i, logits in zip(GOOD, (row["logits"] for row in rows_of(outputs) if row["logits"]), strict=True):
        expected = np.exp(logits) / np.exp(logits).sum()
        predictions = rows[i]["predictions"]
        assert len(predictions) == min(top_k, 10)
        assert [p["class_id"] for p in predictions] == np.argsort(-expected)[:top_k].tolist()
        assert [p["label"] for p in predictions] == [labels[p["class_id"]] for p in predictions]
        np.testing.assert_allclose([p["score"] for p in predictions], np.sort(expected)[::-1][:top_k], rtol=1e-5)
        assert all(p["box"] is None and p["mask"] is None for p in predictions)


def test_large_logits_give_probabilities_not_infinities(bundle):
    logits = np.array([[1000, 999] + [-1000] * 8], np.float32)
    ((first, second),) = predict({"logits": logits}, [(1, 1)], bundle.manifest, {"top_k": 2})
    assert first["score"] == pytest.approx(0.7311, abs=1e-4) and first["score"] + second["score"] == pytest.approx(1)


def test_outputs_of_more_dimensions_keep_their_shape(bundle):
    shapes = {"proto": (4, 3, 2), "loc": (5, 4)}
    manifest = replace(bundle.manifest, outputs=tuple(OutputSpec(*item) for item in shapes.items()))
    values = {name: np.random.default_rng(0).random((2, *shape), np.float32) for name, shape in shapes.items()}
    failed = np.array([False, True, False])
    for name, shape in shapes.items():
        column = stages._float_lists(values[name], failed)
        assert column.is_null().to_pylist() == failed.tolist()
        good = pa.RecordBatch.from_arrays([column.filter(pa.array(~failed))], [name])
        np.testing.assert_array_equal(stages._array(good, OutputSpec(name, shape)), values[name])
    assert stages.output_schema(manifest).names[-2:] == ["proto", "loc"]


def test_unknown_post_processing_parameters_are_named_with_the_known(bundle):
    assert parameters_for(bundle.manifest, {"top_k": 7}) == {"top_k": 7}
    with pytest.raises(ConfigError, match=r"postprocess\.topk.*top_k"):
        parameters_for(bundle.manifest, {"topk": 7})


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_a_top_k_that_is_no_count_is_refused_before_the_run(bundle, value):
    with pytest.raises(ConfigError, match=r"postprocess\.top_k"):
        parameters_for(bundle.manifest, {"top_k": value})


def test_a_task_without_post_processing_is_named_with_the_known(bundle):
    manifest = replace(bundle.manifest, task="telepathy")
    with pytest.raises(ConfigError, match="telepathy.*classification"):
        parameters_for(manifest, {})


def test_the_fused_task_gives_what_the_stages_give_one_after_the_other(samples, bundle_uri, config, tmp_path):
    task = make_task(str(samples), bundle_uri, str(tmp_path), config)
    (model,) = task.models
    images = list_images(task.source, config).images
    batches = assign(images, plan(images, 2, config)).to_batches(max_chunksize=10)
    read = list(stages.read_images(batches, task.source, 64, MEGABYTE))
    tensors = list(stages.preprocess(read, model.bundle.manifest.input, 64, task.max_pixels))
    outputs = list(stages.infer(tensors, model.bundle, None, 1))
    apart = list(stages.postprocess(outputs, model.bundle.manifest, model.parameters, model.identity))
    fused = list(task.results(batches))
    assert rows_of(fused) == rows_of(apart)
    assert len(rows_of(fused)) == 64 and sum(row["error"] is not None for row in rows_of(fused)) == 4
    assert without(images, pa.Table.from_batches(fused)).num_rows == 0


def test_a_file_that_is_rewritten_between_listing_and_reading_still_gives_a_row(tmp_path, bundle):
    storage = open_storage(str(tmp_path))
    storage.write("a.png", png(28))
    rows = [{"path": storage.join("a.png"), "length": os.stat(storage.join("a.png")).st_size, "partition": 0}]
    storage.write("a.png", png(60))
    batch = pa.RecordBatch.from_pylist(rows, schema=stages.ASSIGNED_SCHEMA)
    (row,) = rows_of(
        list(stages.preprocess(stages.read_images([batch], storage, 4, 100), bundle.manifest.input, 4, 10**6))
    )
    assert (row["width"], row["height"], row["error"]) == (62, 60, None)


# ---------------------------------------------------------------- what goes wrong with one image


def manifest_of(storage, *names: str, length: int | None = None) -> pa.RecordBatch:
    rows = [
        {"path": storage.join(name), "length": os.stat(storage.join(name)).st_size if length is None else length}
        for name in names
    ]
    return pa.RecordBatch.from_pylist(rows, schema=stages.ASSIGNED_SCHEMA)


@pytest.fixture
def three(tmp_path):
    """Three good images, the one between of which a test spoils."""
    storage = open_storage(str(tmp_path / "three"))
    for name in ("a.png", "b.png", "c.png"):
        storage.write(name, png(28))
    return storage


@pytest.mark.parametrize(
    "error", [OverflowError("too large"), MemoryError(), KeyError("x"), RuntimeError("\n"), OSError(5)]
)
def test_whatever_decoding_an_image_raises_is_its_own_error(three, bundle, monkeypatch, error):
    spoilt = three.read("b.png") + b"more"
    three.write("b.png", spoilt)
    original = stages.load

    def load(content, *arguments):
        if bytes(content) == spoilt:
            raise error
        return original(content, *arguments)

    monkeypatch.setattr(stages, "load", load)
    read = stages.read_images([manifest_of(three, "a.png", "b.png", "c.png")], three, 4, MEGABYTE)
    rows = rows_of(list(stages.preprocess(read, bundle.manifest.input, 4, 10**6)))
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert rows[1]["error"].strip() and rows[1]["tensor"] is None


@pytest.mark.parametrize("error", [ValueError("no such range"), MemoryError(), OSError(5, "Input/output error")])
def test_whatever_reading_an_image_raises_is_its_own_error_unless_a_user_must_mend_it(three, monkeypatch, error):
    original = type(three).read

    def read(self, path, limit=None):
        if path.endswith("b.png"):
            raise error
        return original(self, path, limit)

    monkeypatch.setattr(type(three), "read", read)
    batch = manifest_of(three, "a.png", "b.png", "c.png")
    rows = rows_of(list(stages.read_images([batch], three, 4, MEGABYTE)))
    assert [row["error"] is None for row in rows] == [True, False, True]
    error = StorageError("the credential was refused")
    with pytest.raises(StorageError, match="refused"):
        list(stages.read_images([batch], three, 4, MEGABYTE))


def test_a_file_is_read_up_to_the_bytes_that_are_allowed_and_no_further(three):
    length = len(three.read("b.png"))
    three.write("c.png", bytes(length + 1))
    rows = rows_of(list(stages.read_images([manifest_of(three, "b.png", "c.png")], three, 4, MEGABYTE, length)))
    assert rows[0]["error"] is None and "ingest.max_bytes" in rows[1]["error"]
    assert rows[1]["content"] is None


def test_a_file_that_has_grown_beyond_measure_waits_for_the_next_run(three):
    batch = manifest_of(three, "a.png", "b.png", "c.png")
    three.write("a.png", three.read("a.png") + bytes(MEGABYTE // 2))
    with open(three.join("b.png"), "r+b") as file:  # noqa: PTH123
        file.truncate(2 * MEGABYTE)
    rows = rows_of(list(stages.read_images([batch], three, 4, MEGABYTE)))
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert "longer than when it was listed" in rows[1]["error"]


def test_what_files_have_grown_to_keeps_batches_within_their_bytes(three):
    batch = manifest_of(three, "a.png", "b.png", "c.png")
    for name in ("a.png", "b.png", "c.png"):
        three.write(name, three.read(name) + bytes(600_000))
    read = list(stages.read_images([batch], three, 64, MEGABYTE))
    assert [part.num_rows for part in read] == [1, 1, 1]
    assert [row["error"] for row in rows_of(read)] == [None] * 3
    assert [row["path"] for row in rows_of(read)] == batch["path"].to_pylist()


def test_an_error_of_the_listing_is_the_rows_and_nothing_is_read(three):
    batch = manifest_of(three, "a.png", "b.png")
    errors = pa.array([None, "the file has 9 bytes, more than the 8 that ingest.max_bytes allows"])
    batch = batch.set_column(batch.schema.get_field_index("error"), "error", errors)
    Path(three.join("b.png")).unlink()
    rows = rows_of(list(stages.read_images([batch], three, 4, MEGABYTE)))
    assert [row["error"] for row in rows] == errors.to_pylist()


def test_memory_that_is_left_decides_which_images_are_decoded(three, bundle):
    big = cv2.imencode(".png", np.zeros((3000, 3000, 3), np.uint8))[1].tobytes()  # 72 MB while it is decoded
    three.write("b.png", big)
    for room, good in ((1000, [True, True, True]), (40, [True, False, True])):
        read = stages.read_images([manifest_of(three, "a.png", "b.png", "c.png")], three, 4, MEGABYTE)
        megabytes = round(resident_megabytes()) + room
        rows = rows_of(list(stages.preprocess(read, bundle.manifest.input, 4, 10**9, megabytes)))
        assert [row["error"] is None for row in rows] == good
    assert "3000 x 3000 pixels" in rows[1]["error"] and "inference.memory_megabytes" in rows[1]["error"]


def outputs_of(bundle, logits: list[list[float] | None]) -> pa.RecordBatch:
    """Rows of stage 3, null where an image failed before."""
    rows = [
        {"path": f"{i}.png", "length": 1, "width": 28, "height": 28, "error": None if row else "damaged", "logits": row}
        for i, row in enumerate(logits)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=stages.output_schema(bundle.manifest))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", ["raises", "no numbers", "too large"])
def test_an_image_whose_outputs_cannot_be_post_processed_costs_its_own_row(bundle, monkeypatch, count, kind):
    softmax = DECODERS["classification"]["softmax"]

    def odd(outputs, sizes, manifest, parameters, arrays):
        found = softmax.predict(outputs, sizes, manifest, {"top_k": 1}, arrays)
        for predictions, logits in zip(found, outputs["logits"], strict=True):
            if logits[0] == 99:
                if kind == "raises":
                    raise IndexError("boolean index did not match")
                predictions[0]["class_id"] = "seven" if kind == "no numbers" else 2**40  # which Arrow does not take
        return found

    monkeypatch.setitem(DECODERS["classification"], "softmax", replace(softmax, predict=odd))
    good, bad = [0.0] * 9 + [5.0], [99.0] + [0.0] * 9
    logits = ([good, None, bad, good, None] * count)[: 5 * count - 1]
    rows = rows_of(list(stages.postprocess([outputs_of(bundle, logits)], bundle.manifest, {}, "net")))
    for row, values in zip(rows, logits, strict=True):
        assert (row["error"] is None) == (values is good) == (row["predictions"] is not None)
        if values is good:
            assert [p["class_id"] for p in row["predictions"]] == [9]
        if values is None:
            assert row["error"] == "damaged"


def test_a_batch_of_which_nothing_can_be_post_processed_is_errors(bundle, monkeypatch):
    def odd(*_):
        raise ZeroDivisionError("division by zero")

    softmax = DECODERS["classification"]["softmax"]
    monkeypatch.setitem(DECODERS["classification"], "softmax", replace(softmax, predict=odd))
    rows = rows_of(list(stages.postprocess([outputs_of(bundle, [[1.0] * 10] * 3)], bundle.manifest, {}, "net")))
    assert len(rows) == 3 and all("ZeroDivisionError: division by zero" in row["error"] for row in rows)


def test_what_a_user_must_mend_stops_post_processing(bundle):
    boxes = replace(bundle.manifest, task="instance_segmentation")
    with pytest.raises(BundleError, match=r"no priors\.npy"):
        list(stages.postprocess([outputs_of(bundle, [[1.0] * 10])], boxes, {}, "net"))


class Outputs:
    """A model that gives what it is told."""

    single = False

    def __init__(self, *batches: list[list[float]]):
        self.batches = [np.array(batch, np.float32).reshape(-1, 10) for batch in batches]

    def infer(self, parts):
        for (part, pixels), logits in zip(parts, self.batches, strict=True):
            assert len(pixels) == len(logits)
            yield part, {"logits": logits} if len(logits) else {}


FINITE = [float(i) for i in range(10)]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_an_image_with_outputs_that_are_no_numbers_is_an_error_and_its_neighbors_are_not(bundle, monkeypatch, odd):
    bad = [*FINITE[:5], odd, *FINITE[6:]]
    model = Outputs([FINITE, bad, FINITE], [bad, bad], [FINITE])
    monkeypatch.setattr(stages, "get_model", lambda *_: model)
    failed = [[None, None, "damaged", None], [None, None], ["damaged", None, "damaged"]]
    batches = []
    for errors in failed:
        tensors = [None if error else bytes(bundle.manifest.input.nbytes) for error in errors]
        rows = [{"path": "a", "error": error, "tensor": t} for error, t in zip(errors, tensors, strict=True)]
        batches.append(pa.RecordBatch.from_pylist(rows, schema=stages.TENSOR_SCHEMA))
    rows = rows_of(list(stages.infer(batches, bundle, None, 1)))
    expected = [FINITE, None, "damaged", FINITE, None, None, "damaged", FINITE, "damaged"]
    for row, values in zip(rows, expected, strict=True):
        if isinstance(values, list):
            assert row["logits"] == values and row["error"] is None
        else:
            assert row["logits"] is None and (values or "not finite") in row["error"]


def test_outputs_so_large_that_only_their_sum_is_infinite_are_good(bundle, monkeypatch):
    monkeypatch.setattr(stages, "get_model", lambda *_: Outputs([[3e38] * 10]))
    tensor = bytes(bundle.manifest.input.nbytes)
    batch = pa.RecordBatch.from_pylist([{"path": "a", "tensor": tensor}], schema=stages.TENSOR_SCHEMA)
    (row,) = rows_of(list(stages.infer([batch], bundle, None, 1)))
    assert row["error"] is None and len(row["logits"]) == 10


def test_a_record_counts_the_bytes_of_what_was_read(three, bundle_uri, tmp_path, config):
    os.truncate(three.join("b.png"), 2**40)
    task = make_task(three.root, bundle_uri, str(tmp_path / "out"), config)
    images = list_images(task.source, config).images
    (tmp_path / "out" / "_staging" / task.run).mkdir(parents=True)
    (record,) = (batch.to_pylist()[0] for batch in task(assign(images, plan(images, 1, config)).to_batches()))
    assert (record["images"], record["failed"]) == (3, 1)
    assert record["bytes"] == len(three.read("a.png")) + len(three.read("c.png"))
