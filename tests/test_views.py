"""Tiles of large images, and crops that a second model looks at: rows of views become rows of images again."""

import resource
import weakref
from pathlib import Path

import cv2
import graphs
import numpy as np
import pyarrow as pa
import pytest

from helpers import pipeline
from helpers.config import Config, load_config
from helpers.errors import ConfigError
from helpers.pipeline import views
from helpers.pipeline.listing import list_images

SPOT = (40, 30, 48, 36)  # left, top, right, bottom


def settings(**overrides) -> Config:
    return load_config("local", **{"spark.master": "local[1]", "pictures": 0, **overrides})


def results_of(source: Path, models: list[str], config: Config, memory: int | None = None) -> list[dict]:
    """What a task gives for all images, in this process."""
    task = pipeline.make_task(str(source), models, str(source.parent / "out"), config)
    images = list_images(task.source, config).images
    rows = pa.Table.from_batches(task.results(images.to_batches(), memory_megabytes=memory))
    return rows.sort_by([("path", "ascending"), ("model", "ascending")]).to_pylist()


def picture(path: Path, size: tuple[int, int], *spots: tuple[int, int, int, int], level: int = 255) -> None:
    """A dark image with bright spots."""
    pixels = np.full((size[1], size[0], 3), 50, np.uint8)
    for left, top, right, bottom in spots:
        pixels[top:bottom, left:right] = level
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), pixels)


def boxes(row: dict) -> list[tuple[float, ...]]:
    return sorted(tuple(p["box"][side] for side in ("x1", "y1", "x2", "y2")) for p in row["predictions"])


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    return graphs.bright_spot(tmp_path_factory.mktemp("bright_spot")).storage.root


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> str:
    return graphs.brightness(tmp_path_factory.mktemp("brightness")).storage.root


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> str:
    return graphs.mean_color(tmp_path_factory.mktemp("mean_color")).storage.root


@pytest.fixture
def photos(tmp_path) -> Path:
    return tmp_path / "photos"


# ---------------------------------------------------------------- tiles


def test_a_small_object_in_a_large_picture_is_found_in_its_tile_and_not_without(photos, detector):
    spot = (5003, 2001, 5009, 2007)
    picture(photos / "large.png", (8000, 5000), spot)  # 40 megapixels
    (blind,) = results_of(photos, [detector], settings())
    assert blind["error"] is None and blind["predictions"] == []
    (row,) = results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    assert boxes(row) == [spot] and (row["width"], row["height"]) == (8000, 5000)


def test_the_tiles_of_a_large_picture_take_little_memory_at_once(photos, detector):
    picture(photos / "large.png", (8000, 5000))
    results_of(photos, [detector], settings())  # the picture itself has been decoded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    tiles = 3 * 8000 * 5000 / (1 - 0.2) ** 2  # bytes
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < tiles / 4


def test_no_picture_is_in_memory_while_the_next_is_decoded(photos, detector, monkeypatch):
    for number in range(3):
        picture(photos / f"{number}.png", (400, 64), SPOT)
    references, decode = [], views.decode

    def watch(*arguments):
        assert [reference() for reference in references] == [None] * len(references)
        pixels = decode(*arguments)
        references.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(views, "decode", watch)
    rows = results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    assert [boxes(row) for row in rows] == [[SPOT]] * 3 and len(references) == 3


@pytest.mark.parametrize("overrides", [{}, {"cascade.enabled": True}])
def test_few_pictures_wait_for_the_second_model(photos, detector, classifier, monkeypatch, overrides):
    for number in range(12):
        picture(photos / f"{number:02d}.png", (400, 64), SPOT)
    references, most, decode = [], 0, views.decode

    def watch(*arguments):
        nonlocal most
        most = max(most, sum(reference() is not None for reference in references))
        pixels = decode(*arguments)
        references.append(weakref.ref(pixels))
        return pixels

    monkeypatch.setattr(views, "decode", watch)
    monkeypatch.setattr(views, "HELD_BYTES", 1)
    rows = results_of(photos, [detector, classifier], settings(**{"tiling.factor": 2}, **overrides))
    assert len(rows) == 24 and all(row["error"] is None for row in rows) and len(references) == 12
    assert most <= 4


