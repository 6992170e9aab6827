"""YOLACT's training on stored images: COCO's annotations, who reads what, and a network of a user's own classes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from test_datasets import spy
from trainings import PROGRAMS, alone, places, train_scenes, weights

import train_yolact
from fashion_data import CLASSES
from fashion_sets import open_images
from helpers.config import PROJECT
from helpers.errors import BundleError, DataError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import export, load_network
from helpers.images import rle
from helpers.images.decoding import load
from helpers.metrics import average_precision
from helpers.storage import LocalStorage, StorageOptions, open_storage
from helpers.training import read_batches, train_on_spark, write_shards
from helpers.yolact.detection import Parameters
from studies.samples import write_scenes
from yolact.coco import read_annotations, to_mask
from yolact.datasets import AugmentedScenes, open_scenes
from yolact.evaluation import segment, to_coco_results
from yolact.scenes import Scenes, to_coco

SIZE, COUNT, HELD_OUT = 160, 50, 6
FEW = ["--epochs", "1", "--batch-size", "8", "--precision", "fp32", "--warm-up-steps", "1"]
WEIGHTS = PROJECT / "notebooks" / "weights" / "yolact_scenes.pt"
OWN = {
    0: (90, "top"),
    1: (7, "trousers"),
    9: (23, "boot"),
}  # of Fashion-MNIST's classes: id and name as a user has them


@pytest.fixture(scope="module")
def folder(fashion_mnist_root, tmp_path_factory) -> str:
    """Training scenes as files."""
    root = str(tmp_path_factory.mktemp("scenes"))
    write_scenes(Scenes(fashion_mnist_root, "train", 0, SIZE, SIZE), root, COUNT)
    return root


@pytest.fixture(scope="module")
def held_out(fashion_mnist_root, tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("held_out"))
    write_scenes(Scenes(fashion_mnist_root, "val", 0, SIZE, SIZE), root, HELD_OUT)
    return root


@pytest.fixture(scope="module")
def shards(spark, folder, tmp_path_factory) -> str:
    return pack(spark, folder, str(tmp_path_factory.mktemp("shards")))


@pytest.fixture(scope="module")
def sets(fashion_mnist_root, folder, shards) -> dict:
    """The same scenes made, from files and from shards."""
    places = {"made": None, "folder": folder, "shards": shards}
    opened = {name: open_scenes(place, fashion_mnist_root, "train", SIZE, COUNT) for name, place in places.items()}
    assert {labels for _, labels in opened.values()} == {CLASSES}
    return {name: scenes for name, (scenes, _) in opened.items()}


def pack(spark, place: str, target: str) -> str:
    table, labels = read_annotations(place)
    count = write_shards(spark.createDataFrame(table), f"{place}/images", target, images_per_shard=8, labels=labels)
    assert count == table.num_rows
    return target


def annotate(folder: Path, annotations: list[dict], sizes: list[tuple[int, int]], categories: list[dict]) -> str:
    """A folder with an image of noise of each size, (height, width), numbered from 100."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images = []
    for number, (height, width) in enumerate(sizes, start=100):
        cv2.imwrite(str(folder / "images" / f"{number}.png"), rng.integers(0, 256, (height, width, 3), np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return str(folder)


CATEGORIES = [{"id": 90, "name": "boot"}, {"id": 7, "name": "coat"}]
SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def annotation(image: int = 100, category: int = 7, segmentation=SQUARE, **more) -> dict:
    return {"image_id": image, "category_id": category, "segmentation": segmentation, **more}


def test_masks_are_those_of_pycocotools():
    height, width = 40, 60
    truth = COCO()
    truth.imgs = {1: {"height": height, "width": width}}
    mask = np.zeros((height, width), bool)
    mask[3:20, 7:50] = mask[30:, 0] = True
    compressed = rle.encode(mask)
    runs = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    uncompressed = {"size": [height, width], "counts": np.diff(runs, prepend=0, append=mask.size).tolist()}
    polygons = [[5.5, 3.2, 40.1, 8, 22, 30.7], [50, 20, 65, 20, 65, 45, 50, 45]]  # the second reaches beyond the image
    for segmentation in (polygons, polygons[:1], compressed, uncompressed):
        found = to_mask(segmentation, height, width)
        expected = truth.annToMask({"image_id": 1, "segmentation": segmentation})
        assert found.dtype == bool and (found == expected).all() and 0 < found.sum() < found.size
    assert (to_mask(compressed, height, width) == mask).all() and (to_mask(uncompressed, height, width) == mask).all()
    assert not to_mask([[1, 1, 5, 5]], height, width).any()  # which pycocotools would take for a box


def test_sparse_ids_crowds_and_images_without_annotations(tmp_path):
    annotations = [annotation(102, 90, note="kept"), annotation(101, 7, iscrowd=1), annotation(102, 7), annotation()]
    place = annotate(tmp_path, annotations, [(20, 30), (25, 15), (20, 20), (8, 8)], CATEGORIES)
    table, labels = read_annotations(place)
    assert labels == ("coat", "boot")
    rows = table.to_pylist()
    assert [(row["file"], row["width"], row["height"]) for row in rows] == [("100.png", 30, 20), ("102.png", 20, 20)]
    assert [[a["label"] for a in row["annotations"]] for row in rows] == [[0], [1, 0]]
    assert json.loads(rows[1]["annotations"][0]["segmentation"]) == SQUARE
    everything = read_annotations(place, empty=True).table.to_pylist()
    assert [len(row["annotations"]) for row in everything] == [1, 0, 2, 0]
    scenes = [open_scenes(place, "", split, SIZE)[0] for split in ("train", "val")]
    assert [len(one) for one in scenes] == [2, 4]
    assert scenes[1].__getitems__(torch.tensor([1]))[0].masks.shape == (0, SIZE, SIZE)


def test_images_are_prepared_as_for_inference_and_masks_with_them(tmp_path):
    half = {"size": [80, 240], "counts": [0, 80 * 60, 80 * 180]}  # the left quarter
    speck = [[5, 5, 6, 5, 6, 6, 5, 6]]  # a pixel of the image and less than half of one of the scene
    place = annotate(tmp_path, [annotation(segmentation=half), annotation(segmentation=speck)], [(80, 240)], CATEGORIES)
    (scene,) = open_scenes(place, "", "train", 40)[0].__getitems__(torch.tensor([0]))
    spec = replace(get_architecture("yolact_scenes").input, width=40, height=40)
    assert (scene.image == load((tmp_path / "images" / "100.png").read_bytes(), spec, 10**6)[0]).all()
    assert scene.labels.tolist() == [0] and scene.masks.shape == (1, 40, 40) and scene.masks.dtype == bool
    assert scene.boxes.tolist() == [[0, 0, 10, 40]]


def test_the_same_scenes_come_from_each_kind_of_place(sets):
    def content(scenes) -> dict:
        found = scenes.__getitems__(torch.arange(COUNT))
        return {scene.image.tobytes(): (scene.labels.tolist(), scene.masks.tolist()) for scene in found}

    expected = content(sets["made"])
    assert len(expected) == COUNT and content(sets["folder"]) == expected and content(sets["shards"]) == expected


@pytest.mark.parametrize("place", ["made", "folder", "shards"])
@pytest.mark.parametrize("processes", [1, 2])
def test_shares_of_scenes_are_disjoint_complete_and_decided_by_seed_and_epoch(sets, place, processes):
    def shown(epoch: int, rank: int = 0, seed: int = 0) -> list[list[int]]:
        return [share.tolist() for share in sets[place].shares(alone(rank, processes), 10, seed, epoch)]

    taken = [number for rank in range(processes) for share in shown(1, rank) for number in share]
    epoch = range(COUNT, 2 * COUNT) if place == "made" else range(COUNT)  # each epoch has made scenes of its own
    assert sorted(taken) == list(epoch)
    assert {len(shown(1, rank)) for rank in range(processes)} == {5}
    assert shown(1) == shown(1) != shown(1, seed=1) and shown(2) != shown(1)


def test_a_rank_reads_the_images_of_its_share_alone(sets, monkeypatch):
    scenes, read = sets["folder"], []
    monkeypatch.setattr(LocalStorage, "read", spy(LocalStorage.read, read))
    batches = list(scenes.shares(alone(1, 2), 8, 0, 0))
    for images, targets in read_batches(AugmentedScenes(scenes, 40, 0, 0), batches, alone(1, 2)):
        assert images.shape == (4, SIZE, SIZE, 3) and images.dtype == torch.uint8 and len(targets) == 4
    assert sorted(read) == sorted(f"{number:05d}.png" for number in torch.cat(batches).tolist())


def test_a_number_of_scenes_takes_the_first(folder, shards):
    for place in (folder, shards):
        scenes, _ = open_scenes(place, "", "train", SIZE, 21)
        taken = torch.cat(list(scenes.shares(alone(), 7, 0, 0)))
        assert len(scenes) == 21 and sorted(taken.tolist()) == list(range(21))
        assert len(scenes.__getitems__(taken)) == 21


def test_scenes_are_read_from_adls(folder, sets, adls_root, dfs):
    config = SimpleNamespace(storage=StorageOptions(dfs.endpoint, "env:ADLS_KEY"))
    storage = open_storage(adls_root, config)
    for path in ("annotations.json", *(f"images/{number:05d}.png" for number in range(4))):
        storage.write(path, Path(folder, path).read_bytes())
    scenes, labels = open_scenes(adls_root, "", "train", SIZE, config=config)
    assert labels == CLASSES and len(scenes) == COUNT
    both = [one.__getitems__(torch.tensor([3, 0])) for one in (scenes, sets["made"])]
    for found, expected in zip(*both, strict=True):
        assert (found.image == expected.image).all() and (found.masks == expected.masks).all()
    with pytest.raises(DataError, match=r"abfss.*00009.png: the file is gone.*take it out of annotations.json"):
        scenes.__getitems__(torch.tensor([9]))


def test_training_on_files_is_training_on_the_scenes_in_them(folder, held_out, fashion_mnist_root, tmp_path):
    few = [*FEW, "--train-scenes", "16"]
    stored = [*few, "--training-set", folder, "--validation-set", held_out, "--num-workers", "1"]
    results = [
        train_scenes([*few, "--validation-scenes", str(HELD_OUT)], fashion_mnist_root, tmp_path / "made"),
        train_scenes(stored, fashion_mnist_root, tmp_path / "stored"),
    ]
    made, read = ({k: v for k, v in result["epochs"][0].items() if "second" not in k} for result in results)
    assert read == pytest.approx(made, rel=1e-6) and {"train_mask_loss", "val_AP"} <= set(made)
    assert results[0]["labels"] == results[1]["labels"] == list(CLASSES)
    own = own_classes(folder, tmp_path / "own")
    with pytest.raises(DataError, match="training has the classes trousers.*validation T-shirt.*the same categories"):
        train_scenes([*stored, "--training-set", own], "", tmp_path / "none")


def test_validation_on_files_measures_the_network(held_out, fashion_mnist_root):
    network = load_network(get_architecture("yolact_scenes"), WEIGHTS)
    scenes = open_scenes(None, fashion_mnist_root, "val", SIZE)[0].__getitems__(torch.arange(HELD_OUT))
    found = segment(network, [scene.image for scene in scenes])
    expected = average_precision(to_coco(scenes), to_coco_results(dict(enumerate(found))))
    validation_set, labels = open_scenes(held_out, "", "val", SIZE)
    measured, predictions = train_yolact.evaluate(network, validation_set, labels, alone())
    assert measured == {f"val_{name}": value for name, value in expected.items()} and measured["val_AP"] > 0.3
    assert predictions == found


def own_classes(folder: str, target: Path) -> str:
    """The scenes as the data of a user who is after three kinds of items, with ids of his own."""
    shutil.copytree(folder, target)
    content = json.loads((target / "annotations.json").read_text())
    kept = [a for a in content["annotations"] if a["category_id"] in OWN]
    content["annotations"] = [{**a, "category_id": OWN[a["category_id"]][0]} for a in kept]
    content["categories"] = [{"id": number, "name": name} for number, name in OWN.values()]
    (target / "annotations.json").write_text(json.dumps(content))
    return str(target)


def test_two_spark_tasks_train_a_network_of_own_classes_which_becomes_a_bundle(
    spark, folder, held_out, tmp_path, capsys
):
    place, run = own_classes(folder, tmp_path / "own"), tmp_path / "run"
    arguments = [*FEW, "--train-scenes", "16", *places(str(tmp_path / "no_data"), run)]
    arguments += ["--training-set", pack(spark, place, str(tmp_path / "shards"))]
    arguments += ["--validation-set", own_classes(held_out, tmp_path / "own_held_out")]
    arguments += ["--validation-scenes", str(HELD_OUT), "--initial-weights", str(WEIGHTS)]
    result = train_on_spark(spark, PROGRAMS / "train_yolact.py", arguments, processes=2)
    labels = ["trousers", "boot", "top"]
    assert result["labels"] == labels and result["processes"] == 2 and 0 <= result["val_AP"] <= 1
    assert "weights, but for prediction_layers.0.conf_layer and semantic_seg_conv" in capsys.readouterr().out
    started, ended = torch.load(WEIGHTS, weights_only=True), weights(run)
    for name in ("backbone.stem.0.weight", "backbone.stem.1.running_var", "fpn.lat_layers.0.weight"):
        assert torch.nn.functional.cosine_similarity(started[name].ravel(), ended[name].ravel(), dim=0) > 0.9
    bundle = export("yolact_scenes", run / "checkpoint.pt", open_storage(str(tmp_path / "bundle")))
    assert list(bundle.manifest.labels) == labels and Parameters(**bundle.manifest.postprocess)
    assert [output.shape for output in bundle.manifest.outputs if output.name == "conf"] == [(1575, 4)]

    (tmp_path / "apart").mkdir()
    shutil.copy(run / "checkpoint.pt", tmp_path / "apart" / "checkpoint.pt")
    with pytest.raises(BundleError, match=r"conf_layer.* keep the result.json of its training beside it"):
        export("yolact_scenes", tmp_path / "apart" / "checkpoint.pt", open_storage(str(tmp_path / "none")))
    (tmp_path / "apart" / "result.json").write_text("{")
    with pytest.raises(BundleError, match="result.json is not what a training leaves"):
        export("yolact_scenes", tmp_path / "apart" / "checkpoint.pt", open_storage(str(tmp_path / "none")))
    with pytest.raises(BundleError, match="fashion_cnn has fixed classes"):
        export("fashion_cnn", run / "checkpoint.pt", open_storage(str(tmp_path / "none")))


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([annotation(image=5)], "an annotation is of image 5, which the file does not describe"),
        ([annotation(category=8)], "an annotation is of category 8, which the file does not describe"),
        ([annotation(iscrowd=1)], "no annotated image"),
        ([], "no annotated image"),
        ([{"image_id": 100, "category_id": 7}], "annotations.json is not a file of COCO's.*segmentation"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(tmp_path, annotations, message):
    with pytest.raises(DataError, match=message):
        read_annotations(annotate(tmp_path, annotations, [(20, 20)], CATEGORIES))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [9, 9], "counts": [81]}, "no run-length encoding of 20 rows and 30 columns"),
        ({"size": [20, 30], "counts": [5, 5]}, "its runs come to 10 pixels and the image has 600"),
        ({"size": [20, 30], "counts": "05"}, "its runs come to 5 pixels and the image has 600"),
        ({"size": [20, 30]}, "no run-length encoding"),
        ([[1, 1, 1e9, 1, 5, 5]], "far from the image"),
        ([["a"] * 6], "could not convert"),
        (7, "not iterable"),
    ],
)
def test_a_segmentation_that_cannot_be_used_is_named_with_its_image(tmp_path, segmentation, message):
    place = annotate(tmp_path, [annotation(segmentation=segmentation)], [(20, 30)], CATEGORIES)
    scenes, _ = open_scenes(place, "", "train", SIZE)
    with pytest.raises(DataError, match=rf"100.png: a segmentation of it cannot be read: .*{message}"):
        scenes.__getitems__(torch.tensor([0]))


