"""Mutants of images, videos and manifests, run in processes whose memory and time are watched.

    make fuzz MINUTES=10                                     all targets, with a new seed
    .venv/bin/python tests/fuzz.py --target images --seed 1 --mutants 100000

A mutant follows from the target, the seed and its number alone. A finding is what a task would suffer from: a process
that dies, takes more memory than it may or does not come back, and an exception that says nothing of the file. Each is
printed with its bytes, or where they lie.
"""

import argparse
import base64
import io
import json
import mmap
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PROGRAM = __file__
CORPUS = Path(__file__).parent / "corpus"
FOUND = PROJECT / "out" / "fuzz"

MEGABYTES = 512  # that the process of a task may take; a model would have its share of it
SECONDS = 20  # for one mutant
MAX_PIXELS = 178_956_970
FRAMES = 20  # read of a video
SHOWN_BYTES = 3000  # of a finding; longer ones are in a file
A_PROCESS = 2000  # mutants

NUMBERS = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
NUMBERS += [2**24, 2**28, 2**40, 2**63 - 1, 2**63, 2**64 - 1]


# ---------------------------------------------------------------- mutants


def mutate(seeds: list[bytes], rng: random.Random) -> bytes:
    """One of the seeds with one to eight changes, most of them near its beginning, where formats say what follows."""
    content = bytearray(rng.choice(seeds))
    for _ in range(1 + min(7, int(rng.expovariate(0.7)))):
        CHANGES[rng.randrange(len(CHANGES))](content, seeds, rng)
    return bytes(content)


def _place(content: bytearray, rng: random.Random) -> int:
    limit = len(content) if rng.random() < 0.5 else min(len(content), 128)
    return rng.randrange(limit) if limit else 0