def test_an_object_that_a_tiles_edge_cuts_is_one_object(photos, detector):
    picture(photos / "a.png", (200, 64), (45, 20, 75, 40))
    (row,) = results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    assert boxes(row) == [(45, 20, 75, 40)]


def test_images_within_the_factor_are_not_cut_and_damaged_ones_are_errors(photos, detector):
    picture(photos / "small.png", (128, 64), SPOT)
    picture(photos / "wide.png", (400, 64), (10, 10, 20, 20), (300, 10, 320, 20))
    (photos / "damaged.png").write_bytes(b"no image")
    damaged, small, wide = results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    alone = results_of(photos, [detector], settings())
    assert "not an image" in damaged["error"] and damaged["predictions"] is None
    assert small["predictions"] == alone[1]["predictions"]
    assert boxes(wide) == [(10, 10, 20, 20), (300, 10, 320, 20)]


def test_filters_are_of_the_image_and_not_of_its_tiles(photos, detector):
    picture(photos / "wide.png", (400, 64), (10, 10, 20, 20), (300, 10, 320, 20))
    for region, expected in (([0.5, 0, 1, 1], (300, 10, 320, 20)), ([0, 0, 100, 64], (10, 10, 20, 20))):
        overrides = {"tiling.factor": 2, "postprocess.region": region}
        (row,) = results_of(photos, [detector], settings(**overrides))
        assert boxes(row) == [expected]


def test_an_embedding_is_the_mean_over_the_tiles(photos, embedder):
    picture(photos / "a.png", (24, 8), (0, 0, 8, 8), level=110)
    (row,) = results_of(photos, [embedder], settings(**{"tiling.factor": 1, "tiling.overlap": 0}))
    assert row["embedding"] == pytest.approx([70, 70, 70]) and row["predictions"] == []


def test_a_tile_that_goes_wrong_is_its_images_error(photos, detector, monkeypatch):
    picture(photos / "a.png", (200, 64), SPOT)
    picture(photos / "b.png", (64, 64), SPOT)
    fit = views.fit

    def fail(pixels, spec):
        if pixels.base is not None and pixels.shape[0] * pixels.shape[1] and pixels.strides[0] > 64 * 3:
            raise ValueError("no such tile")
        return fit(pixels, spec)

    monkeypatch.setattr(views, "fit", fail)
    large, small = results_of(photos, [detector], settings(**{"tiling.factor": 2}))
    assert "no such tile" in large["error"] and large["predictions"] is None
    assert boxes(small) == [SPOT]


# ---------------------------------------------------------------- cascades


def cascade(**overrides) -> Config:
    return settings(**{"cascade.enabled": True, **overrides})


def test_a_second_model_says_what_each_detection_is(photos, detector, classifier):
    for name, level in (("a.png", 255), ("b.png", 202)):
        picture(photos / name, (64, 64), SPOT, level=level)
    picture(photos / "c.png", (64, 64))
    (photos / "d.png").write_bytes(b"no image")
    rows = results_of(photos, [detector, classifier], cascade(**{"cascade.padding": 0}))
    detections, classes = rows[::2], rows[1::2]
    assert [len(row["predictions"] or ()) for row in detections] == [1, 1, 0, 0]
    for row in classes[:2]:
        (prediction,) = row["predictions"]
        assert boxes(row) == [SPOT] and prediction["label"] == "bright" and prediction["score"] > 0.99
    assert classes[2]["error"] is None and classes[2]["predictions"] == []
    assert "not an image" in classes[3]["error"] and classes[3]["predictions"] is None
    assert {row["model"].partition("@")[0] for row in detections} != {row["model"].partition("@")[0] for row in classes}


def test_padding_shows_what_is_around_a_detection(photos, detector, classifier):
    picture(photos / "a.png", (64, 64), SPOT)
    (_, row) = results_of(photos, [detector, classifier], cascade(**{"cascade.padding": 3}))
    (prediction,) = row["predictions"]
    assert prediction["label"] == "dark" and boxes(row) == [SPOT]


