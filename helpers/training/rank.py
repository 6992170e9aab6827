"""The process of one rank that `train_on_spark` starts: `python -m helpers.training.rank FAILURE PROGRAM ARGUMENTS`.

It imports the standard library alone, so that a program starts as soon as it does by itself.
"""

import json
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

CHECKPOINT_NOTE = "CHECKPOINT_NOTE"  # environment variable: the file in which rank 0 notes the step of its checkpoint
GRACE_SECONDS = 5.0  # for the program to end by itself, once its task is gone
RUN_ID = "TORCHELASTIC_RUN_ID"  # environment variable of torchrun: the same when ranks are started again


def be_rank() -> None:
    """Run the program that the command line names, as `__main__`; if it fails, write why to the file named first."""
    failure, program, *arguments = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of Spark may ignore it, and pass that on
    threading.Thread(target=_end_with_task, daemon=True).start()
    sys.argv = [program, *arguments]
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(program).parent)]  # in the place of the working directory
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        frames: Any = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != program:
            frames = frames.tb_next  # ours, which lead to the program; one that does not compile has no others
        lines = traceback.format_exception(type(error), error, frames or error.__traceback__)
        report = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(lines), "ended": time.time()}
        Path(failure).write_text(json.dumps(report))
        sys.exit(1)  # the driver shows it


def _end_with_task() -> None:
    # Not through `sys.stdin`, whose lock the interpreter could not take at its end.
    while os.read(0, 1):
        continue
    # An interrupt lets the program say that it was one, unless it waits for another rank.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    be_rank()
