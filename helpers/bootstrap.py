"""The first cell of a notebook on a hosted runtime (Colab, Databricks): install what the runtime lacks, no more."""

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"


def install_missing() -> list[str]:
    """Install the packages of `requirements.txt` that are absent, with their pins; leave present ones as they are.

    Another version of numpy or pandas than the one a hosted runtime has loaded would need a restart of it.

    Returns:
        What was installed, as pins.
    """
    missing = find_missing()
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    return missing


def find_missing() -> list[str]:
    """List the pins of `requirements.txt` whose package is not installed, in any version."""
    pins = re.findall(r"^([\w.-]+)(\S*)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    present = {_canonical(package.name) for package in distributions()}
    return [name + rest for name, rest in pins if _canonical(name) not in present]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
