"""Waiting for a distant storage while other work goes on. Executors import this module."""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

BATCH = 1000  # items that a thread hands over at once
BATCHES_AHEAD = 40  # of one stream, that wait for the caller: of files in 8 folders, 100 MB at most
LOOK_SECONDS = 0.5  # after which a thread that waits looks whether the caller still wants its items


def map_groups(function: Callable[[T], R], groups: Iterable[Sequence[T]], threads: int) -> Iterator[list[R]]:
    """Apply a function that waits to every item, group by group; what it raises is raised when its group is asked for.

    One group is worked on ahead of the one that the caller has. As many items wait at once as there are threads; with 1
    nothing is done ahead and there is no thread.
    """
    if threads == 1:
        for group in groups:
            yield [function(item) for item in group]
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        coming: list[Future[R]] | None = None
        for group in groups:
            following = [pool.submit(function, item) for item in group]
            if coming is not None:
                yield _results(coming)
            coming = following
        if coming is not None:
            yield _results(coming)
    finally:
        pool.shutdown(cancel_futures=True)


def map_each(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """The same for items one by one: as many are a group as wait at once."""
    following = iter(items)
    return chain.from_iterable(map_groups(function, iter(lambda: list(islice(following, threads)), []), threads))


def _results(coming: list[Future[R]]) -> list[R]:
    """Wait for them, and keep none: what was read may be large."""
    return [coming.pop(0).result() for _ in range(len(coming))]


def chain_ahead(streams: Iterable[Callable[[], Iterable[T]]], threads: int) -> Iterator[T]:
    """The items of one stream after the other, while threads go through the next ones, a stream each.

    A stream waits with `BATCHES_AHEAD` batches for its turn, and what it raises is raised then.
    """
    is_closed = threading.Event()
    begin = iter(streams)
    coming: deque[queue.Queue[list[T] | BaseException | None]] = deque()

    def fill(stream: Callable[[], Iterable[T]], batches: queue.Queue[list[T] | BaseException | None]) -> None:
        last = None
        try:
            items = iter(stream())
            while not is_closed.is_set() and (batch := list(islice(items, BATCH))):
                _put(batches, batch, is_closed)
        except BaseException as error:
            last = error
        _put(batches, last, is_closed)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="chain")
    try:
        while True:
            for stream in islice(begin, threads - len(coming)):
                coming.append(queue.Queue(BATCHES_AHEAD))
                pool.submit(fill, stream, coming[-1])
            if not coming:
                return
            while batch := coming[0].get():
                if isinstance(batch, BaseException):
                    raise batch
                yield from batch
            coming.popleft()
    finally:
        is_closed.set()
        pool.shutdown(cancel_futures=True)


def _put(batches: queue.Queue[T], batch: T, is_closed: threading.Event) -> None:
    """Hand a batch over; once nobody takes any, return at once."""
    while not is_closed.is_set():
        with contextlib.suppress(queue.Full):
            batches.put(batch, timeout=LOOK_SECONDS)
            return
