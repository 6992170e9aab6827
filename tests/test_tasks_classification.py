import numpy as np
import pyarrow as pa
import pytest
from manifests import LABELS, make_manifest

from helpers.errors import BundleError, ConfigError
from helpers.pipeline import stages
from helpers.tasks import DECODERS, OutputError, parameters_for, predict, suggest
from helpers.tasks.classification import softmax

SIZES = [(10, 20), (30, 40)]
LOGITS = np.array([[1, 4, 2], [-2, 0, 3]], np.float32)


def scores_of(predictions) -> list[dict[str, float]]:
    return [{p["label"]: round(p["score"], 4) for p in one} for one in predictions]


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1, 1), (2, 1, 1, 3)])
def test_logits_of_any_shape_become_probabilities_of_the_best_classes(shape):
    outputs = {"logits": LOGITS.reshape(shape)}
    found = predict(outputs, SIZES, make_manifest("classification"), {"top_k": 2})
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    assert scores_of(found) == [
        {"dog": round(float(expected[0, 1]), 4), "cup": round(float(expected[0, 2]), 4)},
        {"cup": round(float(expected[1, 2]), 4), "dog": round(float(expected[1, 1]), 4)},
    ]
    assert set(found[0][0]) == {"class_id", "label", "score", "box", "mask", "keypoints"}


def test_probabilities_are_left_as_they_are():
    manifest = make_manifest("classification", "probabilities")
    assert scores_of(predict({"p": np.array([[0.2, 0.7, 0.1]])}, SIZES[:1], manifest, {"top_k": 1})) == [{"dog": 0.7}]


def test_an_image_has_each_label_that_is_probable_enough():
    manifest = make_manifest("classification", "sigmoid")
    assert scores_of(predict({"logits": LOGITS}, SIZES, manifest, {})) == [
        {"dog": 0.982, "cup": 0.8808, "cat": 0.7311},
        {"cup": 0.9526, "dog": 0.5},
    ]
    assert scores_of(predict({"logits": LOGITS - 99}, SIZES, manifest, {"threshold": 0.9})) == [{}, {}]


def test_the_output_may_have_any_name_and_must_have_a_number_per_label():
    for shape in ((3,), (3, 1, 1)):
        assert parameters_for(make_manifest("classification", outputs={"anything": shape}), {"top_k": 1}) == {
            "top_k": 1
        }
    with pytest.raises(BundleError, match=r"net: its output logits is \[4\], and 3 labels need logits \[C\]"):
        parameters_for(make_manifest("classification", outputs={"anything": (4,)}), {})
    with pytest.raises(BundleError, match="decoder takes logits"):
        parameters_for(make_manifest("classification", outputs={"anything": (3,), "other": (3,)}), {})


def test_outputs_that_come_to_one_are_probabilities():
    assert suggest("classification", {"x": LOGITS}, 3) == "softmax"
    assert suggest("classification", {"x": softmax(LOGITS)}, 3) == "probabilities"
    with pytest.raises(OutputError, match=r"x \[2, 5\] fit no decoder of task classification for 3 labels; export"):
        suggest("classification", {"x": np.zeros((1, 2, 5))}, 3)


def test_other_numbers_of_labels_and_other_tasks_that_fit_are_said():
    with pytest.raises(OutputError, match=r"x \[3\] fit no decoder .* for 2 labels; they fit 3 labels: correct these"):
        suggest("classification", {"x": LOGITS}, 2)
    candidates = {"x": np.ones((1, 84, 2100))}
    with pytest.raises(OutputError, match="for 79 labels; they fit 80 labels"):
        suggest("detection", candidates, 79)
    with pytest.raises(OutputError, match="for 3 labels; export the model with its post-processing"):
        suggest("detection", candidates, 3)  # 80 are too far away to be what was meant
    masked = {"x": np.ones((1, 39, 2100)), "y": np.ones((1, 32, 8, 8))}
    with pytest.raises(OutputError, match="they fit decoder yolo of task instance_segmentation: correct the task"):
        suggest("detection", masked, 3)
    strides = {f"{name}{n}": np.ones((1, n, sides)) for n in (80, 20) for name, sides in (("b", 4), ("s", 3))}
    with pytest.raises(OutputError, match="for 3 labels; export the model"):  # one stride's would be a part
        suggest("detection", strides, 3)
    with pytest.raises(OutputError, match=r"outputs a and b could each be scores .*`outputs: {scores: NAME}`"):
        suggest("semantic_segmentation", {name: np.full((1, 1, 8, 8), 0.5) for name in "ab"}, 1)


