"""What each process of a training reads, and when."""

import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from trainings import alone, train_fashion

import fashion_data
from fashion_sets import open_images
from helpers.errors import DataError
from helpers.storage import LocalStorage
from helpers.training import Folder, MappedImages, Shards, read_batches, write_shards
from studies.samples import write_images
from yolact.scenes import Scenes

COUNT, BATCH = 1234, 60


@pytest.fixture(scope="module")
def folder(fashion_mnist_root, tmp_path_factory) -> Path:
    """Training images as PNG files, with their labels."""
    root = tmp_path_factory.mktemp("labeled")
    write_images(fashion_mnist_root, str(root), train=True, count=COUNT)
    return root


@pytest.fixture(scope="module")
def shards(spark, folder, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("shards")
    labels = spark.read.parquet(str(folder / "labels.parquet"))
    assert write_shards(labels, str(folder / "images"), str(target), images_per_shard=100) == COUNT
    return target


@pytest.fixture(scope="module")
def sets(fashion_mnist_root, folder, shards) -> dict:
    """The same images in each kind of place."""
    return {
        "files": open_images(None, fashion_mnist_root, COUNT),
        "folder": open_images(str(folder), fashion_mnist_root),
        "shards": open_images(str(shards), fashion_mnist_root),
    }


def test_each_kind_of_place_is_recognized(sets):
    assert [type(images) for images in sets.values()] == [MappedImages, Folder, Shards]
    assert [len(images) for images in sets.values()] == [COUNT] * 3


def shown(images, epoch: int, rank: int = 0, processes: int = 1, first: int = 0, seed: int = 0) -> list[torch.Tensor]:
    return list(images.shares(alone(rank, processes), BATCH, seed, epoch, first))


@pytest.mark.parametrize("place", ["files", "folder", "shards"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_shares_are_equal_disjoint_and_decided_by_seed_and_epoch(sets, place, processes):
    images = sets[place]
    shares = [shown(images, 3, rank, processes) for rank in range(processes)]
    assert {len(share) for share in shares} == {COUNT // BATCH}
    assert {len(batch) for share in shares for batch in share} == {BATCH // processes}
    taken = torch.cat([batch for share in shares for batch in share]).tolist()
    assert len(taken) == len(set(taken)) and set(taken) <= set(range(COUNT))
    assert len(taken) > COUNT - BATCH
    again = shown(images, 3, 0, processes)
    assert all(torch.equal(mine, other) for mine, other in zip(shares[0], again, strict=True))
    for other in (shown(images, 4, 0, processes), shown(images, 3, 0, processes, seed=1)):
        assert not torch.equal(shares[0][0], other[0])
    rest = shown(images, 3, 0, processes, first=7)
    assert len(rest) == len(shares[0]) - 7 and torch.equal(rest[0], shares[0][7])


def test_an_epoch_of_shards_is_well_mixed(sets):
    images = sets["shards"]
    batch = images.__getitems__(shown(images, 0)[0])[1]
    assert len(set(batch.tolist())) == 10
    assert len({int(index) // 100 for index in shown(images, 0)[0]}) > 2  # of several shards


@pytest.mark.parametrize("place", ["folder", "shards"])
def test_every_kind_of_place_gives_the_same_images(sets, place):
    def content(images) -> set:
        pixels, labels = images.__getitems__(torch.arange(COUNT))
        assert pixels.dtype == torch.uint8 and pixels.shape == (COUNT, 28, 28) and labels.dtype == torch.int64
        return {(pixel.numpy().tobytes(), int(label)) for pixel, label in zip(pixels, labels, strict=True)}

    assert content(sets[place]) == content(sets["files"])


def test_a_rank_reads_the_files_of_its_share_alone(sets, monkeypatch):
    images, read = sets["folder"], []
    monkeypatch.setattr(LocalStorage, "read", spy(LocalStorage.read, read))
    batches = shown(images, 0, rank=1, processes=2)
    assert read == []
    for _ in read_batches(images, batches, alone(1, 2)):
        pass
    assert sorted(read) == sorted(images.table["file"][int(index)].as_py() for index in torch.cat(batches))


def test_a_rank_reads_the_shards_of_its_share_alone_and_each_once(shards, monkeypatch):
    read: list[list[str]] = []
    for rank in range(2):
        images = open_images(str(shards), "")
        with monkeypatch.context() as patch:
            read.append([])
            patch.setattr(LocalStorage, "read", spy(LocalStorage.read, read[-1]))
            for _ in read_batches(images, shown(images, 0, rank, 2), alone(rank, 2)):
                pass
        assert len(read[-1]) == len(set(read[-1]))
    assert len(set(read[0]) & set(read[1])) <= 1  # the one in which the stretches meet
    assert set(read[0]) | set(read[1]) == {path.name for path in shards.glob("*.parquet")}


def spy(function, calls: list):
    def called(self, path):
        calls.append(path)
        return function(self, path)

    return called


def test_the_files_are_mapped_and_not_changed(fashion_mnist_root):
    images, _ = fashion_data.load(fashion_mnist_root, train=True)
    assert isinstance(images.base, np.memmap) and isinstance(Scenes(fashion_mnist_root, "train").images.base, np.memmap)
    before = images[0].copy()
    images[0] = 7
    assert (fashion_data.load(fashion_mnist_root, train=True)[0][0] == before).all()


def test_loaders_leave_no_signal_handler_behind(sets):
    """With one, this process would die when any child ends, on a processor with AMX (see `read_batches`)."""
    images, before = sets["files"], signal.getsignal(signal.SIGCHLD)
    assert len(list(read_batches(images, shown(images, 0)[:2], alone(), num_workers=1))) == 2
    assert signal.getsignal(signal.SIGCHLD) == before


def test_loaders_read_ahead_without_changing_what_is_read(sets):
    images = sets["folder"]
    state = torch.get_rng_state()
    one, two = (list(read_batches(images, shown(images, 0)[:4], alone(), num_workers)) for num_workers in (0, 1))
    for (pixels, labels), (others, same) in zip(one, two, strict=True):
        assert torch.equal(pixels, others) and torch.equal(labels, same)
    assert torch.equal(torch.get_rng_state(), state)  # reading takes nothing of the training's randomness


def test_the_classifier_learns_from_each_kind_of_place(folder, shards, fashion_mnist_root):
    few = ["--epochs", "1", "--batch-size", "60", "--precision", "fp32", "--test-images", "10"]
    places = {"files": ["--train-images", str(COUNT)], "folder": ["--training-set", str(folder)]}
    places["shards"] = ["--training-set", str(shards)]
    losses = {name: train_fashion([*few, *place], fashion_mnist_root) for name, place in places.items()}
    losses = {name: result["epochs"][0]["train_loss"] for name, result in losses.items()}
    assert losses["folder"] == pytest.approx(losses["files"], rel=1e-4)  # the same order of the same images
    assert losses["shards"] == pytest.approx(losses["files"], rel=0.2)


def test_shards_written_again_replace_the_earlier_ones(spark, folder, shards, tmp_path):
    labels = spark.read.parquet(str(folder / "labels.parquet"))
    for count, images_per_shard in ((400, 50), (100, 50)):
        write_shards(labels.limit(count), str(folder / "images"), str(tmp_path), images_per_shard)
    index = json.loads((tmp_path / "_index.json").read_text())["shards"]
    assert {shard["file"] for shard in index} == {path.name for path in tmp_path.glob("*.parquet")}
    assert sum(shard["rows"] for shard in index) == pq.read_table(tmp_path, columns=["label"]).num_rows == 100


def test_a_missing_or_damaged_image_is_named(spark, folder, tmp_path):
    fashion_mnist_like = tmp_path / "images"
    fashion_mnist_like.mkdir()
    (fashion_mnist_like / "a.png").write_bytes(b"no image")
    table = spark.createDataFrame([("a.png", 1), ("gone.png", 2)], "file string, label int")
    pq.write_table(table.toArrow(), tmp_path / "labels.parquet")
    images = open_images(str(tmp_path), "")
    for index, message in enumerate(("a.png: the file is not an image", "gone.png: .*labels.parquet")):
        with pytest.raises(DataError, match=message):
            images.__getitems__(torch.tensor([index]))
    with pytest.raises(DataError, match="gone.png: .*leave its row out"):
        write_shards(table, str(fashion_mnist_like), str(tmp_path / "shards"))
    assert not (tmp_path / "shards" / "_index.json").exists()
    with pytest.raises(DataError, match="neither labels.parquet"):
        open_images(str(fashion_mnist_like), "")
    with pytest.raises(DataError, match="no labeled images"):
        write_shards(table.limit(0), str(fashion_mnist_like), str(tmp_path / "shards"))
