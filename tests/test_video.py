"""Frames of real clips: decoded from anywhere as from the beginning, and one row each whatever happens to the file."""

import io
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import bombs
import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster import read_results
from fuzz import CORPUS
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipeline
from helpers.config import Config, load_config
from helpers.errors import ConfigError, StorageError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import calibration_images
from helpers.images import video
from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import decode
from helpers.images.video import find_frames, frame_paths, read_frames, split_path, split_paths
from helpers.memory import resident_megabytes
from helpers.partitioning import plan_partitions
from helpers.pipeline import RunSummary, make_task, stages
from helpers.pipeline.listing import assign, list_images, plan
from helpers.pipeline.reading import FRAMES_BYTES, list_frames, with_frames
from helpers.pipeline.table import Table
from helpers.storage import LocalStorage, open_storage

WIDTH, HEIGHT = 96, 64
X264 = {"g": "12", "bf": "3"}
# What an encoder writes: name of the file, codec (four letters: OpenCV's; otherwise PyAV's), its options.
CLIPS = {
    "motion jpeg": ("clip.avi", "MJPG", {}),
    "mpeg-4": ("clip.mp4", "mp4v", {}),
    "mpeg-4 with B-frames": ("b.avi", "mpeg4", {"bf": "2"}),
    "h264": ("h.mp4", "libx264", X264),
    "h264, many keyframes": ("h.mov", "libx264", {**X264, "g": "3"}),
    "h264, open groups": ("open.mkv", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=3:log-level=none"}),
    "h264 without keyframes": ("refresh.mkv", "libx264", {"x264-params": "keyint=20:intra-refresh=1:bframes=0"}),
    "vp9": ("clip.webm", "libvpx-vp9", {"deadline": "realtime", "g": "20"}),
}
each_clip = pytest.mark.parametrize("kind", CLIPS)


def pictures(count: int, seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> list[np.ndarray]:
    """A moving texture with the frame's number on it."""
    colors = np.random.default_rng(seed).integers(0, 256, (7, 11, 3), np.uint8)
    scene = cv2.resize(colors, (width + count, height + count), interpolation=cv2.INTER_CUBIC)
    frames = [scene[i : i + height, i : i + width].copy() for i in range(count)]
    return [cv2.putText(f, str(i), (5, height - 15), 0, 1, (255, 255, 255), 2) for i, f in enumerate(frames)]


def write_clip(path: Path, codec: str, frames: list[np.ndarray], options: dict[str, str] | None = None) -> Path:
    height, width = frames[0].shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(codec) == 4:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, (width, height))
        assert writer.isOpened()
        for frame in frames:
            writer.write(frame)
        writer.release()
        return path
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if "bf" in (options or {}):
            stream.codec_context.max_b_frames = int(options["bf"])
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode())
    return path


