"""Prepare executed notebooks for a commit, for `make notebooks`.

Of a progress bar only its last state stays. Cells with the tag `local-output` are emptied: they show pictures that the
repository may not hold, because a package licenses the photographs for use, not for copies of our own.
"""

import json
from itertools import groupby
from typing import Any

from helpers.config import PROJECT

TAG = "local-output"


def strip(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook, as nbformat 4 stores it, without the outputs of cells that have the tag."""
    return {**notebook, "cells": [_strip_cell(cell) for cell in notebook["cells"]]}


def _strip_cell(cell: dict[str, Any]) -> dict[str, Any]:
    if "outputs" not in cell:
        return cell
    return {**cell, "outputs": [] if TAG in cell["metadata"].get("tags", []) else _joined(cell["outputs"])}


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outputs with each stream whole, as a terminal shows it: a carriage return begins a line anew."""
    joined = []
    for name, parts in groupby(outputs, key=lambda output: output.get("name")):
        first, *others = parts
        if name is None:
            joined += [first, *others]
            continue
        text = "".join("".join(part["text"]) for part in (first, *others))
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        joined.append({**first, "text": "\n".join(lines).splitlines(keepends=True)})
    return joined


if __name__ == "__main__":
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        stripped = strip(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(stripped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
