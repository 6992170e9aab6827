"""What the notebooks need of the repository's address: the Colab badge and the first cell's `git clone`.

    python conf/badges.py        the first cell, and no badge: there is nothing yet that it could open
    python conf/badges.py URL    a badge that opens the notebook, and a cell that clones

The address is nowhere else; run it once after the repository has got one (`make badges REPOSITORY=URL`).
"""

import json
import re
import sys
from typing import Any

from helpers.config import PROJECT
from helpers.errors import UserError

COLAB = "https://colab.research.google.com"
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)[^\n]*\n\n?")
FIRST_CELL = """import os
import runpy
from pathlib import Path

if {{"COLAB_RELEASE_TAG", "DATABRICKS_RUNTIME_VERSION"}} & set(os.environ):  # elsewhere `make setup` has done this
    if "COLAB_RELEASE_TAG" in os.environ and not Path("../helpers").is_dir():  # the notebook is there alone
        os.spawnlp(os.P_WAIT, "git", "git", "clone", "--depth", "1", "--", {address}, "project")
        os.chdir("project/notebooks")
    root = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "helpers").is_dir())
    runpy.run_path(f"{{root}}/conf/bootstrap.py", run_name="__main__")"""


def apply(notebook: dict[str, Any], name: str, repository: str | None) -> dict[str, Any]:
    """The notebook with its badge and its first code cell; nothing else is changed.

    Args:
        notebook: as nbformat 4 stores it.
        name: of its file.
        repository: `https://github.com/OWNER/NAME`, or None while there is none.

    Raises:
        UserError: Colab opens notebooks by address from GitHub only.
    """
    badge, address = "", 'os.environ["PROJECT_REPOSITORY"]'
    if repository:
        match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", repository)
        if match is None:
            raise UserError(f"{repository}: not of the form https://github.com/OWNER/NAME, which Colab can open")
        link = f"{COLAB}/github/{match[1]}/blob/main/notebooks/{name}"
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})\n\n"
        address = f'os.environ.get("PROJECT_REPOSITORY", "https://github.com/{match[1]}")'
    cells = [dict(cell) for cell in notebook["cells"]]
    title, _, rest = "".join(cells[0]["source"]).partition("\n\n")
    rest = BADGE.sub("", rest)
    cells[0]["source"] = f"{title}\n\n{badge}{rest}".splitlines(keepends=True)
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    first["source"] = FIRST_CELL.format(address=address).splitlines(keepends=True)
    return {**notebook, "cells": cells}


def repository_of(notebook: dict[str, Any]) -> str | None:
    """The repository that a notebook's badge leads to."""
    match = re.search(rf"{COLAB}/github/([\w.-]+/[\w.-]+)/blob/", "".join(notebook["cells"][0]["source"]))
    return f"https://github.com/{match[1]}" if match else None


def main(arguments: list[str]) -> None:
    """Rewrite the notebooks in place."""
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        changed = apply(notebook, path.name, arguments[0] if arguments else None)
        path.write_text(json.dumps(changed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
