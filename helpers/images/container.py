"""A video's container as PyAV opens it: its packets and decoded frames, within limits that no file can move.

Executors import this module; PyAV is loaded with the first video only.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import SHOWN_BYTES

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# FFmpeg also reads play lists, which name other files and hosts: a file must not make a worker open those.
FORMATS = "mov,avi,matroska,mpeg,mpegts,flv,asf,ogg"
PADDED = 2  # times the pixels of a frame, at most, that FFmpeg counts: it adds to each side what its arithmetic needs
CLAIMED = 2  # times its length, at most, that the frames of a file may come to: some are stored shorter than they are

Decoded = Iterator[tuple[int | None, "VideoFrame | None"]]


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
        why = getattr(error, "strerror", None) or error
        raise UnreadableImageError(
            f"the file is not a video, or is cut short; it begins with {head!r}: {why}"
        ) from None
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


def seek_keyframe(container: "InputContainer", stream: "VideoStream", timestamp: int) -> None:
    """Seek the keyframe before a timestamp, in the stream's own unit."""
    import av

    # Where it fails, the container stands where it stood, and the frame comes later.
    with contextlib.suppress(av.FFmpegError):
        container.seek(timestamp, stream=stream)


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


def decode_frames(container: "InputContainer", stream: "VideoStream") -> Decoded:
    """Timestamp and frame from where the container stands; no frame where it is damaged, if that can be told."""
    import av

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
        raise UnreadableImageError(
            f"the video has {width} x {height} pixels, more than the {max_pixels} that ingest.max_pixels and "
            "inference.memory_megabytes allow"
        )
