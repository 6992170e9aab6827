import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from fashion_data import CLASSES
from helpers.errors import ConfigError, DataError
from helpers.images import rle
from helpers.images.decoding import decode
from studies.samples import make_frames, write_scenes, write_video
from yolact.scenes import SIZE, Scenes, boxes_of, to_coco
from yolact.sprites import Sprite

COUNT = 40


@pytest.fixture(scope="module")
def made(fashion_mnist_root):
    """The first scenes of each split."""
    splits = {split: Scenes(fashion_mnist_root, split) for split in ("train", "val", "test")}
    return {split: [scenes[number] for number in range(COUNT)] for split, scenes in splits.items()}


@pytest.fixture(scope="module")
def coco(made, tmp_path_factory):
    """Annotations of the test scenes as pycocotools reads them from a file."""
    file = tmp_path_factory.mktemp("coco") / "annotations.json"
    file.write_text(json.dumps(to_coco(made["test"])))
    return COCO(str(file))


def test_a_scene_is_fixed_by_seed_split_and_number(fashion_mnist_root, made):
    again = Scenes(fashion_mnist_root, "test")[3]
    assert (again.image == made["test"][3].image).all() and (again.masks == made["test"][3].masks).all()
    others = [Scenes(fashion_mnist_root, "test", seed=1)[3], made["val"][3], made["test"][4]]
    assert not any(np.array_equal(again.image, other.image) for other in others)


def test_splits_share_no_item(fashion_mnist_root, made):
    train, val, test = (Scenes(fashion_mnist_root, split) for split in ("train", "val", "test"))
    assert not set(train.candidates) & set(val.candidates)
    assert len(train.candidates) + len(val.candidates) == len(train.images) == 60_000 and len(test.images) == 10_000
    for split, scenes in (("train", train), ("val", val), ("test", test)):
        used = np.concatenate([scene.items for scene in made[split]])
        assert set(used) <= set(scenes.candidates)
        assert (scenes.labels[used] == np.concatenate([scene.labels for scene in made[split]])).all()
    packed = {image.tobytes() for image in test.images}
    assert not any(image.tobytes() in packed for image in train.images[train.candidates][:2000])


def test_scenes_are_a_task_worth_learning(made):
    scenes = [scene for of_split in made.values() for scene in of_split]
    assert {scene.image.shape for scene in scenes} == {(SIZE, SIZE, 3)} and scenes[0].image.dtype == np.uint8
    assert {len(scene.items) for scene in scenes} >= {3, 4, 5, 6}
    assert set(np.concatenate([scene.labels for scene in scenes])) == set(range(len(CLASSES)))
    touching = [
        s for s in scenes if (np.stack([cv2.dilate(m.astype(np.uint8), None) for m in s.masks]).sum(0) > 1).any()
    ]
    assert len(touching) > len(scenes) / 3  # items cover each other


def test_masks_are_what_is_seen_of_each_item(fashion_mnist_root, monkeypatch):
    """Painted without its last item, a scene differs just where that item's mask is, give or take its soft edge."""
    painted = []
    paint = Sprite.cover

    def record(self, *place):
        cover = paint(self, *place)
        painted.append(cover)
        return cover

    monkeypatch.setattr(Sprite, "cover", record)
    scene = Scenes(fashion_mnist_root, "test")[0]
    assert len(scene.masks) >= 2 and scene.masks.sum(axis=0).max() == 1  # a pixel is one item's at most
    tried = {cover.mask.tobytes(): cover for cover in painted}
    assert scene.masks[-1].tobytes() in tried  # nothing covers the last item
    whole = [next(c for c in painted if (mask & ~c.mask).sum() == 0 and mask.any()) for mask in scene.masks]
    for mask, cover, later in zip(scene.masks, whole, range(1, len(whole) + 1), strict=True):
        hidden = scene.masks[later:].any(axis=0)
        assert (mask == cover.mask & ~hidden).all()
        assert mask.sum() >= 0.6 * cover.area


