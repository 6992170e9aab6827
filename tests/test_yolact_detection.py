import numpy as np
import pytest
import yolact_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.errors import ConfigError
from helpers.yolact import detection
from helpers.yolact.detection import Parameters, detect

CLASSES = 6


def heads(seed: int, anchors: int = 300, classes: int = 80, crowd: float = 1.0) -> tuple[np.ndarray, ...]:
    """Random loc, conf, mask and anchors, crowded around a few places; all kinds of probabilities."""
    rng = np.random.default_rng(seed)
    places = rng.random((5, 2))[rng.integers(0, 5, anchors)] + rng.normal(0, 0.05 / crowd, (anchors, 2))
    priors = np.concatenate([places, rng.uniform(0.05, 0.4, (anchors, 2))], axis=1).astype(np.float32)
    loc = rng.normal(0, 0.7, (anchors, 4)).astype(np.float32)
    logits = rng.normal(0, 2, (anchors, classes + 1)) + np.eye(classes + 1)[0] * rng.uniform(0, 9, (anchors, 1))
    conf = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    mask = np.tanh(rng.normal(size=(anchors, 32))).astype(np.float32)
    return loc, conf, mask, priors


def corners(*boxes: tuple[float, float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and anchors that decode to boxes given by their corners."""
    x1, y1, x2, y2 = np.array(boxes, np.float32).T
    priors = np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1).astype(np.float32)
    return np.zeros((len(boxes), 4), np.float32), priors


def found(boxes, scores, **parameters) -> list[tuple[int, int]]:
    """Class and anchor of what is detected among boxes with scores `[n, classes]`."""
    loc, priors = corners(*boxes)
    scores = np.array(scores, np.float32)
    conf = np.concatenate([1 - scores.sum(axis=1, keepdims=True), scores], axis=1)
    anchors = np.arange(len(boxes), dtype=np.float32)[:, None]
    result = detect(loc, conf, anchors, priors, Parameters(**parameters), 100)
    assert (np.diff(result.scores) <= 0).all()
    return list(zip(result.classes.tolist(), result.coefficients[:, 0].astype(int).tolist(), strict=True))


def test_boxes_are_decoded_as_worked_out_by_hand():
    priors = np.array([[0.5, 0.25, 0.2, 0.1]], np.float32)
    loc = np.array([[1.0, -2.0, 5 * np.log(2), 0.0]], np.float32)  # twice as wide
    np.testing.assert_allclose(detection.decode(loc, priors), [[0.32, 0.18, 0.72, 0.28]], rtol=1e-6)


@pytest.mark.parametrize("cross_class", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_fast_nms_gives_what_the_specification_gives(seed, cross_class):
    loc, conf, mask, priors = heads(seed, anchors=(40, 300, 2000)[seed % 3], crowd=1 + seed % 4)
    expected = oracle.detect(loc, conf, mask, priors, cross_class=cross_class)
    parameters = Parameters(nms="cross_class" if cross_class else "fast")
    result = detect(loc, conf, mask, priors, parameters, 550)
    assert len(result.scores) == len(expected[2]) > 5
    np.testing.assert_array_equal(result.classes, expected[1])
    np.testing.assert_array_equal(result.scores, expected[2])
    np.testing.assert_allclose(result.boxes, expected[0], atol=1e-6)
    np.testing.assert_array_equal(result.coefficients, expected[3])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    anchors=st.integers(1, 60),
    top_k=st.integers(1, 70),
    most=st.integers(1, 120),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.95]),
    block=st.integers(1, 40),
)
def test_looking_at_blocks_of_candidates_changes_nothing(seed, anchors, top_k, most, threshold, block):
    loc, conf, mask, priors = heads(seed, anchors, CLASSES)
    expected = oracle.detect(loc, conf, mask, priors, threshold=threshold, top_k=top_k, most=most)
    parameters = Parameters(nms_threshold=threshold, top_k=top_k, max_detections=most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "BLOCK", block)
        result = detect(loc, conf, mask, priors, parameters, 550)
    assert (expected is None and not len(result.scores)) or result.classes.tolist() == expected[1].tolist()
    assert expected is None or result.scores.tolist() == expected[2].tolist()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), anchors=st.integers(1, 60), threshold=st.sampled_from([0.2, 0.5, 0.8]))
def test_traditional_nms_gives_what_the_specification_gives(seed, anchors, threshold):
    loc, conf, mask, priors = heads(seed, anchors, CLASSES)
    expected = oracle.traditional(loc, conf, priors, threshold=threshold)
    result = detect(loc, conf, mask, priors, Parameters(nms="traditional", nms_threshold=threshold), 550)
    assert list(zip(result.scores.tolist(), result.classes.tolist(), strict=True)) == [item[:2] for item in expected]
    assert result.coefficients.tolist() == mask[[anchor for _, _, anchor in expected]].reshape(-1, 32).tolist()


# Three boxes in a row: the middle one overlaps both others by 0.6, and they each other by 0.33.
ROW = [(0.1, 0.1, 0.5, 0.5), (0.2, 0.1, 0.6, 0.5), (0.3, 0.1, 0.7, 0.5)]


def test_in_fast_nms_a_suppressed_box_still_suppresses():
    scores = [[0.9], [0.8], [0.7]]
    assert found(ROW, scores, nms="fast") == [(0, 0)]
    assert found(ROW, scores, nms="traditional") == [(0, 0), (0, 2)]


def test_classes_do_not_suppress_each_other_unless_asked_to():
    scores = [[0.8, 0.0], [0.0, 0.7], [0.06, 0.0]]
    assert found(ROW, scores, nms="fast")[:3] == [(0, 0), (1, 1), (0, 2)]
    assert found(ROW, scores, nms="cross_class") == [(0, 0)]


def test_fast_nms_keeps_a_box_at_the_threshold_and_traditional_does_not():
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.25)]
    assert found(boxes, [[0.9], [0.8]], nms="fast") == [(0, 0), (0, 1)]
    pixels = [(0.0, 0.0, 0.49, 0.49), (0.0, 0.0, 0.49, 0.24)]  # 50 x 50 and 50 x 25, both ends included
    assert detection.overlaps(*(np.array(box, np.float32) * 100 for box in pixels), border=1) == pytest.approx(0.5)
    assert found(pixels, [[0.9], [0.8]], nms="traditional", nms_threshold=0.4999) == [(0, 0)]


def test_an_anchor_is_detected_under_its_improbable_classes_too_up_to_the_evaluations_threshold():
    scores = [[0.6, 0.03, 0.01], [0.02, 0.04, 0.03]]
    boxes = [(0.1, 0.1, 0.3, 0.3), (0.6, 0.6, 0.9, 0.9)]
    assert found(boxes, scores) == [(0, 0), (1, 0), (2, 0)]  # the second anchor's best is not above 0.05
    assert len(found(boxes, scores, score_threshold=0.01)) == 6
    assert found(boxes, scores, score_threshold=0.06) == [(0, 0)]


def test_a_higher_threshold_gives_the_part_of_the_detections_above_it():
    loc, conf, mask, priors = heads(3)
    everything = detect(loc, conf, mask, priors, Parameters(), 550)
    for threshold in (0.1, 0.2, 0.5):
        part = detect(loc, conf, mask, priors, Parameters(score_threshold=threshold), 550)
        expected = everything.scores[everything.scores > threshold]
        assert len(expected) and part.scores.tolist() == expected.tolist()


def test_the_number_of_detections_is_bounded_with_every_method():
    loc, conf, mask, priors = heads(4, anchors=2000)
    for nms in detection.NMS:
        assert len(detect(loc, conf, mask, priors, Parameters(nms=nms, max_detections=7), 550).scores) == 7


@pytest.mark.parametrize("nms", ["fast", "cross_class", "traditional"])
@pytest.mark.parametrize("anchors", [0, 50])
def test_without_a_probable_anchor_there_are_no_detections(nms, anchors):
    loc, conf, mask, priors = heads(0, anchors)
    conf[:] = 0.01
    result = detect(loc, conf, mask, priors, Parameters(nms=nms), 550)
    assert result.boxes.shape == (0, 4) and result.coefficients.shape == (0, 32)
    assert result.classes.shape == result.scores.shape == (0,)


def test_of_boxes_without_area_the_most_probable_stays():
    # Their overlap is 0 / 0, which no comparison holds for.
    point, line, box = (0.3, 0.3, 0.3, 0.3), (0.1, 0.2, 0.1, 0.9), (0.2, 0.2, 0.6, 0.6)
    scores = [[0.9], [0.8], [0.7]]
    assert found([point, line, box], scores) == [(0, 0), (0, 2)]
    loc, priors = corners(point, line, box)
    conf = np.array([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], np.float32)
    expected = oracle.detect(loc, conf, np.zeros((3, 1), np.float32), priors)
    np.testing.assert_allclose(expected[2], [0.9, 0.7])


def test_offsets_beyond_all_numbers_give_no_box():
    loc, conf, mask, priors = heads(5)
    loc[:, 2] = 1e6
    with np.errstate(all="raise"):
        assert not len(detect(loc, conf, mask, priors, Parameters(), 550).scores)


def test_boxes_in_pixels_are_clamped_and_cut_off_as_specified():
    boxes = np.array(
        [[0.1, 0.2, 0.5, 0.6], [-0.2, -0.1, 1.3, 1.2], [0.9, 0.9, 0.1, 0.1], [1.2, 0.5, 1.4, 0.6]], np.float32
    )
    expected = [[64.0, 96.0, 320.0, 288.0], [0.0, 0.0, 640.0, 480.0], [64.0, 48.0, 576.0, 432.0]]
    result = detection.to_pixels(boxes, 640, 480)
    assert result.tolist()[:3] == expected
    boxes = np.random.default_rng(0).normal(0.5, 0.5, (500, 4)).astype(np.float32)
    np.testing.assert_array_equal(detection.to_pixels(boxes, 641, 333), oracle.pixel_boxes(boxes, 641, 333))


BAD = {
    "nms": ["soft", None],
    "score_threshold": ["0.3", -0.1, 1.5, True, None],
    "nms_threshold": [2],
    "mask_threshold": [[0.5]],
    "top_k": [0, 1.5, "all", True],
    "max_detections": [-1, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_parameter_that_cannot_be_is_named(name, value):
    with pytest.raises(ConfigError, match=rf"postprocess\.{name} is "):
        Parameters(**{name: value})