def test_an_image_has_each_label_whose_probability_says_so():
    manifest = make_manifest("classification", "multi_label")
    probabilities = np.array([[0.9, 0.4, 0.6], [0.1, 0.2, 0.3]], np.float32)
    assert scores_of(predict({"p": probabilities}, SIZES, manifest, {})) == [{"cat": 0.9, "cup": 0.6}, {}]


def test_the_output_with_a_number_per_label_is_the_one():
    samples = {"features": np.ones((2, 1280), np.float32), "y": LOGITS}
    assert DECODERS["classification"]["softmax"].assign_roles(samples, 3) == {"logits": "y"}
    with pytest.raises(OutputError, match=r"outputs features and y could each be logits"):
        DECODERS["classification"]["softmax"].assign_roles(samples, 0)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"top_k": 0}, "top_k is not a whole number of 1 or more"),
        ({"threshold": 1.5}, "threshold is not a number from 0 to 1"),
        ({"threshold": [0.5]}, "threshold is not a number from 0 to 1"),
        ({"min_area": 5}, "min_area: net has no such parameter; it has classes, min_score, threshold, top_k"),
    ],
)
def test_parameters_that_cannot_be_are_named(parameters, message):
    manifest = make_manifest("classification", "sigmoid", outputs={"logits": (3,)})
    with pytest.raises(ConfigError, match=rf"postprocess\.{message}"):
        parameters_for(manifest, parameters)


def test_an_unknown_decoder_is_named_with_the_known():
    with pytest.raises(ConfigError, match="net has decoder 'magic'; task classification has softmax, probabilities"):
        parameters_for(make_manifest("classification", "magic"), {})


def test_a_parameter_of_the_bundle_that_the_decoder_lacks_is_the_bundles_fault():
    manifest = make_manifest("classification", outputs={"logits": (3,)}, postprocess={"iou": 1})
    with pytest.raises(BundleError, match="parameter 'iou'.*export the bundle again"):
        parameters_for(manifest, {})


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 1, 1)])
def test_an_embedding_is_normalized_if_asked(shape):
    vectors = np.array([[3, 0, 4, 0], [0, 0, 0, 0]], np.float32)
    manifest = make_manifest("embedding", labels=(), outputs={"embedding": shape[1:]})
    assert parameters_for(manifest, {"normalize": True}) == {"normalize": True}
    outputs = {"embedding": vectors.reshape(shape)}
    np.testing.assert_array_equal(predict(outputs, SIZES, manifest, {}), vectors)
    normalized = predict(outputs, SIZES, manifest, {"normalize": True})
    np.testing.assert_allclose(normalized, [[0.6, 0, 0.8, 0], [0] * 4], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"postprocess\.classes: net has no such parameter; it has normalize"):
        parameters_for(manifest, {"classes": ["cat"]})


@pytest.mark.parametrize(
    ("shape", "decoders", "axes"),
    [((5, 2), ["first", "mean"], 1), ((2, 4, 3), ["mean"], (2, 3)), ((4, 4, 2), ["mean"], (1, 2))],
    ids=["tokens", "maps", "maps of channels last"],
)
def test_an_embedding_is_one_vector_of_tokens_or_maps(shape, decoders, axes):
    values = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    assert suggest("embedding", {"x": values}) == decoders[0]
    for decoder in decoders:
        manifest = make_manifest("embedding", decoder, labels=(), outputs={"embedding": shape})
        vectors = predict({"embedding": values}, SIZES, manifest, parameters_for(manifest, {}))
        expected = values[:, 0] if decoder == "first" else values.mean(axis=axes)
        np.testing.assert_allclose(vectors, expected, rtol=1e-6)


def test_rows_of_an_embedding_have_its_numbers_and_no_predictions():
    manifest = make_manifest("embedding", labels=(), outputs={"embedding": (2,)})
    rows = [
        {"path": str(i), "width": 1, "height": 1, "error": None if values else "damaged", "embedding": values}
        for i, values in enumerate([[1.0, 2.0], None, [3.0, 4.0]])
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=stages.output_schema(manifest))
    (result,) = stages.postprocess([batch], manifest, {}, "net@1")
    result.validate(full=True)
    assert result["embedding"].to_pylist() == [[1.0, 2.0], None, [3.0, 4.0]]
    assert result["predictions"].to_pylist() == [[], None, []]


def test_rows_of_other_tasks_have_no_embedding():
    manifest = make_manifest("classification", outputs={"logits": (3,)})
    rows = [{"path": "a", "width": 1, "height": 1, "logits": [1.0, 2.0, 3.0]}]
    batch = pa.RecordBatch.from_pylist(rows, schema=stages.output_schema(manifest))
    (result,) = stages.postprocess([batch], manifest, {}, "net@1")
    assert result["embedding"].to_pylist() == [None] and len(result["predictions"][0]) == len(LABELS)
