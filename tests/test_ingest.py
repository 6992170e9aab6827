import os
from pathlib import Path

import pyarrow as pa
import pytest

from helpers.config import load_config
from helpers.errors import RunError, StorageError
from helpers.pipeline import stages
from helpers.pipeline.listing import LISTED_SCHEMA, UNLISTED, assign, list_images, plan
from helpers.pipeline.reading import list_frames
from helpers.pipeline.stages import ASSIGNED_SCHEMA
from helpers.storage import open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path / "photos"))


def listed(storage, config, **options) -> list[str]:
    paths = list_images(storage, config, **options).images["path"].to_pylist()
    return sorted(path.removeprefix(f"{storage.root}/") for path in paths)


def test_images_are_chosen_by_suffix_in_any_case_and_the_rest_is_counted(storage, config):
    for name in ("a.png", "b.JPG", "deep/er/c.Tiff", "notes.txt", "noextension", "png", ".hidden.png", ".git/x.png"):
        storage.write(name, b"1")
    listing = list_images(storage, config)
    assert listed(storage, config) == ["a.png", "b.JPG", "deep/er/c.Tiff"]
    assert listing.left_out == {"hidden": 2, "with another suffix": 3}
    assert str(listing) == "3 images; left out: 2 hidden, 3 with another suffix"
    assert listing.images.schema == LISTED_SCHEMA


def test_suffixes_are_a_setting(storage):
    storage.write("a.png", b"")
    storage.write("b.scan", b"")
    assert listed(storage, load_config("local", **{"ingest.suffixes": [".scan"]})) == ["b.scan"]


def test_a_folder_with_an_images_name_does_not_pass_unseen(storage, config):
    storage.write("album.jpg/a.png", b"")
    assert listed(storage, config) == ["album.jpg", "album.jpg/a.png"]


def test_an_empty_image_file_is_listed(storage, config):
    storage.write("empty.png", b"")
    assert list_images(storage, config).images["length"].to_pylist() == [0]


def test_hidden_is_judged_below_the_location_not_above(tmp_path, config):
    storage = open_storage(str(tmp_path / ".cache" / "photos"))
    storage.write("a.png", b"")
    assert listed(storage, config) == ["a.png"]


def test_a_folder_can_be_left_out(storage, config):
    for name in ("a.png", "out/b.png", "out2/c.png"):
        storage.write(name, b"")
    assert listed(storage, config, skip=[storage.join("out")]) == ["a.png", "out2/c.png"]


def test_no_image_is_an_error_that_says_what_is_there_and_what_an_image_is(storage, config):
    storage.write("notes.txt", b"")
    with pytest.raises(RunError) as error:
        list_images(storage, config)
    for part in ("0 images", "1 with another suffix", storage.root, ".jpg"):
        assert part in str(error.value)


def test_a_location_that_is_not_there_is_an_error(storage, config):
    with pytest.raises(StorageError, match="no such folder"):
        list_images(storage, config)


def test_a_name_that_is_no_text_does_not_stop_the_others(storage, config):
    storage.write("good.png", b"1")
    os.close(os.open(os.fsencode(storage.root) + b"/caf\xe9.png", os.O_CREAT))
    assert listed(storage, config) == ["caf\\xe9.png", "good.png"]


@pytest.mark.parametrize("followed", [False, True])
def test_links_that_lead_out_of_the_source_are_error_rows_or_counted_unless_asked_for(storage, tmp_path, followed):
    storage.write("a.png", b"1")
    open_storage(str(tmp_path)).write("elsewhere/b.png", b"12")
    for name, target in {"b.png": "../elsewhere/b.png", "b.mp4": "../elsewhere/b.png", "c": "../elsewhere"}.items():
        (tmp_path / "photos" / name).symlink_to(target)
    listing = list_images(storage, load_config("local", **{"ingest.outside_links": followed}))
    errors = dict(zip(listing.images["path"].to_pylist(), listing.images["error"].to_pylist(), strict=True))
    names = {path.removeprefix(f"{storage.root}/"): error for path, error in errors.items()}
    if followed:
        assert names == dict.fromkeys(["a.png", "b.png", "c/b.png"]) and listing.left_out == {}
    else:
        assert set(names) == {"a.png", "b.png"} and names["a.png"] is None
        assert "leads out of the source" in names["b.png"]
        assert "leads out of the source" in listing.videos["error"][0].as_py()
        assert listing.left_out == {"not followed or unreadable": 1}


