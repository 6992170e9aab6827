"""Run `python -m helpers` with the same arguments, for spark-submit and the Python task of a Databricks job."""

import sys
from pathlib import Path

# Databricks executes the file without `__file__`, in any folder, and takes every SystemExit for a failure.
sys.path.insert(0, str(Path(sys._getframe().f_code.co_filename).resolve().parent.parent))

from helpers.cli import main  # noqa: E402 - found by the line above

if code := main():
    raise SystemExit(code)
