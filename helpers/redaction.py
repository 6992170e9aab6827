"""Texts without secrets: what this process has resolved, and what looks like one in a location, URL or setting.

Every `UserError`, and what the command line logs, passes through `redact`. Executors import this module.
"""

import logging
import re
from urllib.parse import parse_qs, quote, unquote

HIDDEN = "***"
SHORTEST = 8  # characters of a resolved secret: what is shorter would hide parts of every text
LEVELS = 3  # of percent-encoding within percent-encoding
WORDS = {"sig", "sas", "pwd", "pass"}  # of a secret's name, and how one ends:
ENDINGS = ("signature", "token", "password", "passwd", "passphrase", "secret", "key")

# Possessive and bounded, so that no text takes more than linear time.
NAME = re.compile(r"(?<![\w.-])([\w.-]++)=")
VALUE = re.compile(r"[^&;\s'\"<>)]*+")
QUOTED = re.compile(r"(['\"])([\w.-]++)(\1\s*+:\s*+['\"])[^'\"]*+")
PATTERNS = (
    # USER:PASSWORD@ in any scheme, the password with a slash too; HOST:PORT/PATH@ looks the same ...
    (r"(://)[^\s'\"<>@/:]*+:[^\s'\"<>]{0,4096}@", rf"\1{HIDDEN}@"),
    # ... and a user alone, which may be a token, unless it is a container.
    (r"(?<![\w+.-])((?!abfss?:|wasbs?:)[a-z][a-z0-9+.-]*+://)[^\s'\"<>/]{0,4096}@", rf"\1{HIDDEN}@"),
    (r"\b(bearer|basic|sharedkey(?:lite)?) ++[\w.~+/=:-]{16,}+", rf"\1 {HIDDEN}"),
    (r"((?:password|passwd|pwd)=)[^\s'\"<>]++", rf"\1{HIDDEN}"),  # which may have any character
)

_compiled = [(re.compile(pattern, re.IGNORECASE), shown) for pattern, shown in PATTERNS]
_resolved: set[str] = set()  # every secret that this process has seen, in each form in which it could be shown


def redact(text: str) -> str:
    """A text without any secret: those that this process has resolved, and every signature, key, password and token.

    Percent-encoded text in which one is found is shown decoded.
    """
    for secret in _resolved:
        text = text.replace(secret, HIDDEN)
    return "".join(_decoded(part) if "%" in part else part for part in re.split(r"(\s++)", _redact(text)))


def remember(secret: str) -> None:
    """Hide a text from now on, and its signature if it is a SAS token."""
    forms = [secret, secret.removeprefix("?"), *parse_qs(secret.removeprefix("?")).get("sig", [])]
    encoded = (form for text in forms for form in (text, quote(text), quote(text, safe="")))
    _resolved.update(form for form in encoded if len(form) >= SHORTEST)


class Redacting(logging.Filter):
    """For a handler, or for the logger of a library that logs the URLs it asks for."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Redact a record in place, and let it pass."""
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
            kind, error, trace = record.exc_info
            # Formatters that write JSON, as pyspark's, print the error itself.
            record.exc_info = (kind, Exception(redact(str(error))), trace) if kind else (None, None, None)
        return True


def _redact(text: str) -> str:
    for pattern, shown in _compiled:
        text = pattern.sub(shown, text)
    text = QUOTED.sub(
        lambda match: f"{match[1]}{match[2]}{match[3]}{HIDDEN}" if _is_secret(match[2]) else match[0], text
    )
    parts, shown_to = [], 0
    for match in NAME.finditer(text):
        # `KEY` alone is a placeholder in our own messages, and a secret's name in a query only.
        alone = match[1].lower() == "key" and text[match.start() - 1 : match.start()] not in ("?", "&", ";")
        if match.start() >= shown_to and not alone and _is_secret(match[1]):
            end = next(VALUE.finditer(text, match.end())).end()  # which may be empty
            parts += [text[shown_to : match.end()], HIDDEN if end > match.end() else ""]
            shown_to = end
    return "".join([*parts, text[shown_to:]])


def _is_secret(name: str) -> bool:
    return any(word in WORDS or word.endswith(ENDINGS) for word in re.split(r"[^a-z0-9]", name.lower()))


def _decoded(part: str) -> str:
    plain = part
    for _ in range(LEVELS):
        plain = unquote(plain)
        if (shown := _redact(plain)) != plain:
            return shown
    return part