def test_what_the_listing_has_found_wrong_is_not_read(storage, tmp_path):
    storage.write("a.png", b"1")
    open_storage(str(tmp_path)).write("elsewhere/b.png", b"12")
    for name in ("b.png", "b.mp4"):
        (tmp_path / "photos" / name).symlink_to("../elsewhere/b.png")
    listing = list_images(storage, load_config("local"))
    (rows,) = stages.read_images(listing.images.to_batches(), storage, 8, 2**20)
    contents = dict(zip(rows["path"].to_pylist(), rows["content"].to_pylist(), strict=True))
    assert contents == {storage.join("a.png"): b"1", storage.join("b.png"): None}
    (video,) = list_frames(listing.videos.to_batches(), storage, 1, 10**6)
    assert "leads out of the source" in video["error"][0].as_py() and video["count"][0].as_py() is None


def test_folders_that_cannot_be_listed_are_told_counted_and_cost_no_other(storage, config, monkeypatch, caplog):
    scan = os.scandir
    for name in ("a.png", *(f"locked {number}/b.png" for number in range(25)), ".hidden locked 1/c.png"):
        storage.write(name, b"1")

    def refuse(folder):
        if "locked" in folder:
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr("os.scandir", refuse)
    listing = list_images(storage, config)
    assert listing.images["path"].to_pylist() == [storage.join("a.png")]
    assert listing.left_out == {UNLISTED: 25, "hidden": 1}
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert 1 <= len(told) <= 10 and all("cannot be listed (Permission denied)" in line for line in told)


def test_the_manifest_has_every_image_once_in_its_planned_partition(samples, config):
    images = list_images(open_storage(str(samples)), config).images
    planned = plan(images, slots=3, config=load_config("local", **{"partitioning.target_images": 10}))
    table = assign(images, planned)
    assert table.schema == ASSIGNED_SCHEMA
    assert planned.partitions == 9
    partitions = dict(zip(images["path"].to_pylist(), planned.assignment.tolist(), strict=True))
    assert dict(zip(table["path"].to_pylist(), table["partition"].to_pylist(), strict=True)) == partitions
    assert table.num_rows == len(partitions) == 64
    assert table["partition"].to_pylist() == sorted(table["partition"].to_pylist())


@pytest.mark.parametrize(
    ("count", "targets", "partitions"),
    [
        (4_000, {"target_seconds": 0.03}, 126),  # 32 images each, and not 10
        (4_000, {"target_bytes": 5_000}, 128),  # and not 800
        (1_000, {"target_seconds": 0.03}, 100),
        (4_000, {"target_images": 10}, 400),
    ],
)
def test_a_slot_has_64_tasks_or_as_many_as_the_images_of_one_ask_for(count, targets, partitions):
    paths = pa.array([f"/{number}.jpg" for number in range(count)])
    columns = {"path": paths, "length": pa.array([1000] * count), "error": pa.nulls(count, pa.string())}
    config = load_config("local", partitioning=targets)
    assert plan(pa.table(columns), 2, config).partitions == partitions


def test_an_image_that_is_too_long_is_listed_with_its_error_and_takes_no_part_in_the_plan(storage, config):
    for name in ("a.png", "b.png", "clip.mp4", *(f"{i}.png" for i in range(20))):
        storage.write(name, b"1")
    for name in ("b.png", "clip.mp4"):
        os.truncate(storage.join(name), 2**40)  # a terabyte that takes no room
    listing = list_images(storage, config)
    errors = {Path(row["path"]).name: row["error"] for row in listing.images.to_pylist()}
    assert errors["a.png"] is None
    assert errors["b.png"].startswith(
        f"the file has {2**40} bytes, more than the {config.ingest.max_bytes} that ingest"
    )
    assert listing.videos["error"].to_pylist() == [None]  # which is not read as a whole
    assert plan(listing.images, 2, config).partitions == 2
    table = assign(listing.images, plan(listing.images, 2, config))
    assert table["error"].null_count == 21


def test_an_image_may_have_as_many_bytes_as_allowed_and_no_more(storage):
    storage.write("a.png", b"1" * 100)
    for most, is_good in ((100, True), (99, False)):
        images = list_images(storage, load_config("local", **{"ingest.max_bytes": most})).images
        assert images["error"].is_null().to_pylist() == [is_good]


def test_with_less_memory_an_image_may_have_fewer_bytes(storage):
    storage.write("a.png", b"1" * 2**20)
    for megabytes, is_good in ((8, True), (7, False)):
        images = list_images(storage, load_config("local", **{"inference.memory_megabytes": megabytes})).images
        assert images["error"].is_null().to_pylist() == [is_good]