def in_sequence(path: Path) -> list[np.ndarray]:
    """The oracle: another program that decodes from the first frame to the last."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (answer := capture.read())[0]:
        frames.append(answer[1])
    return frames


@dataclass
class Clip:
    path: Path
    expected: list[np.ndarray]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Callable[[str], Clip]:
    folder, made = tmp_path_factory.mktemp("clips"), {}

    def make(kind: str) -> Clip:
        if kind not in made:
            name, codec, options = CLIPS[kind]
            path = write_clip(folder / kind / name, codec, pictures(50), options)
            made[kind] = Clip(path, in_sequence(path))
            assert len(made[kind].expected) == 50
        return made[kind]

    return make


def read(file, numbers: np.ndarray) -> list[np.ndarray | None]:
    frames = find_frames(file)
    if frames.pts is None or frames.seek is None:
        return list(read_frames(file, numbers))
    return list(read_frames(file, numbers, frames.pts[numbers], frames.seek[numbers]))


def equal(images: list[np.ndarray | None], expected: list[np.ndarray | None]) -> bool:
    return len(images) == len(expected) and all(
        a is b is None or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in zip(images, expected, strict=True)
    )


# ---------------------------------------------------------------- decoding


@each_clip
def test_a_range_has_the_very_pixels_that_decoding_from_the_beginning_gives(clips, kind):
    clip = clips(kind)
    with clip.path.open("rb") as file:
        assert find_frames(file).count == 50
        for start, stop, every in [
            (0, 50, 1),
            (7, 19, 1),
            (12, 24, 1),
            (33, 50, 1),
            (49, 50, 1),
            (0, 50, 7),
            (3, 50, 20),
        ]:
            numbers = np.arange(start, stop, every)
            assert equal(read(file, numbers), clip.expected[start:stop:every]), (start, stop, every)


@pytest.mark.parametrize(("kind", "most"), [("h264", 16), ("motion jpeg", 2), ("vp9", 12)])
def test_a_range_is_reached_by_seeking(clips, kind, most, monkeypatch):
    decoded = []
    original = video.decode_frames

    def counted(*arguments):
        for item in original(*arguments):
            decoded.append(item)
            yield item

    with clips(kind).path.open("rb") as file:
        frames = find_frames(file)
        monkeypatch.setattr(video, "decode_frames", counted)
        assert equal(
            list(read_frames(file, np.array([49]), frames.pts[49:], frames.seek[49:])), clips(kind).expected[49:]
        )
        assert 0 < len(decoded) <= most
        # The same between frames that are far apart, and only there.
        decoded.clear()
        wanted = np.array([0, 48])
        list(read_frames(file, wanted, frames.pts[wanted], frames.seek[wanted]))
        assert 0 < len(decoded) <= most + 1
        decoded.clear()
        wanted = np.array([25, 35])
        list(read_frames(file, wanted, frames.pts[wanted], frames.seek[wanted]))
        assert len(decoded) == (2 if kind == "motion jpeg" else 36 - frames.pts.tolist().index(frames.seek[25]))


@each_clip
def test_damage_costs_the_frames_it_hits_and_moves_no_other(clips, kind):
    content = bytearray(clips(kind).path.read_bytes())
    place = len(content) * 6 // 10
    content[place : place + 300] = bytes(300)
    with av.open(str(clips(kind).path)) as container:
        before = sum(packet.size > 0 and packet.pos + packet.size <= place for packet in container.demux(video=0))
    assert before > 8
    file = io.BytesIO(content)
    count = find_frames(file).count
    whole = read(file, np.arange(count))
    lost = sum(image is None for image in whole) + 50 - count
    assert lost < 30
    assert equal(whole[: before - 4], clips(kind).expected[: before - 4])  # what is shown earlier may be stored later
    for numbers in np.array_split(np.arange(count), 5):
        part = read(file, numbers)
        # Frames behind the damage may be whole only for who begins there; none is another one.
        both = [
            (a, b) for a, b in zip(part, (whole[n] for n in numbers), strict=True) if a is not None and b is not None
        ]
        assert equal(*(list(images) for images in zip(*both, strict=True))) if both else True


def test_a_frame_that_cannot_be_decoded_keeps_its_number(clips):
    clip = clips("mpeg-4")
    with av.open(str(clip.path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(clip.path.read_bytes())
    content[packets[40][0] : packets[40][0] + packets[40][1]] = bytes(packets[40][1])
    images = read(io.BytesIO(content), np.arange(50))
    assert [i for i, image in enumerate(images) if image is None] == [40]
    assert equal(images[:40], clip.expected[:40])
    assert equal(images[48:], clip.expected[48:])  # behind the next keyframe


@pytest.mark.parametrize("kind", ["motion jpeg", "h264, open groups", "vp9"])
def test_a_file_that_is_cut_short_has_the_frames_before_the_cut(clips, kind):
    content = clips(kind).path.read_bytes()
    file = io.BytesIO(content[: len(content) // 2])
    count = find_frames(file).count
    assert 10 < count < 45
    images = read(file, np.arange(count))
    assert equal(images[: count - 3], clips(kind).expected[: count - 3])
    assert equal(read(file, np.arange(count // 2, count)), images[count // 2 :])


def test_packets_that_are_no_frames_get_no_numbers(clips, tmp_path):
    """An MPEG-4 encoder that drops a frame writes a packet which says so (ISO 14496-2, vop_coded)."""
    dropped = tmp_path / "dropped.mkv"
    with av.open(str(clips("mpeg-4").path)) as original, av.open(str(dropped), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(packet for packet in original.demux(video=0) if packet.size):
            written = packet
            if number in (5, 6, 30):
                # The header as it was up to its 11th bit, which becomes 0.
                head = bytearray(bytes(packet)[:6])
                head[5] &= 0b11000000
                written = av.Packet(bytes(head))
                written.pts, written.dts, written.time_base = packet.pts, packet.dts, packet.time_base
            written.stream = stream
            copy.mux(written)
    expected = in_sequence(dropped)
    assert len(expected) == 47
    with dropped.open("rb") as file:
        assert find_frames(file).count == 47
        assert equal(read(file, np.arange(47)), expected)
        assert equal(read(file, np.arange(20, 40, 3)), expected[20:40:3])


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "^the file is empty$"),
        (b"a text with a video's name", "not a video, or is cut short; it begins with b'a text with '"),
        (cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes(), "not a video"),
        (PLAYLIST, "not a video"),
        ("ffconcat version 1.0\nfile '{}'\n", "not a video"),
    ],
)
def test_what_is_no_video_says_so_and_names_no_other_file_to_open(clips, content, message):
    if isinstance(content, str):
        content = content.format(clips("h264").path).encode()
    with pytest.raises(UnreadableImageError, match=message):
        find_frames(io.BytesIO(content))
    with pytest.raises(UnreadableImageError, match=message):
        list(read_frames(io.BytesIO(content), np.array([0])))


def test_sound_alone_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        sound.sample_rate, sound.pts = 8000, 0
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UnreadableImageError, match="no video in it"):
        find_frames(file)


def test_a_video_of_which_nothing_can_be_decoded_is_one_error(clips):
    clip = clips("h264").path
    content = bytearray(clip.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : content.rindex(b"moov") - 4] = bytes(content.rindex(b"moov") - 4 - start)
    with pytest.raises(UnreadableImageError, match="no frame of the video can be decoded"):
        find_frames(io.BytesIO(content))


def test_larger_frames_than_allowed_are_not_decoded(clips):
    with clips("h264").path.open("rb") as file:
        assert find_frames(file, max_pixels=WIDTH * HEIGHT).count == 50
        with pytest.raises(UnreadableImageError, match="96 x 64 pixels, more than the 6143 that ingest.max_pixels"):
            find_frames(file, max_pixels=WIDTH * HEIGHT - 1)


def test_a_video_from_a_turned_phone_is_upright(clips, tmp_path):
    content = bytearray(clips("h264").path.read_bytes())
    one = (1 << 16).to_bytes(4, "big")
    upright = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    place = content.index(upright, content.index(b"tkhd"))
    content[place : place + 20] = bytes(4) + one + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(4)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    expected = in_sequence(turned)
    assert expected[0].shape == (WIDTH, HEIGHT, 3)
    with turned.open("rb") as file:
        assert equal(read(file, np.arange(3)), expected[:3])


# ---------------------------------------------------------------- paths and plans


NAMES = ["a.mp4", "b #1.mp4", "x/#frame=7/y.mov", "new\nline.avi", "c.mp4#frame=3.mkv", "é 'q\".webm", "#frame=.mp4"]


def test_a_frames_path_splits_the_same_in_python_and_arrow():
    frames = frame_paths(pa.array([n for n in NAMES for _ in range(2)]), pa.array([0, 123] * len(NAMES))).to_pylist()
    assert frames[1] == "a.mp4#frame=123"
    paths = [*NAMES, "a.png", "a#frame=3.png", *frames]
    expected = [(name, None) for name in paths[: -len(frames)]] + [(n, i) for n in NAMES for i in (0, 123)]
    assert [split_path(path) for path in paths] == expected
    files, numbers = split_paths(pa.chunked_array([paths]))
    assert list(zip(files.to_pylist(), numbers.to_pylist(), strict=True)) == expected


@given(
    st.lists(st.integers(0, 2**30), max_size=30),
    st.lists(st.tuples(st.integers(1, 80), st.integers(0, 2**20)), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_frames_fill_the_partitions_evenly_in_few_ranges(images, videos, partitions):
    lengths = np.array(images + [share for count, share in videos for _ in range(count)])
    is_frame = np.arange(len(lengths)) >= len(images)
    found = plan_partitions(lengths, 1, partitions=partitions, in_order=is_frame)
    assert found.files.sum() == len(lengths) and found.bytes.sum() == lengths.sum()
    assert ((found.assignment >= 0) & (found.assignment < found.partitions)).all()
    alone = found.assignment[is_frame]
    assert (np.diff(alone) >= 0).all()  # so there are no more ranges than videos and partitions together
    costs = lengths + max(1.0, int(lengths.mean()))
    costs[is_frame] = costs[is_frame].mean()
    loads = np.bincount(found.assignment, costs, found.partitions)
    with_frames = loads[np.unique(alone)]
    assert with_frames.max() <= loads.sum() / found.partitions + costs.max()
    assert with_frames.max() - loads.min() <= 2 * costs[is_frame].max() + 1e-6 * loads.sum()


# ---------------------------------------------------------------- the pipeline


def settings(**overrides) -> Config:
    return load_config("local", **{"spark.master": "local[2]", "partitioning.partitions": 4, "report": 0, **overrides})


def rows_of(output: Path) -> list[dict]:
    return read_results(output).sort_by("path").to_pylist()


GOOD = {"clip.avi": "motion jpeg", "deep/b #1.mp4": "mpeg-4", "h.mkv": "h264, open groups"}


@pytest.fixture(scope="module")
def source(clips, samples, tmp_path_factory) -> Path:
    """Videos, good and bad, among photos."""
    folder = tmp_path_factory.mktemp("videos") / "source"
    shutil.copytree(samples / "bags", folder / "bags")
    for name, kind in GOOD.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(clips(kind).path, folder / name)
    content = (folder / "clip.avi").read_bytes()
    (folder / "cut.avi").write_bytes(content[: len(content) // 2])
    (folder / "cut.mp4").write_bytes(clips("mpeg-4").path.read_bytes()[:20_000])  # its index is at its end
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.MOV").write_bytes(b"a text with a video's name")
    (folder / "folder.mp4").mkdir()
    (folder / "gone.webm").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mkv")
    return folder


BAD = {
    "cut.mp4": "the file is not a video, or is cut short",
    "empty.mp4": "the file is empty",
    "text.MOV": "the file is not a video",
    "folder.mp4": "this is a directory",
    "gone.webm": "the file is gone",
    "pipe.mkv": "the file cannot be read: it is a pipe",
}


@dataclass
class Finished:
    source: Path
    output: Path
    summary: RunSummary

    def frames(self, name: str) -> dict[int, dict]:
        """The rows of one video by number."""
        rows = [row for row in rows_of(self.output) if split_path(row["path"])[0] == str(self.source / name)]
        return {split_path(row["path"])[1]: row for row in rows}


@pytest.fixture(scope="module")
def finished(spark, source, bundle_uri, tmp_path_factory) -> Finished:
    output = tmp_path_factory.mktemp("output")
    return Finished(source, output, pipeline.run(spark, str(source), bundle_uri, str(output), settings(pictures=40)))


def as_pngs(frames: list[np.ndarray], bundle_uri: str, folder: Path) -> list[dict]:
    """What the pipeline finds in the same pictures as image files, in this process."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{i:06d}.png"), frame)
    task = make_task(str(folder), bundle_uri, str(folder.parent), settings())
    images = list_images(task.source, settings()).images
    return pa.Table.from_batches(task.results(images.to_batches())).sort_by("path").to_pylist()


