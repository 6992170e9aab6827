"""Video files as sources of images: their frames, decoded one by one, the same wherever decoding begins.

Frames are numbered from 0 in the order in which they are shown, and a frame's path is its file's with the number behind
it, `clip.mp4#frame=120`. A frame is found by its timestamp: decoding starts at the keyframe before it, and gives what
decoding from the file's beginning gives. Executors import this module; PyAV is loaded with the first video only.
"""

import contextlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.images.boundary import UnreadableImageError, attempt
from helpers.images.decoding import SHOWN_BYTES, Image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MARK = "#frame="
PROBED = 16  # frames decoded to see whether the file's packets are its frames
JUMP = 8  # frames; over fewer, going on is cheaper than seeking
BYTES_PER_PIXEL = 40  # of a frame while it is decoded: up to 16 that others refer to, and three copies of its own
VP8_SHOWN = 0x10  # of a packet's first byte (RFC 6386, 9.1)
# FFmpeg also reads play lists, which name other files and hosts: a file must not make a worker open those.
FORMATS = "mov,avi,matroska,mpeg,mpegts,flv,asf,ogg"
PADDED = 2  # times the pixels of a frame, at most, that FFmpeg counts: it adds to each side what its arithmetic needs
CLAIMED = 2  # times its length, at most, that the frames of a file may come to: some are stored shorter than they are

Decoded = Iterator[tuple[int | None, "VideoFrame | None"]]


def split_path(path: str) -> tuple[str, int | None]:
    """The file and the number of a frame's path; any other path and None.

    For a pandas column `rows["path"].map(split_path)`, for Arrow `split_paths`.
    """
    match = re.fullmatch(rf"(.*){MARK}([0-9]+)", path, re.DOTALL)
    return (match[1], int(match[2])) if match else (path, None)


def split_paths(paths: pa.Array | pa.ChunkedArray) -> tuple[Any, Any]:
    """`split_path` of an Arrow column: the files, and int64 numbers that are null where a path is no frame's."""
    groups = pc.extract_regex(paths, rf"(?s)^(?P<file>.*){MARK}(?P<frame>[0-9]+)\z")
    files, numbers = (pc.struct_field(groups, name) for name in ("file", "frame"))
    return pc.coalesce(files, paths), pc.cast(numbers, pa.int64())


def are_frames(paths: pa.Array | pa.ChunkedArray) -> Any:
    """Whether each path is a frame's; without the copy of all paths that `split_paths` makes."""
    return pc.fill_null(pc.match_substring_regex(paths, rf"{MARK}[0-9]+\z"), False)


def frame_paths(files: pa.Array, numbers: pa.Array) -> pa.Array:
    """The inverse of `split_paths`."""
    return pc.binary_join_element_wise(files, pc.cast(numbers, pa.string()), MARK)


@dataclass(frozen=True)
class Frames:
    """The frames of a video in the order in which they are shown."""

    count: int  # how many there are
    announced: int  # how many the file's header promises; 0 where it says nothing
    # Int64 `[count]`, their timestamps in the stream's own unit; None where frames can only be counted from the file's
    # beginning.
    pts: np.ndarray | None = None
    # Int64 `[count]`, for each the timestamp of the keyframe that its decoding starts from; None with `pts`.
    seek: np.ndarray | None = None


