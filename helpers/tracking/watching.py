"""What watches a run: its progress as it goes, a hook that gets its summary, and a file that Prometheus collects."""

import builtins
import contextlib
import json
import logging
import math
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from helpers.errors import StorageError, UserError, first_line, only_warn
from helpers.options import CREDENTIAL_REFERENCE
from helpers.storage import LocalStorage
from helpers.storage.credentials import fetch

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LOG_SECONDS = 10.0
HOOK_SECONDS = 30
PREFIX = "spark_vision_"


@contextlib.contextmanager
def show_progress(total: int, count: Callable[[], tuple[int, int]], done: int, is_whole: bool) -> Iterator[None]:
    """Poll a count, of images and failed images so far, in the background while a block runs.

    It is of the files that tasks have finished: no second pass, and no call Spark Connect lacks. On a terminal and in a
    notebook there is a bar; in a log a line every few seconds. Of the `total` so many were `done` before the block.
    Where it is not whole, it may grow in a later block.
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


def call_hook(hook: str, summary: str) -> None:
    """Give the summary of a run, JSON, to a URL, as a POST request, or to the standard input of a command.

    The hook may be a reference to one of them (`env:NAME` and the like), which is shown nowhere. Raises UserError if
    the answer is no success, or the command fails.
    """
    target = fetch(hook) if CREDENTIAL_REFERENCE.fullmatch(hook) else hook
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(target, summary.encode(), {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=HOOK_SECONDS).close()
        else:
            command = shlex.split(target)
            subprocess.run(command, input=summary.encode(), timeout=HOOK_SECONDS, check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        raise UserError(f"the command ended with exit status {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"the command did not end within {HOOK_SECONDS} s") from None
    except (OSError, ValueError) as error:
        raise UserError(first_line(error)) from None


def write_prometheus(path: str, numbers: Mapping[str, float], labels: Mapping[str, str]) -> None:
    """Write numbers by their names in the text format of Prometheus, each with all labels.

    It happens in one step, so that the textfile collector of node_exporter reads whole files, named `*.prom`.
    """
    # Escaped as the format says: backslashes, quotes and line feeds, which are JSON's too.
    shown = ",".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in labels.items())
    lines = []
    for name, value in numbers.items():
        if math.isfinite(value):
            lines += [f"# TYPE {PREFIX}{name} gauge", f"{PREFIX}{name}{{{shown}}} {value:.17g}"]
    file = Path(path).resolve()
    LocalStorage(str(file.parent)).write(file.name, "".join(f"{line}\n" for line in lines).encode())