def _flip(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    if content:
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def _number(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    width, number = rng.choice((1, 2, 4, 8)), rng.choice((rng.choice(NUMBERS), rng.randrange(2**16), len(content)))
    order, place = rng.choice(("little", "big")), _place(content, rng)
    content[place : place + width] = (number % 256**width).to_bytes(width, order)


def _random(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    place, length = _place(content, rng), rng.randrange(1, 16)
    content[place : place + length] = rng.randbytes(length)


def _cut(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    del content[_place(content, rng) :]


def _remove(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    place = _place(content, rng)
    del content[place : place + rng.randrange(1, 64)]


def _repeat(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    place, length = _place(content, rng), rng.randrange(1, 200)
    content[place:place] = content[place : place + length] * rng.choice((1, 1, 1, 2, 30))


def _splice(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    other, place = rng.choice(seeds), _place(content, rng)
    if other:
        start = rng.randrange(len(other))
        content[place:place] = other[start : start + rng.randrange(1, 400)]


def _move(content: bytearray, seeds: list[bytes], rng: random.Random) -> None:
    place, length = _place(content, rng), rng.randrange(1, 100)
    part = content[place : place + length]
    del content[place : place + length]
    place = _place(content, rng)
    content[place:place] = part


CHANGES = [_flip, _flip, _flip, _number, _number, _number, _random, _cut, _remove, _repeat, _splice, _move]


def mend(content: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have: without them nothing behind the first change is read."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    mended, place = bytearray(content), 8
    while place + 12 <= len(content):
        end = place + 8 + struct.unpack_from(">I", content, place)[0]
        if end + 4 > len(content):
            break
        struct.pack_into(">I", mended, end, zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return bytes(mended)


VALUES = [None, True, 0, -1, 1.5, 2**31, 2**63, 2**200, 1e308, float("nan"), float("inf"), "", "x", "../x", "\ud800"]
VALUES += [[], {}, [[]], {"x": 1}, [1] * 5, ["x", None]]


def reshape(content: bytes, rng: random.Random) -> bytes:
    """JSON with other values, kinds, names or depth at one or two places."""
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        node, value = document, rng.choice(VALUES)
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not (isinstance(node[key], dict | list) and node[key] and rng.random() < 0.6):
                break
            node = node[key]
        change = rng.randrange(6)
        if not isinstance(node, dict | list) or not node:
            continue
        if change == 0:
            del node[key]
        elif change == 1 and isinstance(node, dict):
            node[str(value)] = node[key]
        elif change == 2:
            node[key] = {"x": node[key]}
        else:
            node[key] = value
    text = json.dumps(document)
    return (text if rng.random() < 0.98 else "[" * 200_000 + text).encode()


# ---------------------------------------------------------------- targets


def image_seeds() -> list[bytes]:
    """An image of each kind that decoders treat in another way, and those that once were findings."""
    from bombs import bilevel_png, encoded, jpeg_of_scans, noise, png_with, small_tiff, text_chunk
    from PIL import Image

    rgb, film = noise(), [noise().rotate(turn) for turn in (0, 90, 180)]
    turned = Image.Exif()
    turned[0x0112] = 6
    seeds = [encoded(rgb, "JPEG"), encoded(rgb, "JPEG", exif=turned), encoded(rgb, "JPEG", progressive=True)]
    seeds += [encoded(rgb.convert(mode), "JPEG", progressive=mode == "CMYK") for mode in ("L", "CMYK")]
    seeds += [encoded(rgb.convert(mode), "PNG", exif=turned) for mode in ("1", "L", "P", "LA", "RGBA", "I;16")]
    seeds += [bilevel_png(32, 24), png_with(text_chunk(0.1), text_chunk(0.1, b"iTXt"), text_chunk(0.01, b"iCCP"))]
    seeds += [encoded(film[0], form, save_all=True, append_images=film[1:]) for form in ("PNG", "GIF", "WEBP")]
    seeds += [encoded(rgb.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    seeds += [
        encoded(rgb, "WEBP"),
        encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
        encoded(rgb.convert("P"), "GIF"),
    ]
    seeds += [encoded(rgb, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    seeds += [encoded(rgb.convert(mode), "TIFF") for mode in ("1", "L", "P", "CMYK", "RGBA", "I;16")]
    seeds += [small_tiff(across=32, down=32), small_tiff(rows=8), small_tiff(planar=2), jpeg_of_scans(24, 20)]
    return seeds + [
        path.read_bytes() for path in sorted(CORPUS.glob("*")) if path.suffix in (".png", ".tif", ".gif", ".jpg")
    ]


def check_image(content: bytes) -> None:
    """What a task does with the bytes of an image."""
    from helpers.images.decoding import load
    from helpers.images.spec import InputSpec
    from helpers.memory import bounded

    spec = InputSpec(28, 28, "rgb", (0.0,) * 3, (1.0,) * 3, scaled_decoding=2.0)
    with bounded(MEGABYTES) as left:
        load(content, spec, MAX_PIXELS, left)


def video_seeds() -> list[bytes]:
    """A clip of each kind of container and codec, and those that once were findings."""
    import av
    import cv2
    import numpy as np
    from bombs import avi, mp4

    pictures = np.random.default_rng(0).integers(0, 256, (6, 4, 6, 3), np.uint8)
    pictures = [cv2.resize(picture, (32, 16), interpolation=cv2.INTER_CUBIC) for picture in pictures]
    quiet = {"libx265": {"x265-params": "log-level=none:pools=1"}, "libx264": {"threads": "1"}}
    seeds = [avi([cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures], 32, 16), mp4(64, codec=b"mp4v")]
    for form, codec in [
        ("mp4", "mpeg4"),
        ("mov", "libx264"),
        ("mp4", "libx265"),
        ("matroska", "libx264"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("flv", "flv1"),
        ("mpegts", "mpeg2video"),
        ("mpeg", "mpeg1video"),
        ("ogg", "libtheora"),
        ("asf", "wmv2"),
        ("avi", "png"),
    ]:
        buffer = io.BytesIO()
        try:
            with av.open(buffer, "w", format=form, options={"fflags": "bitexact"}) as container:  # without random names
                stream = container.add_stream(codec, rate=25, options=quiet.get(codec))
                stream.width, stream.height = 32, 16
                stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
                for picture in pictures:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
                container.mux(stream.encode())
        except (av.FFmpegError, ValueError):  # this FFmpeg does not write it
            continue
        seeds.append(buffer.getvalue())
    return seeds + [path.read_bytes() for path in sorted(CORPUS.glob("*.mp4"))]


def check_video(content: bytes) -> None:
    """What a task does with a video: its frames are listed, and some of them read."""
    import numpy as np

    from helpers.images.video import find_frames, frame_pixels, read_frames
    from helpers.memory import bounded

    most = frame_pixels(MAX_PIXELS, MEGABYTES)
    with bounded(MEGABYTES):
        frames = find_frames(io.BytesIO(content), most)
        numbers = np.arange(0, frames.count, max(1, frames.count // FRAMES))
        places = (None, None) if frames.pts is None else (frames.pts[numbers], frames.seek[numbers])
        for _ in read_frames(io.BytesIO(content), numbers, *places, most):
            pass


def manifest_seeds() -> list[bytes]:
    """A manifest of each task."""
    manifest = {
        "name": "net-fp32",
        "architecture": "net",
        "task": "classification",
        "input": {"height": 28, "width": 28, "color": "gray", "mean": [0.5], "std": [0.25], "resize": "stretch"},
        "outputs": [{"name": "logits", "shape": [10]}],
        "labels": [f"class {i}" for i in range(10)],
        "postprocess": {"top_k": 3},
        "precision": "fp32",
        "arithmetic": "f32",
        "flops": 1_000_000,
        "checkpoint": {"file": "net.pt", "sha256": "0" * 64},
        "quantization": {},
        "files": {"model.xml": "0" * 64, "model.bin": "0" * 64},
        "format": 1,
    }
    boxes = {**manifest, "task": "instance_segmentation", "postprocess": {"nms": "fast", "score_threshold": 0.05}}
    return [json.dumps(manifest, indent=2).encode(), json.dumps(boxes).encode()]


def check_manifest(content: bytes) -> None:
    """What a run does with a bundle's manifest."""
    from helpers.bundle.manifest import load_bundle

    class Memory:
        root = "bundle"

        def join(self, *parts: str) -> str:
            return "/".join((self.root, *parts))

        def read(self, path: str, limit: int | None = None) -> bytes:
            return content

    load_bundle(Memory())


TARGETS: dict[str, tuple[Callable[[], list[bytes]], Callable[[bytes], None]]] = {
    "images": (image_seeds, check_image),
    "videos": (video_seeds, check_video),
    "manifests": (manifest_seeds, check_manifest),
}


# ---------------------------------------------------------------- the process that is watched


def mutants(target: str, seed: int, start: int) -> Iterator[tuple[int, bytes]]:
    """The mutants of a target from one number on."""
    seeds = TARGETS[target][0]()
    for number in range(start, sys.maxsize):
        rng = random.Random(f"{target} {seed} {number}")
        if target == "manifests" and rng.random() < 0.8:
            yield number, reshape(rng.choice(seeds), rng)
        else:
            content = mutate(seeds, rng)
            yield number, mend(content) if rng.random() < 0.9 else content


def work(target: str, seed: int, start: int, count: int, place: str) -> None:
    """Check mutants, and print a line of JSON for each that is a finding; the number of each comes first, in a file."""
    from helpers.errors import UserError
    from helpers.images.boundary import UnreadableImageError

    with open(place, "r+b") as file:  # noqa: PTH123 - mapped, so that it is told even when this process dies at once
        told = mmap.mmap(file.fileno(), 8)
    made, check, kinds = mutants(target, seed, start), TARGETS[target][1], Counter[str]()
    for number, content in made:
        if number == start + count:
            break
        told[:] = struct.pack("<q", number)
        begun, why = time.monotonic(), None
        try:
            check(content)
            kinds["good"] += 1
        except (UnreadableImageError, UserError, MemoryError) as error:
            kinds[type(error).__name__] += 1
        except Exception as error:
            kinds["other"] += 1
            why = f"{type(error).__name__}: {error}"
        if (peak := peak_megabytes()) > MEGABYTES:
            why = f"{peak:.0f} MB of memory"
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        if (seconds := time.monotonic() - begun) > SECONDS / 4 and not why:
            why = f"{seconds:.1f} s"
        if why:
            print(json.dumps({"number": number, "why": why}), flush=True)
    print(json.dumps({"kinds": kinds, "peak": peak_megabytes()}), flush=True)


def peak_megabytes() -> float:
    """The most memory that this process has had, its parent's not counted as `getrusage` does."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


# ---------------------------------------------------------------- who watches


@dataclass
class Report:
    """What came of some mutants of one target."""

    target: str
    seed: int
    mutants: int = 0
    findings: list[tuple[int, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    peak: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
        return f"{self.target}, seed {self.seed}: {self.mutants} mutants ({kinds}), at most {self.peak:.0f} MB"


def watch(target: str, seed: int, count: int, until: float = float("inf"), start: int = 0) -> Report:
    """Run mutants in one process after the other: a new one for the rest where one dies or does not come back.

    Args:
        target: of `TARGETS`.
        seed: any number.
        count: how many mutants.
        until: of `time.monotonic`, when to stop.
        start: the number of the first.
    """
    report, number, end = Report(target, seed), start, start + count
    while number < end and time.monotonic() < until:
        number = _watch_one(report, number, min(end - number, A_PROCESS), until)
    report.mutants = number - start
    return report


def _watch_one(report: Report, start: int, count: int, until: float) -> int:
    """Run one process, and return the number that the next one begins with."""
    with tempfile.NamedTemporaryFile() as place, tempfile.TemporaryFile("w+") as output:
        place.write(struct.pack("<q", start))
        place.flush()
        command = [sys.executable, PROGRAM, "--work", report.target, report.seed, start, count, place.name]
        process = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.DEVNULL)
        number, since, why = start, time.monotonic(), ""
        while process.poll() is None:
            time.sleep(0.05)
            (told,) = struct.unpack("<q", Path(place.name).read_bytes())
            if told != number:
                number, since = told, time.monotonic()
            elif time.monotonic() > since + SECONDS + 10 * (number == start):  # the first has the imports with it
                process.kill()
                why = f"more than {SECONDS} s"
            if time.monotonic() > until:
                process.kill()
                break
        code = process.wait()
        (number,) = struct.unpack("<q", Path(place.name).read_bytes())
        output.seek(0)
        for line in output:
            answer = json.loads(line)
            if "why" in answer:
                report.findings.append((answer["number"], answer["why"]))
            report.kinds.update(answer.get("kinds", {}))
            report.peak = max(report.peak, answer.get("peak", 0.0))
    if code == 0:
        return start + count
    if why or time.monotonic() < until:
        report.findings.append((number, why or f"the process ended with {code}"))
    return number + 1


def show(report: Report, shown: set[str]) -> None:
    """Print the findings with the bytes to reproduce them, one of each kind."""
    wanted = dict(report.findings)
    for number, content in mutants(report.target, report.seed, 0):
        if not wanted:
            break
        why = wanted.pop(number, None)
        if why is None or why in shown:
            continue
        shown.add(why)
        FOUND.mkdir(parents=True, exist_ok=True)
        path = FOUND / f"{report.target}-{report.seed}-{number}"
        path.write_bytes(content)
        print(f"{why}\n    {path} ({len(content)} bytes)")
        if len(content) <= SHOWN_BYTES:
            print(f"    base64 {base64.b64encode(content).decode()}")


def main() -> int:
    """Fuzz for some minutes, or so many mutants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="in all")
    parser.add_argument("--mutants", type=int, default=sys.maxsize, help="of each target")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument(
        "--work", nargs=5, metavar=("TARGET", "SEED", "START", "COUNT", "PLACE"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.work:
        target, *numbers, place = options.work
        work(target, *map(int, numbers), place)
        return 0
    until, done, found, shown = time.monotonic() + 60 * options.minutes, 0, 0, set[str]()
    while time.monotonic() < until and done < options.mutants:
        count = min(A_PROCESS, options.mutants - done)
        for target in options.targets:
            report = watch(target, options.seed, count, until, done)
            print(report, flush=True)
            show(report, shown)
            found += len(report.findings)
        done += count
    print(f"{found} findings, {len(shown)} of them different")
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    sys.exit(main())