def assert_found(rows: dict[int, dict], expected: list[dict], numbers: range) -> None:
    assert sorted(rows) == list(numbers)
    for number, row in rows.items():
        assert row["error"] is None
        assert (row["width"], row["height"]) == (expected[number]["width"], expected[number]["height"])
        pairs = list(zip(row["predictions"], expected[number]["predictions"], strict=True))
        assert pairs and [a["label"] for a, _ in pairs] == [b["label"] for _, b in pairs]
        assert [a["score"] for a, _ in pairs] == pytest.approx([b["score"] for _, b in pairs], abs=1e-6)


@pytest.mark.parametrize("name", GOOD)
def test_each_frame_has_the_row_that_it_has_as_an_image_file(finished, clips, bundle_uri, tmp_path, name):
    expected = as_pngs(clips(GOOD[name]).expected, bundle_uri, tmp_path / "png")
    assert len({round(row["predictions"][0]["score"], 6) for row in expected}) > 25  # so that frames can be told apart
    rows = finished.frames(name)
    assert_found(rows, expected, range(50))
    status = (finished.source / name).stat()
    assert {row["length"] for row in rows.values()} == {status.st_size}
    assert {row["modified"].timestamp() for row in rows.values()} == {status.st_mtime_ns // 1000 / 1e6}


def test_a_bad_video_is_one_row_and_a_cut_one_has_the_frames_that_are_left(finished):
    for name, error in BAD.items():
        rows = finished.frames(name)
        assert list(rows) == [None] and rows[None]["error"].startswith(error), name
        assert rows[None]["predictions"] is None
    cut = finished.frames("cut.avi")
    assert sorted(cut) == list(range(len(cut))) and 20 < len(cut) < 30
    assert [n for n, row in cut.items() if row["error"]] == [len(cut) - 1]
    assert cut[len(cut) - 1]["error"].startswith("the frame cannot be decoded")


def test_the_summary_and_the_pictures_count_frames_as_images(finished):
    rows, summary = rows_of(finished.output), finished.summary
    assert len({row["path"] for row in rows}) == len(rows) == summary.images == summary.ok + summary.failed
    assert summary.failed == sum(row["error"] is not None for row in rows) == len(BAD) + 1
    assert summary.images > 150 + len(BAD) and summary.skipped == 0
    names = [path.name for path in (finished.output / "pictures").iterdir()]
    assert len(names) == 40 and any("_frame_" in name for name in names)
    assert sum(record["images"] for record in summary.records) == len(rows)


def test_several_tasks_work_on_one_video_each_on_one_range(finished):
    tasks = dict.fromkeys(GOOD, 0)
    for file in (finished.output / "results").glob("*.parquet"):
        paths = [split_path(path) for path in pq.read_table(file)["path"].to_pylist()]
        for name in GOOD:
            numbers = sorted(number for path, number in paths if path.endswith(name) and number is not None)
            assert all(b - a == 1 for a, b in pairwise(numbers))
            tasks[name] += bool(numbers)
    assert sorted(tasks.values()) >= [1, 2, 2]
    shares = [record["images"] for record in finished.summary.records]
    assert len(shares) == 4 and max(shares) < 2 * min(shares)


def test_stages_one_by_one_give_what_the_fused_run_gives(spark, finished, bundle_uri):
    images = pipeline.ingest(spark, str(finished.source), settings())
    outputs = pipeline.infer(pipeline.preprocess(images, bundle_uri, settings()), bundle_uri, settings())
    found = pipeline.postprocess(outputs, bundle_uri, settings()).toArrow().sort_by("path").to_pylist()
    assert found == rows_of(finished.output)


def test_the_reader_spark_leaves_videos_to_the_tasks(spark, finished, bundle_uri, tmp_path):
    config = settings(reader="spark", pictures=0)
    pipeline.run(spark, str(finished.source), bundle_uri, str(tmp_path), config)
    assert rows_of(tmp_path) == rows_of(finished.output)


def test_every_kth_frame(spark, clips, bundle_uri, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    shutil.copyfile(clips("h264").path, folder / "h.MP4")
    shutil.copyfile(clips("motion jpeg").path, folder / "clip.avi")
    config = settings(**{"video.every": 7, "ingest.suffixes": [".jpg"]})
    summary = pipeline.run(spark, str(folder), bundle_uri, str(tmp_path / "out"), config)
    assert (summary.ok, summary.failed) == (16, 0)
    expected = as_pngs(clips("h264").expected, bundle_uri, tmp_path / "png")
    assert_found(Finished(folder, tmp_path / "out", summary).frames("h.MP4"), expected, range(0, 50, 7))
    # What has results already is not done again when more is wanted.
    more = pipeline.run(spark, str(folder), bundle_uri, str(tmp_path / "out"), settings())
    assert (more.images, more.ok, more.skipped) == (100, 84, 16)
    assert_found(Finished(folder, tmp_path / "out", more).frames("h.MP4"), expected, range(50))


def test_a_half_done_video_goes_on_where_rows_are_missing(spark, finished, bundle_uri, tmp_path):
    output = tmp_path / "output"
    shutil.copytree(finished.output, output)
    file = sorted((output / "results").glob("*.parquet"))[1]
    removed = set(pq.read_table(file)["path"].to_pylist())
    results = Table(open_storage(str(output)), "results", stages.RESULT_SCHEMA)
    results.commit(results.open(), {}, [file.name], {}, {})
    gone = str(finished.source / "gone.webm")  # may be there again
    summary = pipeline.run(spark, str(finished.source), bundle_uri, str(output), settings())
    assert summary.ok + summary.failed == len(removed | {gone})
    assert summary.skipped == finished.summary.images - len(removed | {gone})
    assert rows_of(output) == rows_of(finished.output)
    again = pipeline.run(spark, str(finished.source), bundle_uri, str(output), settings())
    assert (again.images, again.failed, again.skipped) == (finished.summary.images, 1, finished.summary.images - 1)
    assert rows_of(output) == rows_of(finished.output)


def test_a_changed_video_leaves_no_row_of_what_it_was(spark, clips, bundle_uri, tmp_path):
    folder = tmp_path / "source"
    clip = write_clip(folder / "clip.avi", "MJPG", pictures(30))
    shutil.copyfile(clips("mpeg-4").path, folder / "same.mp4")

    def run() -> tuple[int, list[int | None]]:
        summary = pipeline.run(spark, str(folder), bundle_uri, str(tmp_path / "out"), settings())
        found: dict[str, list[int | None]] = {}
        for row in rows_of(tmp_path / "out"):
            file, number = split_path(row["path"])
            found.setdefault(Path(file).name, []).append(number)
            status = Path(file).stat()
            assert row["length"] == status.st_size, row["path"]
            assert row["modified"].timestamp() == status.st_mtime_ns // 1000 / 1e6
        assert sorted(found.pop("same.mp4")) == list(range(50))
        return summary.ok, sorted(found["clip.avi"], key=lambda number: number or 0)

    assert run() == (80, list(range(30)))
    write_clip(clip, "MJPG", pictures(12, seed=1))
    assert run() == (12, list(range(12)))
    expected = as_pngs(in_sequence(clip), bundle_uri, tmp_path / "png")
    rows = {split_path(row["path"])[1]: row for row in rows_of(tmp_path / "out") if "clip.avi" in row["path"]}
    assert_found(rows, expected, range(12))
    clip.write_bytes(b"no video any more")
    assert run() == (0, [None])
    write_clip(clip, "MJPG", pictures(20, seed=2))
    assert run() == (20, list(range(20)))


def test_a_video_that_could_not_be_read_is_tried_again(spark, clips, bundle_uri, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    clip, elsewhere = folder / "clip.mp4", tmp_path / "elsewhere.mp4"
    shutil.copyfile(clips("mpeg-4").path, elsewhere)
    # A stand-in of the same length and time, so that nothing but its content tells that it was mended.
    clip.write_bytes(bytes(elsewhere.stat().st_size))
    times = (elsewhere.stat().st_atime_ns, elsewhere.stat().st_mtime_ns)
    os.utime(clip, ns=times)
    first = pipeline.run(spark, str(folder), bundle_uri, str(tmp_path / "out"), settings())
    assert (first.images, first.failed) == (1, 1)
    shutil.copyfile(elsewhere, clip)
    os.utime(clip, ns=times)
    second = pipeline.run(spark, str(folder), bundle_uri, str(tmp_path / "out"), settings())
    assert (second.images, second.ok) == (50, 50)
    assert len(rows_of(tmp_path / "out")) == 50


# ---------------------------------------------------------------- parts of it, without Spark


class Remote:
    """Storage that is no file system: copies of files are all that one gets."""

    concurrent_reads = 4

    def __init__(self, root: Path):
        self._local = LocalStorage(str(root))

    def read(self, path: str, limit: int | None = None) -> bytes:
        return self._local.read(path, limit)

    def open(self, path: str) -> io.BytesIO:
        return io.BytesIO(self._local.read(path))


def listed(source: Path, storage, config: Config) -> pa.Table:
    found = list_images(open_storage(str(source)), config)
    videos = list_frames(found.videos.to_batches(), storage, config.video.every, config.ingest.max_pixels)
    return with_frames(found.images, pa.Table.from_batches(videos), config.video.every)


def test_object_storage_gives_the_same_rows_in_any_order(source):
    storage, local, config = Remote(source), LocalStorage(str(source)), settings()
    images = listed(source, local, config)
    assert listed(source, storage, config).equals(images)
    rows = assign(images, plan(images, 2, config))
    shuffled = rows.take(np.random.default_rng(0).permutation(rows.num_rows))
    by_path = [
        pa.Table.from_batches(stages.read_images(table.to_batches(max_chunksize=70), where, 8, 2**20)).sort_by("path")
        for table, where in ((rows, local), (shuffled, storage))
    ]
    assert by_path[0].equals(by_path[1]) and by_path[0].num_rows == rows.num_rows


def test_frames_without_a_place_are_looked_up(source):
    local, config = LocalStorage(str(source)), settings()
    images = listed(source, local, config)
    bare = images.select(["path", "length", "modified"]).filter(split_paths(images["path"])[1].is_valid())
    given, found = (pa.Table.from_batches(stages.read_images(t.to_batches(), local, 64, 1)) for t in (images, bare))
    frames = given.filter(split_paths(given["path"])[1].is_valid())
    assert found.num_rows == frames.num_rows > 150 and found.sort_by("path").equals(frames.sort_by("path"))


def test_decoded_frames_are_never_all_in_memory(tmp_path):
    write_clip(tmp_path / "large.avi", "MJPG", pictures(12, width=1600, height=1200))
    storage, config = LocalStorage(str(tmp_path)), settings()
    images = listed(tmp_path, storage, config)
    batches = stages.read_images(images.to_batches(), storage, 64, 2**20)
    sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
    frame = 1600 * 1200 * 3
    assert sum(rows for rows, _ in sizes) == 12
    assert max(size for _, size in sizes) < FRAMES_BYTES + frame + 10_000


def test_a_video_that_goes_or_changes_after_it_was_listed_is_rows_with_errors(clips, tmp_path):
    shutil.copyfile(clips("h264").path, tmp_path / "a.mp4")
    shutil.copyfile(clips("h264").path, tmp_path / "b.mp4")
    shutil.copyfile(clips("h264").path, tmp_path / "c.mp4")
    storage, config = LocalStorage(str(tmp_path)), settings(**{"video.every": 10})
    images = listed(tmp_path, storage, config)
    (tmp_path / "a.mp4").unlink()
    (tmp_path / "b.mp4").write_bytes(b"something else")
    write_clip(tmp_path / "c.mp4", "mp4v", pictures(15))
    rows = pa.Table.from_batches(stages.read_images(images.to_batches(), storage, 64, 1)).sort_by("path").to_pylist()
    assert [row["path"] for row in rows] == sorted(images["path"].to_pylist()) and len(rows) == 15
    assert all(row["error"].startswith("the file is gone") for row in rows[:5])
    assert all(row["error"].startswith("the file is not a video") for row in rows[5:10])
    assert [row["error"] is None for row in rows[10:]] == [True, True, False, False, False]


def test_a_plan_gives_each_frame_its_share_of_the_file(source):
    config = settings()
    images = listed(source, LocalStorage(str(source)), config)
    files = [path for path in source.rglob("*") if path.is_file() and path.name not in BAD]  # those take no time
    lengths = {path.name: path.stat().st_size for path in files}
    planned = plan(images, 2, config)
    assert 0.99 * sum(lengths.values()) < planned.bytes.sum() <= sum(lengths.values())
    assert assign(images, planned).schema == stages.ASSIGNED_SCHEMA


def test_a_file_with_fewer_frames_than_it_announces_is_logged(source, caplog):
    listed(source, LocalStorage(str(source)), settings())
    assert "cut.avi has" in caplog.text and "of the 50 frames it announces" in caplog.text


def test_calibration_takes_the_images_only(source):
    images = list(calibration_images(open_storage(str(source)), get_architecture("fashion_cnn"), settings()))
    assert len(images) == len(list((source / "bags").iterdir()))


@pytest.mark.parametrize("value", [0, -1, "often"])
def test_every_is_a_positive_number(value):
    with pytest.raises(ConfigError, match=r"video\.every"):
        settings(**{"video.every": value})


def test_a_frame_is_an_uncompressed_image_to_the_next_stage(clips, tmp_path):
    shutil.copyfile(clips("h264").path, tmp_path / "a.mp4")
    storage, config = LocalStorage(str(tmp_path)), settings()
    (batch,) = stages.read_images(listed(tmp_path, storage, config).to_batches(), storage, 64, 1)
    assert equal([decode(c, 10**6) for c in batch["content"].to_pylist()], clips("h264").expected)


# ---------------------------------------------------------------- what goes wrong with one frame, or one video


def jpeg(width: int, height: int) -> bytes:
    return cv2.imencode(".jpg", pictures(1, width=width, height=height)[0])[1].tobytes()


@pytest.mark.parametrize("large", [0, 3, 7])
def test_a_frame_that_is_larger_than_its_video_says_is_not_decoded(tmp_path, large):
    frames = [jpeg(WIDTH, HEIGHT)] * 8
    frames[large] = jpeg(1200, 900)
    file = io.BytesIO(bombs.avi(frames, WIDTH, HEIGHT))
    found = find_frames(file, max_pixels=WIDTH * HEIGHT)
    assert found.count == 8
    images = list(read_frames(file, np.arange(8), found.pts, found.seek, WIDTH * HEIGHT))
    assert [isinstance(image, np.ndarray) for image in images] == [number != large for number in range(8)]
    assert [image.shape for image in read_frames(file, np.array([large]), None, None, None)] == [(900, 1200, 3)]


def test_a_frame_somewhat_too_large_says_so(tmp_path):
    """FFmpeg is told to refuse what is much larger, and says nothing then but that it cannot."""
    file = io.BytesIO(bombs.avi([jpeg(WIDTH, HEIGHT), jpeg(WIDTH + 8, HEIGHT)], WIDTH, HEIGHT))
    found = find_frames(file, max_pixels=WIDTH * HEIGHT)
    first, second = read_frames(file, np.arange(2), found.pts, found.seek, WIDTH * HEIGHT)
    assert first.shape == (HEIGHT, WIDTH, 3)
    assert second.startswith(f"the video has {WIDTH + 8} x {HEIGHT} pixels, more than the {WIDTH * HEIGHT}")


def rows_read(folder: Path, **limits: int) -> list[dict]:
    storage = LocalStorage(str(folder))
    images = listed(folder, storage, settings())
    batches = stages.read_images(assign(images, plan(images, 1, settings())).to_batches(), storage, 64, 1, **limits)
    return pa.Table.from_batches(batches).sort_by("path").to_pylist()


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("too large"), IndexError("list index out of range")])
def test_whatever_one_frame_raises_is_its_own_error(clips, tmp_path, monkeypatch, error):
    shutil.copyfile(clips("motion jpeg").path, tmp_path / "a.avi")
    original, done = video._to_image, []

    def to_image(frame, max_pixels):
        done.append(frame)
        if len(done) == 5:
            raise error
        return original(frame, max_pixels)

    monkeypatch.setattr(video, "_to_image", to_image)
    rows = rows_read(tmp_path)
    failed = [row for row in rows if row["error"]]
    assert len(rows) == 50 and [split_path(row["path"])[1] for row in failed] == [4]
    assert not failed[0]["error"].startswith("the frame cannot be decoded")  # which says that the file is damaged


@pytest.mark.parametrize("error", [RuntimeError("unknown"), ZeroDivisionError(), OSError(5, "Input/output error")])
def test_whatever_opening_a_video_raises_is_its_own_error_unless_a_user_must_mend_it(
    clips, tmp_path, monkeypatch, error
):
    for name in "ab":
        shutil.copyfile(clips("mpeg-4").path, tmp_path / f"{name}.mp4")
    original = LocalStorage.open

    def broken(self, path):
        if path.endswith("a.mp4"):
            raise error
        return original(self, path)

    monkeypatch.setattr(LocalStorage, "open", broken)
    rows = rows_read(tmp_path)
    assert [row["error"] is None for row in rows] == [False] + [True] * 50
    error = StorageError("the disk is full")
    with pytest.raises(StorageError, match="the disk is full"):
        rows_read(tmp_path)


def test_a_video_that_fails_while_it_is_read_keeps_the_frames_that_it_had(clips, tmp_path, monkeypatch):
    shutil.copyfile(clips("motion jpeg").path, tmp_path / "a.avi")
    original = video._pick

    def ends(decoded, wanted, max_pixels):
        yield from list(original(decoded, wanted, max_pixels))[:20]
        raise ArithmeticError("beyond 20")

    monkeypatch.setattr(video, "_pick", ends)
    rows = sorted(rows_read(tmp_path), key=lambda row: split_path(row["path"])[1])
    assert [row["error"] is None for row in rows] == [True] * 20 + [False] * 30
    assert all("ArithmeticError: beyond 20" in row["error"] for row in rows[20:])


def good_within(folder: Path, megabytes: int) -> list[bool]:
    """Which images can be read by a process that may take so many more megabytes."""
    rows = rows_read(folder, memory_megabytes=round(resident_megabytes()) + megabytes)
    return [row["error"] is None for row in rows]


def test_frames_for_which_there_is_no_memory_are_errors(tmp_path):
    write_clip(tmp_path / "large.avi", "MJPG", pictures(3, width=5000, height=4000))
    # Another process, because what this one has freed and kept may be enough for a frame.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(good_within, tmp_path, 30).result() == [False] * 3
        assert pool.submit(good_within, tmp_path, 2000).result() == [True] * 3


def test_frames_that_lead_to_the_same_place_again_and_again_are_no_video():
    file = io.BytesIO(bombs.mp4(64 * 1000, 1000))
    with pytest.raises(UnreadableImageError, match="claim more bytes than it has"):
        find_frames(file)
    with pytest.raises(UnreadableImageError, match="claim more bytes than it has"):
        list(read_frames(file, np.arange(10)))


@each_clip
def test_an_ordinary_video_does_not_claim_more_than_it_has(clips, kind, monkeypatch):
    monkeypatch.setattr(video, "CLAIMED", 1)
    with clips(kind).path.open("rb") as file:
        assert find_frames(file).count == 50


def test_a_stream_that_appears_late_costs_no_frame():
    file = io.BytesIO((CORPUS / "late_stream.mp4").read_bytes())
    frames = find_frames(file)
    images = list(read_frames(file, np.arange(frames.count), frames.pts, frames.seek))
    assert len(images) == 7 and all(image is not None for image in images)


def test_an_index_of_few_bytes_takes_no_more_memory_than_there_may_be(tmp_path):
    (tmp_path / "index.mp4").write_bytes(bombs.mp4(400_000_000, codec=b"mp4v", side=64))
    batch = list_images(open_storage(str(tmp_path)), settings()).videos.to_batches()
    megabytes = round(resident_megabytes()) + 300
    ((row,),) = (b.to_pylist() for b in list_frames(batch, LocalStorage(str(tmp_path)), 1, 10**8, megabytes))
    assert row["error"] and row["count"] is None
    assert resident_megabytes() < megabytes + 50
