"""Show how far a run is, from the files its tasks have finished: no second pass, and no call Spark Connect lacks.

On a terminal and in a notebook there is a bar; in a log a line every few seconds.
"""

import builtins
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from helpers.errors import StorageError, only_warn

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOG_SECONDS = 10.0


class Progress:
    """Poll a count in the background while a block runs.

    Args:
        total: images in all.
        count: returns images and failed images so far.
        done: how many there were before the block.
        is_whole: whether the total is; else it is what is known so far, and may grow in a later block.
    """

    def __init__(self, total: int, count: Callable[[], tuple[int, int]], done: int = 0, is_whole: bool = True):
        self._total, self._count, self._done = total, count, done
        self._so_far = "" if is_whole else " listed so far"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")
        self._start = time.monotonic()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        with only_warn("the progress is not shown any more"):
            self._show_until_ended()

    def _show_until_ended(self) -> None:
        show = sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")
        logged, images, failed = self._start, self._done, 0
        unit = f" images{self._so_far}"
        with tqdm(total=self._total, initial=images, unit=unit, smoothing=0, disable=not show, file=sys.stderr) as bar:
            while True:
                ended = self._ended.wait(POLL_SECONDS)
                with contextlib.suppress(StorageError):  # of no matter here: the run itself tells what stops it
                    images, failed = self._count()
                bar.n = images
                bar.set_postfix_str(f"{failed} failed" if failed else "")
                if not show and time.monotonic() - logged >= LOG_SECONDS:
                    logged = time.monotonic()
                    self._log(images, failed)
                if ended:
                    return

    def _log(self, images: int, failed: int) -> None:
        rate = (images - self._done) / (time.monotonic() - self._start)
        left = f"{(self._total - images) / rate:.0f} s left" if rate else "nothing finished yet"
        known = f"{self._total} images{self._so_far}"
        log.info("%d of %s, %d failed, %.1f images/s, %s", images, known, failed, rate, left)
