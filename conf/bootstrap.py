"""Install what a hosted runtime (Colab, Databricks) lacks, and no more, for the first cell of a notebook.

The cell runs this file, which also makes `helpers` importable. So it imports nothing that could be missing.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
REQUIREMENTS = PROJECT / "requirements.txt"


def prepare() -> None:
    """Make the project importable and complete the runtime: packages, and Java where there is no other Spark."""
    folders = [PROJECT, PROJECT / "notebooks", PROJECT / "notebooks" / "programs"]
    sys.path[:0] = [str(folder) for folder in folders if str(folder) not in sys.path]
    install_missing()
    if "DATABRICKS_RUNTIME_VERSION" not in os.environ:
        install_java()


def install_missing() -> list[str]:
    """Install the packages of `requirements.txt` that are absent, with their pins; leave present ones as they are.

    A runtime that has loaded numpy or pandas would need a restart for another version. So loaded packages, and present
    packages of `requirements.txt`, are constraints for pip.

    Returns:
        The new packages, as pins.
    """
    missing = find_missing()
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder, "constraints.txt")
            constraints.write_text("\n".join(find_fixed()), encoding="utf-8")
            _pip("install", "--quiet", "--constraint", str(constraints), *missing)
        importlib.invalidate_caches()
    return missing


def find_missing() -> list[str]:
    """List the pins of `requirements.txt` whose package is not there, in any version."""
    present = _present()
    return [pin for name, pin in _pins() if name not in present and not _is_runtimes_own(name)]


def find_fixed() -> list[str]:
    """List as pins what pip must leave: packages of loaded modules, and those of `requirements.txt` that are there."""
    present = _present()
    modules = {name.partition(".")[0] for name in sys.modules}
    loaded = {_canonical(name) for m, names in packages_distributions().items() if m in modules for name in names}
    ours = {name for name, _ in _pins()}
    return sorted(f"{name}=={version}" for name, version in present.items() if name in loaded | ours)


def install_java() -> None:
    """Install Java, as a package, if it is missing or too old."""
    from helpers.errors import HostError
    from helpers.java import JAVA_PACKAGE, check_java

    try:
        check_java()
    except HostError:
        _pip("install", "--quiet", JAVA_PACKAGE)
        os.environ.pop("JAVA_HOME", None)  # which would come first
        importlib.invalidate_caches()


def _pip(*arguments: str) -> None:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and "DATABRICKS_RUNTIME_VERSION" in os.environ:
        # Only the magic installs on the workers too.
        shell.run_line_magic("pip", " ".join(arguments))
    else:
        subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def _pins() -> list[tuple[str, str]]:
    """Package names and their lines in `requirements.txt` without the comments."""
    pins = re.findall(r"^([\w.-]+)(\S*)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    return [(_canonical(name), name + rest) for name, rest in pins]


def _present() -> dict[str, str]:
    return {_canonical(package.name): package.version for package in distributions()}


def _is_runtimes_own(name: str) -> bool:
    # Databricks brings its own Spark on the path, not as an installed package.
    return name == "pyspark" and importlib.util.find_spec("pyspark") is not None


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    prepare()
