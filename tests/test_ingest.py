import os
from pathlib import Path

import pytest

from helpers.config import load_config
from helpers.errors import RunError, StorageError
from helpers.pipeline.listing import LISTED_SCHEMA, list_images, manifest, plan
from helpers.pipeline.stages import MANIFEST_SCHEMA
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
    assert "good.png" in listed(storage, config)


def test_the_manifest_has_every_image_once_in_its_planned_partition(samples, config):
    images = list_images(open_storage(str(samples)), config).images
    planned = plan(images, slots=3, config=load_config("local", **{"partitioning.target_images": 10}))
    table = manifest(images, planned)
    assert table.schema == MANIFEST_SCHEMA
    assert planned.partitions == 9
    partitions = dict(zip(images["path"].to_pylist(), planned.assignment.tolist(), strict=True))
    assert dict(zip(table["path"].to_pylist(), table["partition"].to_pylist(), strict=True)) == partitions
    assert table.num_rows == len(partitions) == 64
    assert table["partition"].to_pylist() == sorted(table["partition"].to_pylist())


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
    table = manifest(listing.images, plan(listing.images, 2, config))
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
