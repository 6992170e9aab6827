"""`python -m helpers`: see `helpers.cli`."""

import atexit
import os
import sys

from helpers.cli import INTERRUPTED, main

code = INTERRUPTED


@atexit.register  # first, and so the last
def end() -> None:
    """End a process with Sail in it, whose threads and the interpreter's end may wait for each other."""
    if "pysail" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


code = main()
sys.exit(code)
