"""Waiting for a distant storage while other work goes on. Executors import this module."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_groups(function: Callable[[T], R], groups: Iterable[Sequence[T]], threads: int) -> Iterator[list[R]]:
    """Apply a function that waits to every item, group by group.

    Args:
        function: what to apply; an exception of it is raised when its group is asked for.
        groups: the items; one group is worked on ahead of the one that the caller has.
        threads: how many items wait at once; with 1 nothing is done ahead and there is no thread.
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


def _results(coming: list[Future[R]]) -> list[R]:
    """Wait for them, and keep none: what was read may be large."""
    return [coming.pop(0).result() for _ in range(len(coming))]
