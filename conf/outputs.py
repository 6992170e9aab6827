"""Empty the outputs that show pictures which the repository may not hold, for `make notebooks`.

Cells with the tag `local-output` have them: photographs that a package licenses for use, not for copies of our own.
"""

import json
from typing import Any

from helpers.config import PROJECT

TAG = "local-output"


def strip(notebook: dict[str, Any]) -> dict[str, Any]:
    """A notebook, as nbformat 4 stores it, without the outputs of cells that have the tag."""
    cells = [{**cell, "outputs": []} if TAG in cell["metadata"].get("tags", []) else cell for cell in notebook["cells"]]
    return {**notebook, "cells": cells}


if __name__ == "__main__":
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        stripped = strip(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(stripped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