def test_a_missing_damaged_or_other_image_is_named(tmp_path):
    annotations = [annotation(image) for image in (100, 101, 102)]
    place = annotate(tmp_path, annotations, [(20, 20)] * 3, CATEGORIES)
    (tmp_path / "images" / "100.png").unlink()
    (tmp_path / "images" / "101.png").write_bytes(b"no image")
    cv2.imwrite(str(tmp_path / "images" / "102.png"), np.zeros((10, 20, 3), np.uint8))
    scenes, _ = open_scenes(place, "", "train", SIZE)
    for index, message in enumerate(
        (
            "100.png: the file is gone.*annotations.json",
            "101.png: the file is not an image.*remove it from the training set",
            "102.png has 20 x 10 pixels .* its annotations are of 20 x 20",
        )
    ):
        with pytest.raises(DataError, match=message):
            scenes.__getitems__(torch.tensor([index]))


def test_a_place_without_scenes_is_named(spark, folder, shards, tmp_path):
    with pytest.raises(DataError, match="holds no scenes: it has neither annotations.json"):
        open_scenes(str(tmp_path), "", "train", SIZE)
    with pytest.raises(DataError, match="another kind, without label:"):
        open_images(shards, "")
    table = spark.createDataFrame(read_annotations(folder).table).limit(2)
    for rows, message in (
        (table.selectExpr("file", "1 as label"), "without annotations, height, width"),
        (table, "give write_shards their labels"),
    ):
        write_shards(rows, f"{folder}/images", str(tmp_path / "shards"))
        with pytest.raises(DataError, match=message):
            open_scenes(str(tmp_path / "shards"), "", "train", SIZE)
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(DataError, match="annotations.json is not a file of COCO's instances: JSONDecodeError"):
        open_scenes(str(tmp_path), "", "train", SIZE)
