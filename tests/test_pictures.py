import re

import numpy as np
import pytest

from helpers.images.drawing import draw, picture_name

PREDICTIONS = [{"class_id": 1, "label": "Trouser", "score": 0.987, "box": None, "mask": None}]

HOSTILE = [
    "/data/../../etc/passwd.png",
    "/data/..",
    "/data/a b#c%2F?.png",
    "/data/" + "x" * 250 + ".png",
    "/data/two\nlines.png",
    "/data/日本.png",
    "/data/.hidden",
    "/data/con.png",
    "/data/-rf.png",
]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_picture_name_is_one_plain_file_name(path):
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.png", picture_name(path))
    assert ".." not in picture_name(path) and len(picture_name(path)) < 128


def test_no_two_inputs_share_a_picture_name():
    paths = [*HOSTILE, "/a/x.png", "/b/x.png", "/a/x.jpg", "/a/X.png", "/a/x_.png", "/a/x .png", "/a/x+.png"]
    assert len({picture_name(path).lower() for path in paths}) == len(paths)
    assert picture_name(paths[0]) == picture_name(paths[0])


def test_a_small_image_is_enlarged_and_captioned():
    image = np.full((28, 28, 3), 100, np.uint8)
    picture = draw(image, PREDICTIONS)
    assert picture.shape == (224, 224, 3)
    assert (picture != 100).any() and (picture[-50:] == 100).all()  # the caption is at the top
    assert (image == 100).all()


def test_without_predictions_the_image_is_left_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    np.testing.assert_array_equal(draw(image, []), image)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1)])
def test_a_thin_image_does_not_become_a_huge_picture(shape):
    assert draw(np.zeros((*shape, 3), np.uint8), PREDICTIONS).nbytes < 20_000_000
