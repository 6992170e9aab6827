"""The memory of this process: what it has, and a limit to what a file that somebody made may take. And its name.

Executors import this module; it needs the standard library, and in places pyarrow.
"""

import contextlib
import ctypes
import os
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

PAGE = resource.getpagesize()
# Of GNU's C library: bytes that it takes from the system, and keeps, beyond what is asked for (mallopt(3)).
M_TOP_PAD, DEFAULT_PAD, TRAINING_PAD = -2, 2**17, 2**28
OVERLAP_SECONDS = 0.5  # that two tasks last, so that they run at the same time where they can

_is_shared = False  # by several tasks


def resident_megabytes() -> float:
    """The memory of this process now; where the system does not tell (macOS), the most it ever was."""
    return _memory()[1] / 2**20


@contextlib.contextmanager
def bounded(megabytes: int | None) -> Iterator[int | None]:
    """Let every allocation fail that would take this process beyond so many megabytes; None for no limit.

    The size of an image says what decoding takes, but a decoder can be made to take more: by texts, tables and indices
    that a few bytes describe. What then fails is an error of that image. Other threads would be limited too, for as
    long, so that in a process that tasks share (`share`) none is.

    Yields:
        How many bytes more the process may take.
    """
    if megabytes is None:
        yield None
        return
    space, resident = _memory()
    left = max(0, megabytes * 2**20 - resident)
    if space is None or _is_shared:
        yield left
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = space + left
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield left
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def share() -> None:
    """Say that several tasks share this process."""
    global _is_shared
    _is_shared = True


@contextlib.contextmanager
def trimmable() -> Iterator[None]:
    """Let Arrow take memory where `trim_heap` can give it back: its own allocator keeps what large tables have left."""
    import pyarrow as pa

    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(pool)


@contextlib.contextmanager
def untrimmed() -> Iterator[None]:
    """Let a process keep what is freed in each step of a training, and needed in the next one.

    By default GNU's C library gives it back to the system, and a third of a training's time goes into taking it again.
    """
    _call_allocator("mallopt", M_TOP_PAD, TRAINING_PAD)
    try:
        yield
    finally:
        _call_allocator("mallopt", M_TOP_PAD, DEFAULT_PAD)
        trim_heap()


def trim_heap() -> None:
    """Give free memory back to the system, which GNU's C library keeps where large tables have been."""
    _call_allocator("malloc_trim", 0)


def _call_allocator(name: str, *arguments: int) -> None:
    """Call a function of the C library that only GNU's has."""
    if function := getattr(ctypes.CDLL(None), name, None):
        function(*arguments)


def _memory() -> tuple[int | None, int]:
    """Bytes of this process's address space, where the system tells, and of its memory."""
    try:
        file = os.open("/proc/self/statm", os.O_RDONLY)
    except FileNotFoundError:
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        space, resident = os.read(file, 256).split()[:2]
    finally:
        os.close(file)
    return int(space) * PAGE, int(resident) * PAGE


def name_process(batches: "Iterable[pa.RecordBatch]") -> "Iterator[pa.RecordBatch]":
    """The host and the process of a task that lasts for a moment."""
    import pyarrow as pa

    rows = sum(batch.num_rows for batch in batches)
    time.sleep(OVERLAP_SECONDS)
    yield pa.RecordBatch.from_pydict({"process": [f"{socket.gethostname()} {os.getpid()}"] * rows})
