"""MLflow's own server on loopback, with SQLite and a folder of artifacts; and servers that fail."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 120
# The command `mlflow server` without the second process that it starts, whose imports are as long again.
SERVER = """
import os
import uvicorn  # before MLflow, which is to see that it is in a server
import mlflow.server
from mlflow.cli import cli

def serve(command, extra_env, **_):
    os.environ.update(extra_env)
    uvicorn.main(command[3:])

mlflow.server._exec_cmd = serve
cli()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def start_mlflow(folder: Path) -> Iterator[str]:
    """Run a server for the length of a block; yields its address."""
    port = free_port()
    command = [sys.executable, "-c", SERVER, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _wait(url: str, server: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        assert server.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.2)
