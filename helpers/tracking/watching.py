"""What watches scheduled runs: a hook that gets the summary, and a file that Prometheus collects."""

import json
import math
import shlex
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from helpers.errors import UserError, first_line
from helpers.options import CREDENTIAL_REFERENCE
from helpers.storage import LocalStorage
from helpers.storage.credentials import fetch

HOOK_SECONDS = 30
PREFIX = "spark_vision_"


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