def test_pixels_of_a_mask_have_the_items_colors():
    item = np.full((28, 28), 200, np.uint8)
    sprite = Sprite(
        np.dstack([item, np.full_like(item, 255)]), np.zeros(3, np.float32), np.float32([255, 0, 0]), 2.0, 0.0
    )
    cover = sprite.cover(50.0, 40.0, 100, 120)
    image = np.full((100, 120, 3), 77, np.float32)
    cover.paint(image)
    assert (boxes_of(cover.mask[None]) == [[22, 12, 78, 68]]).all() and cover.area == 56 * 56
    assert (image[14:66, 24:76] == [200, 0, 0]).all()
    assert (image[~cv2.dilate(cover.mask.astype(np.uint8), np.ones((5, 5))).astype(bool)] == 77).all()


def test_pycocotools_reads_the_exact_masks_boxes_and_labels(coco, made):
    assert len(coco.getImgIds()) == COUNT and [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for number, scene in enumerate(made["test"]):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=number))
        assert [annotation["category_id"] for annotation in annotations] == scene.labels.tolist()
        for annotation, mask in zip(annotations, scene.masks, strict=True):
            assert (coco.annToMask(annotation).astype(bool) == mask).all()
            assert annotation["area"] == mask.sum()
            x, y, width, height = map(int, annotation["bbox"])
            cut = mask[y : y + height, x : x + width]
            assert cut.sum() == mask.sum() and all(cut.any(axis=axis)[[0, -1]].all() for axis in (0, 1))


@pytest.mark.parametrize("fill", [np.zeros, np.ones])
def test_a_mask_of_nothing_and_of_everything_is_encoded(fill):
    assert (rle.decode(rle.encode(fill((3, 5), bool))) == fill((3, 5), bool)).all()


def test_written_images_are_the_scenes_and_the_annotations_lie_apart(fashion_mnist_root, tmp_path, made):
    folder = write_scenes(Scenes(fashion_mnist_root, "test"), str(tmp_path), 3)
    assert sorted(path.name for path in Path(folder).iterdir()) == ["00000.png", "00001.png", "00002.png"]
    image = decode(Path(folder, "00002.png").read_bytes(), 10**6)
    assert (image[..., ::-1] == made["test"][2].image).all()
    annotations = json.loads((tmp_path / "annotations.json").read_text())
    assert [entry["file_name"] for entry in annotations["images"]] == ["00000.png", "00001.png", "00002.png"]
    written = (tmp_path / "annotations.json").stat().st_mtime_ns
    write_scenes(Scenes(fashion_mnist_root, "test"), str(tmp_path), 3)
    assert (tmp_path / "annotations.json").stat().st_mtime_ns == written
    write_scenes(Scenes(fashion_mnist_root, "test", seed=1), str(tmp_path), 3)
    assert (tmp_path / "annotations.json").stat().st_mtime_ns != written


def test_an_unknown_split_is_refused(fashion_mnist_root):
    with pytest.raises(ConfigError, match="'dev', not one of train, val, test"):
        Scenes(fashion_mnist_root, "dev")


def test_a_clip_moves_smoothly_and_is_the_same_each_time(fashion_mnist_root):
    clip = list(make_frames(Scenes(fashion_mnist_root, "test", 0, 120, 200), 12))
    assert {frame.shape for frame in clip} == {(120, 200, 3)} and clip[0].dtype == np.uint8
    steps = [np.abs(clip[i].astype(int) - clip[i + 1]).mean() for i in range(11)]
    far = np.abs(clip[0].astype(int) - clip[-1]).mean()
    assert 0 < max(steps) < 0.6 * far
    assert all(
        (a == b).all()
        for a, b in zip(clip, make_frames(Scenes(fashion_mnist_root, "test", 0, 120, 200), 12), strict=True)
    )


@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_clip_becomes_a_video_file(fashion_mnist_root, tmp_path, suffix):
    clip = list(make_frames(Scenes(fashion_mnist_root, "test"), 5))
    capture = cv2.VideoCapture(str(write_video(tmp_path / f"clip{suffix}", clip)))
    for frame in clip:
        read, picture = capture.read()
        assert read and np.abs(picture[..., ::-1].astype(int) - frame).mean() < 12  # both codecs lose a little
    assert not capture.read()[0]


def test_a_video_that_cannot_be_written_is_a_clear_error(fashion_mnist_root, tmp_path):
    with pytest.raises(DataError, match="cannot write a video"):
        write_video(tmp_path / "nowhere" / "clip.avi", make_frames(Scenes(fashion_mnist_root, "test"), 2))
    with pytest.raises(DataError, match="no frames"):
        write_video(tmp_path / "clip.avi", [])
