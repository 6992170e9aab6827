"""Show how far a run is, from the files its tasks have finished: no second pass, and no call Spark Connect lacks.

On a terminal and in a notebook there is a bar; in a log a line every few seconds.
"""

import builtins
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from helpers.errors import StorageError, only_warn

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOG_SECONDS = 10.0


@contextlib.contextmanager
def show_progress(total: int, count: Callable[[], tuple[int, int]], done: int, is_whole: bool) -> Iterator[None]:
    """Poll a count, of images and failed images so far, in the background while a block runs.

    Of the `total` so many were `done` before the block. Where it is not whole, it may grow in a later block.
    """
    ended = threading.Event()
    unit = " images" if is_whole else " images listed so far"
    thread = threading.Thread(target=_show, args=(total, count, done, unit, ended), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@only_warn("the progress is not shown any more")
def _show(total: int, count: Callable[[], tuple[int, int]], done: int, unit: str, ended: threading.Event) -> None:
    show = sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")
    start = logged = time.monotonic()
    images, failed = done, 0
    with tqdm(total=total, initial=images, unit=unit, smoothing=0, disable=not show, file=sys.stderr) as bar:
        while True:
            is_end = ended.wait(POLL_SECONDS)
            with contextlib.suppress(StorageError):  # of no matter here: the run itself tells what stops it
                images, failed = count()
            bar.n = images
            bar.set_postfix_str(f"{failed} failed" if failed else "")
            now = time.monotonic()
            if not show and now - logged >= LOG_SECONDS:
                logged, rate = now, (images - done) / (now - start)
                left = f"{(total - images) / rate:.0f} s left" if rate else "nothing finished yet"
                log.info("%d of %d%s, %d failed, %.1f images/s, %s", images, total, unit, failed, rate, left)
            if is_end:
                return