def test_detections_of_another_detector_on_crops_are_in_pixels_of_the_image(photos, detector, tmp_path):
    second = graphs.bright_spot(tmp_path / "second", side=32, name="second").storage.root
    picture(photos / "a.png", (64, 64), SPOT)
    (_, row) = results_of(photos, [detector, second], cascade(**{"cascade.padding": 1}))
    np.testing.assert_allclose(boxes(row), [SPOT], atol=0.5)


def test_only_the_best_detections_are_looked_at(photos, detector, classifier):
    spots = [(300 * i + 10, 10, 300 * i + 20, 20) for i in range(4)]
    picture(photos / "a.png", (1200, 64), *spots)
    tiled = {"tiling.factor": 2}
    first, second = results_of(photos, [detector, classifier], cascade(**tiled))
    assert boxes(first) == boxes(second) == spots
    _, second = results_of(photos, [detector, classifier], cascade(**tiled, **{"cascade.max_crops": 2}))
    assert len(second["predictions"]) == 2
    _, second = results_of(photos, [detector, classifier], cascade(**tiled, **{"cascade.min_score": 0.95}))
    assert second["predictions"] == []


def test_crops_of_several_images_are_one_batch(photos, detector, classifier, monkeypatch):
    for number in range(5):
        picture(photos / f"{number}.png", (64, 64), SPOT)
    sizes = []
    batch = views.tensor_batch
    monkeypatch.setattr(views, "tensor_batch", lambda keys, *rest: sizes.append(keys.num_rows) or batch(keys, *rest))
    results_of(photos, [detector, classifier], cascade())
    assert sizes == [5, 5]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("detector", None, "needs two models, and this run has 1"),
        ("classifier", "detector", "the first model is for classification"),
        ("detector", "embedder", "the second model gives embeddings"),
    ],
)
def test_a_cascade_of_unfit_models_is_refused(photos, request, first, second, message):
    picture(photos / "a.png", (64, 64), SPOT)
    models = [request.getfixturevalue(name) for name in (first, second) if name]
    with pytest.raises(ConfigError, match=message):
        pipeline.make_task(str(photos), models, str(photos.parent / "out"), cascade())


# ---------------------------------------------------------------- settings


def test_a_models_name_changes_with_what_changes_its_predictions(photos, detector, classifier):
    picture(photos / "a.png", (64, 64), SPOT)

    def names(config: Config) -> tuple[str, ...]:
        task = pipeline.make_task(str(photos), [detector, classifier], str(photos.parent / "out"), config)
        return tuple(model.identity for model in task.models)

    plain, tiled, chained = names(settings()), names(settings(**{"tiling.factor": 2})), names(cascade())
    assert not {*plain} & {*tiled} and chained[0] == plain[0] and chained[1] != plain[1]
    assert names(cascade(**{"cascade.padding": 0.3}))[1] != chained[1]
    assert names(settings(**{"tiling.overlap": 0.5})) == plain


def test_each_model_takes_the_parameters_it_has_and_its_own_by_name(photos, detector, classifier):
    picture(photos / "a.png", (64, 64), SPOT)
    overrides = {"postprocess.top_k": 1, "postprocess.score_threshold": 0.7, "postprocess.bright_spot.min_area": 5}
    task = pipeline.make_task(str(photos), [detector, classifier], str(photos.parent / "out"), settings(**overrides))
    first, second = (model.parameters for model in task.models)
    assert (first["score_threshold"], first["min_area"]) == (0.7, 5) and "top_k" not in first
    assert second["top_k"] == 1 and "min_area" not in second


@pytest.mark.parametrize(
    ("name", "message"), [("topk", r"postprocess\.topk.*no such parameter"), ("resnet.top_k", "no model of this run")]
)
def test_parameters_of_no_model_are_refused(photos, detector, classifier, name, message):
    picture(photos / "a.png", (64, 64), SPOT)
    with pytest.raises(ConfigError, match=message):
        pipeline.make_task(
            str(photos), [detector, classifier], str(photos.parent / "out"), settings(**{f"postprocess.{name}": 1})
        )