def frame_pixels(max_pixels: int | None, memory_megabytes: int | None) -> int | None:
    """How many pixels a frame may have, so that decoding a video stays within the memory of a task; None for any."""
    limits = [max_pixels, memory_megabytes and memory_megabytes * 2**20 // BYTES_PER_PIXEL]
    return min((limit for limit in limits if limit is not None), default=None)


def find_frames(file: BinaryIO, max_pixels: int | None = None) -> Frames:
    """List the frames of a video from its packets; only a few are decoded.

    Where packets do not tell (no timestamps, or one twice; two frames packed in one; a damaged AVI file), all of the
    file is decoded to count them. Raises UnreadableImageError if the file is empty, not a video, without a frame that
    can be decoded, or larger than `max_pixels`.
    """
    with open_video(file, max_pixels) as (container, stream):
        announced = stream.frames
        listed = _list_packets(container, stream)
    with open_video(file, max_pixels) as (container, stream):
        if not _decodes(decode_frames(container, stream), listed[0] if listed else None):
            listed = None
    if listed:
        return Frames(len(listed[0]), announced, *listed)
    with open_video(file, max_pixels) as (container, stream):
        return Frames(sum(1 for _ in decode_frames(container, stream)), announced)


def read_frames(
    file: BinaryIO,
    numbers: np.ndarray,
    pts: np.ndarray | None = None,
    seek: np.ndarray | None = None,
    max_pixels: int | None = None,
) -> Iterator[Image | str | None]:
    """Decode some frames of a video, one at a time: what decoding all of it would give for them.

    Args:
        file: the video.
        numbers: int64, of the wanted frames, rising.
        pts: of the wanted frames, from `find_frames`.
        seek: the same.
        max_pixels: larger frames are not decoded, whatever the file says of their size.

    Yields:
        For each wanted frame uint8 BGR `[height, width, 3]`, upright; None where it is damaged or missing; a text where
        it is something else that is wrong with it.

    Raises:
        UnreadableImageError: this is no video (any more), or a larger one.
    """
    done = 0
    if pts is not None and seek is not None:
        with open_video(file, max_pixels) as (container, stream):
            # Decoding begins anew where a keyframe lies in a gap.
            gaps = np.flatnonzero((np.diff(seek) > 0) & (np.diff(numbers) > JUMP)) + 1
            for stop in [*gaps.tolist(), len(numbers)]:
                images = _pick(decode_frames(container, stream, int(seek[done])), pts[done:stop], max_pixels)
                first = next(images)
                if first is None:
                    break  # no keyframe as it should be (H.264 can refresh bit by bit): all the rest is decoded
                yield first
                yield from images
                done = stop
    if done < len(numbers):
        with open_video(file, max_pixels) as (container, stream):
            decoded = decode_frames(container, stream)
            if pts is None:
                yield from _pick(((n, frame) for n, (_, frame) in enumerate(decoded)), numbers, max_pixels)
            else:
                yield from _pick(decoded, pts[done:], max_pixels)


# ------------------------------------------------------------ PyAV, within limits that no file can move


@contextlib.contextmanager
def open_video(file: BinaryIO, max_pixels: int | None) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """A video as PyAV has it, with the stream of its pictures; a frame has at most `max_pixels`, if any.

    Raises UnreadableImageError if the file is empty, not a video, or larger, or it cannot be read any further; and
    MemoryError if there is not enough of it.
    """
    import av
    from av.video.stream import VideoStream

    av.logging.set_level(av.logging.PANIC)  # a damaged video is an error row, not pages of log
    file.seek(0)
    head = file.read(SHOWN_BYTES)
    if not head:
        raise UnreadableImageError("the file is empty")
    file.seek(0)
    # Frames decide on their size themselves, also those that FFmpeg decodes to see what is in the file.
    limits = {} if max_pixels is None else {"max_pixels": str(PADDED * max_pixels)}
    try:
        container = av.open(file, mode="r", options={"format_whitelist": FORMATS, **limits}, metadata_errors="ignore")
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        why = f"it begins with {head!r}: {getattr(error, 'strerror', None) or error}"
        raise UnreadableImageError(f"the file is not a video, or is cut short; {why}") from None
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.codec_context is None:
            raise UnreadableImageError("the file has no video in it, or one of an unknown kind")
        check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
        stream.codec_context.thread_count = 1  # Spark runs a task on every core
        stream.codec_context.options = limits
        try:
            yield container, stream
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            raise UnreadableImageError(f"the video cannot be read: {error.strerror or error}") from None


def read_packets(container: "InputContainer", stream: "VideoStream") -> Iterator[Any]:
    """A stream's packets, and None at the end: the decoder's sign to hand out what it has kept back.

    Raises:
        UnreadableImageError: there are more than the file can hold, as when an index leads to the same place again.
    """
    import av

    claimed, limit = 0, CLAIMED * container.size
    try:
        for packet in container.demux(stream):
            claimed += packet.size
            if claimed > limit:
                raise UnreadableImageError("the file is not a video: its frames claim more bytes than it has")
            if packet.size:
                yield packet
    except (av.FFmpegError, IndexError) as error:
        # A damage that cannot be passed; or the end, where PyAV stumbles over streams that it did not see at first.
        if isinstance(error, MemoryError):
            raise
    yield None


def decode_frames(container: "InputContainer", stream: "VideoStream", start: int | None = None) -> Decoded:
    """Timestamp and frame from where the container stands; no frame where it is damaged, if that can be told.

    Decoding can begin at the keyframe before a timestamp, in the stream's own unit.
    """
    import av

    if start is not None:
        with contextlib.suppress(av.FFmpegError):  # the container stands where it stood, and the frame comes later
            container.seek(start, stream=stream)
    damaged = set()
    for packet in read_packets(container, stream):
        if packet is not None and packet.is_corrupt:  # cut short
            damaged.add(packet.pts)
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if packet is not None:
                yield packet.pts, None
            continue
        for frame in frames:
            yield frame.pts, None if frame.is_corrupt or frame.pts in damaged else frame


def check_size(width: int, height: int, max_pixels: int | None) -> None:
    """Raise UnreadableImageError if a frame has more pixels than it may have."""
    if max_pixels is not None and width * height > max_pixels:
        limits = f"the {max_pixels} that ingest.max_pixels and inference.memory_megabytes allow"
        raise UnreadableImageError(f"the video has {width} x {height} pixels, more than {limits}")


def _list_packets(container: "InputContainer", stream: "VideoStream") -> tuple[np.ndarray, np.ndarray] | None:
    """Timestamps of the frames and of their keyframes; None where packets do not tell."""
    times, keys, packets = array("q"), array("q"), -1  # there is None at the end
    vp8 = stream.codec_context.name == "vp8"
    for packet in read_packets(container, stream):
        packets += 1
        if packet is None or packet.is_discard or (vp8 and not memoryview(packet)[0] & VP8_SHOWN):
            continue
        if packet.pts is None:
            return None
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    pts, starts = np.unique(np.array(times, np.int64)), np.unique(np.array(keys, np.int64))
    # In an AVI file a frame's place is its time, so that with one lost those behind it have two.
    lost = container.format.name == "avi" and packets != stream.frames
    if not len(pts) or len(pts) < len(times) or lost:
        return None
    starts = np.union1d(starts, pts[:1])
    return pts, starts[np.searchsorted(starts, pts, side="right") - 1]


def _decodes(decoded: Decoded, pts: np.ndarray | None) -> bool:
    """Whether a video's first frames come out with the timestamps that are expected.

    Raises UnreadableImageError if no frame comes out at all.
    """
    expected = [] if pts is None else pts[:PROBED].tolist()
    timestamps, good, damaged = [], False, False
    for at, frame in decoded:
        timestamps.append(at)
        good, damaged = good or frame is not None, damaged or frame is None
        if good and len(timestamps) >= len(expected):
            break
    if not good:
        raise UnreadableImageError("no frame of the video can be decoded")
    # What is damaged comes in another order, or not at all, and is a frame nevertheless.
    return bool(expected) and (damaged or timestamps[: len(expected)] == expected)


def _pick(decoded: Decoded, keys: np.ndarray, max_pixels: int | None) -> Iterator[Image | str | None]:
    """The frames with the given timestamps (or numbers) as `read_frames` yields them, each once and in order."""
    position, times = 0, keys.tolist()
    for at, frame in decoded:
        if at is None or frame is None:
            continue
        while position < len(times) and times[position] < at:
            yield None
            position += 1
        if position < len(times) and times[position] == at:
            image, error = attempt(_to_image, frame, max_pixels)
            yield error if image is None else image
            position += 1
        if position == len(times):
            return
    yield from [None] * (len(times) - position)


def _to_image(frame: "VideoFrame", max_pixels: int | None) -> Image:
    check_size(frame.width, frame.height, max_pixels)
    image = frame.to_ndarray(format="bgr24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
