import numpy as np
import pytest
from pycocotools import mask as coco

from helpers.images import rle
from helpers.tasks.tiling import merge, shift, tiles

SIZE = (300, 200)
LEFT, RIGHT = (0, 0, 180, 200), (120, 0, 300, 200)


def prediction(box=None, score=0.9, class_id=0, mask=None, keypoints=None) -> dict:
    sides = box and dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
    encoded = None if mask is None else rle.encode(mask)
    label = ("cat", "dog")[class_id]
    return {
        "class_id": class_id,
        "label": label,
        "score": score,
        "box": sides,
        "mask": encoded,
        "keypoints": keypoints,
    }


def box_of(one: dict) -> list[float]:
    return list(one["box"].values())


def rectangle(box, size) -> np.ndarray:
    mask = np.zeros(size[::-1], bool)
    x1, y1, x2, y2 = box
    mask[y1:y2, x1:x2] = True
    return mask


def seen_from(window, box, **entries) -> dict | None:
    """What a perfect network finds of a rectangle of the image in one tile."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = max(box[0], left), max(box[1], top), min(box[2], right), min(box[3], bottom)
    if x1 >= x2 or y1 >= y2:
        return None
    own = (x1 - left, y1 - top, x2 - left, y2 - top)
    return prediction(own, mask=rectangle(own, (right - left, bottom - top)), **entries)


@pytest.mark.parametrize("size", [(640, 640), (641, 300), (1000, 2000), (10007, 10), (100, 100)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_the_image_evenly_with_the_overlap(size, overlap):
    windows = tiles(size, (640, 640), overlap)
    covered = np.zeros(size[::-1], bool)
    for left, top, right, bottom in windows:
        covered[top:bottom, left:right] = True
        assert (right - left, bottom - top) == (min(size[0], 640), min(size[1], 640))
    assert covered.all() and len(set(windows)) == len(windows)
    starts = sorted({left for left, *_ in windows})
    steps = np.diff(starts)
    assert len(steps) == 0 or (steps.max() - steps.min() <= 1 and steps.max() <= 640 * (1 - overlap) + 1)
    count = len(starts)
    assert count == 1 or (count - 2) * 640 * (1 - overlap) + 640 < size[0]  # one tile less would not do


def test_predictions_of_a_tile_move_with_it():
    mask = np.random.default_rng(0).random((200, 180)) < 0.4
    points = [{"x": 1.0, "y": 2.0, "score": 0.7}]
    (moved,) = shift([prediction((10, 20, 30, 40), mask=mask, keypoints=points)], RIGHT, SIZE)
    assert box_of(moved) == [130, 20, 150, 40]
    assert moved["keypoints"] == [{"x": 121.0, "y": 2.0, "score": 0.7}]
    whole = np.zeros(SIZE[::-1], bool)
    whole[:, 120:] = mask
    np.testing.assert_array_equal(rle.decode(moved["mask"]), whole)
    (plain,) = shift([prediction()], RIGHT, SIZE)
    assert plain == prediction()


def test_an_object_that_two_tiles_see_is_one():
    box = (130, 20, 170, 60)
    tiled = [(window, [seen_from(window, box, score=s)]) for window, s in ((LEFT, 0.8), (RIGHT, 0.9))]
    (one,) = merge("instance_segmentation", tiled, SIZE, 0.5)
    assert box_of(one) == list(box) and one["score"] == 0.9
    assert coco.area(one["mask"]) == 40 * 40


@pytest.mark.parametrize("scores", [(0.9, 0.6), (0.6, 0.9)])
def test_a_whole_object_takes_its_piece_in_whatever_the_scores(scores):
    box = (125, 20, 250, 60)  # cut in the left tile, whole in the right one
    tiled = [(window, [seen_from(window, box, score=s)]) for window, s in zip((LEFT, RIGHT), scores, strict=True)]
    (one,) = merge("detection", tiled, SIZE, 0.5)
    assert box_of(one) == list(box) and one["score"] == 0.9


def test_pieces_of_an_object_that_no_tile_sees_whole_are_joined():
    box = (100, 20, 200, 60)
    tiled = [(window, [seen_from(window, box)]) for window in (LEFT, RIGHT)]
    (one,) = merge("instance_segmentation", tiled, SIZE, 0.5)
    assert box_of(one) == list(box)
    np.testing.assert_array_equal(rle.decode(one["mask"]), rectangle(box, SIZE))


def test_pieces_of_a_long_object_are_joined_over_all_its_tiles():
    size, box = (1000, 100), (30, 20, 970, 60)
    tiled = [(window, [seen_from(window, box)]) for window in tiles(size, (100, 100), 0.2)]
    assert len(tiled) > 10
    (one,) = merge("instance_segmentation", tiled, size, 0.5)
    assert box_of(one) == list(box)
    np.testing.assert_array_equal(rle.decode(one["mask"]), rectangle(box, size))


def test_a_small_object_before_a_large_one_that_is_cut_stays_apart():
    large, small = (0, 0, 240, 200), (140, 90, 160, 110)
    tiled = [(window, [seen_from(window, large), seen_from(window, small)]) for window in (LEFT, RIGHT)]
    assert sorted(box_of(one) for one in merge("detection", tiled, SIZE, 0.5)) == [
        [0, 0, 240, 200],
        [140, 90, 160, 110],
    ]


def test_objects_of_other_classes_and_places_stay():
    tiled = [
        (LEFT, [prediction((10, 10, 50, 50), 0.5), prediction((10, 10, 50, 50), 0.9, 1)]),
        (RIGHT, [prediction((60, 60, 100, 100), 0.7)]),
    ]
    found = merge("detection", tiled, SIZE, 0.5)
    assert [(one["label"], one["score"]) for one in found] == [("dog", 0.9), ("cat", 0.7), ("cat", 0.5)]
    assert box_of(found[1]) == [180, 60, 220, 100]
    assert merge("detection", [(LEFT, []), (RIGHT, [])], SIZE, 0.5) == []


def test_boxes_without_area_are_no_trouble():
    tiled = [(LEFT, [prediction((10, 10, 10, 50)), prediction((10, 10, 10, 50), 0.5)]), (RIGHT, [])]
    assert len(merge("keypoints", tiled, SIZE, 0.5)) == 2


def test_maps_of_tiles_are_one_map_in_which_a_pixel_has_one_class():
    size, classes = (700, 500), np.zeros((500, 700), bool)
    classes[100:400, 200:650] = True
    tiled = []
    for window in tiles(size, (256, 256), 0.25):
        left, top, right, bottom = window
        part = classes[top:bottom, left:right].copy()
        part[-3:] = part[:, -3:] = False  # the edge of a tile knows less
        own = [prediction((0, 0, 1, 1), 0.8, 0, ~part), prediction((0, 0, 1, 1), 0.6, 1, part)]
        tiled.append((window, [one for one in own if coco.area(one["mask"])]))
    cat, dog = merge("semantic_segmentation", tiled, size, 0.5)
    assert (cat["label"], dog["label"]) == ("cat", "dog")
    np.testing.assert_array_equal(rle.decode(dog["mask"]), classes)
    np.testing.assert_array_equal(rle.decode(cat["mask"]), ~classes)
    assert box_of(dog) == [200, 100, 650, 400] and box_of(cat) == [0, 0, 700, 500]
    assert dog["score"] == pytest.approx(0.6) and cat["score"] == pytest.approx(0.8)


def test_classes_of_tiles_have_their_mean_score():
    tiled = [
        (LEFT, [prediction(score=0.8), prediction(score=0.2, class_id=1)]),
        (RIGHT, [prediction(score=0.9, class_id=1), prediction(score=0.1)]),
    ]
    found = merge("classification", tiled, SIZE, 0.5)
    assert [(one["label"], pytest.approx(one["score"])) for one in found] == [("dog", 0.55), ("cat", 0.45)]
    assert all(one["box"] is None for one in found)


def test_embeddings_of_tiles_have_their_mean():
    vectors = [np.array([1.0, 2.0]), np.array([3.0, 6.0])]
    np.testing.assert_array_equal(merge("embedding", list(zip((LEFT, RIGHT), vectors, strict=True)), SIZE, 0.5), [2, 4])
