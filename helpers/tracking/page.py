"""A page as one file that needs nothing else: data, style, program and the library of its charts are in it.

The data hold names of files, labels and messages of errors, which anybody may have written. So nothing of them is ever
part of the page's markup: they are JSON, in which no character can end it, and the page's program makes text of them.
Its Content-Security-Policy runs no other program, and lets nothing be asked of any server.
"""

import base64
import hashlib
import json
import logging
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.storage import LocalStorage
from helpers.temporary import user_folder

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("page.html")
PACKED = TEMPLATE.with_name("charts.js")
CHARTS = "6.4"  # the version of Vega-Lite
NOTICE = """/* Vega, Vega-Lite, Vega-Embed: Copyright 2015-2026 University of Washington Interactive Data Lab and
contributors, BSD 3-Clause License; with D3, Copyright 2010-2026 Mike Bostock, ISC License; the licenses in full are in
the packages of these names. */
"""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; script-src "
)


def render(data: dict[str, Any]) -> bytes:
    """The page, `page.html`, with what its program (`page.js`) reads: texts, finite numbers, lists and mappings."""
    program = TEMPLATE.with_suffix(".js").read_text(encoding="utf-8")
    # Nothing in their texts ends them or begins a comment.
    scripts = [text.replace("</script", r"<\/script").replace("<!--", r"<\!--") for text in (charts(), program)]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    # JSON in ASCII alone, without any character that means something in HTML.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    parts = {
        "policy": POLICY + " ".join(f"'sha256-{digest}'" for digest in digests),
        "style": TEMPLATE.with_suffix(".css").read_text(encoding="utf-8"),
        "charts": scripts[0],
        "program": scripts[1],
        "data": text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template).encode()


@cache
def charts() -> str:
    """Vega-Lite and all it needs as one script; empty where the package that has it is missing.

    Making it takes two seconds and 150 MB, so it is left for this user's next process. The archive of `conf/pack.py`
    has it in the package's place.
    """
    if PACKED.is_file():
        return PACKED.read_text(encoding="utf-8")
    try:
        import vl_convert
    except ModuleNotFoundError:
        log.warning("the page has tables instead of charts: install vl-convert-python (requirements.txt)")
        return ""
    folder = user_folder()
    kept = folder and folder / f"vega-lite-{CHARTS}-{version('vl-convert-python')}.js"
    if kept and kept.is_file():
        return kept.read_text(encoding="utf-8")
    script = NOTICE + vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", CHARTS)
    if kept:
        LocalStorage(str(kept.parent)).write(kept.name, script.encode())
    return script
