"""Tokens and numbers as a reader sees them."""

import math
import re
import unicodedata
from typing import Any

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡", "\xa0": "⍽"}

# What no encoding holds, and what XML does not hold beside it.
_LONE = re.compile("[\ud800-\udfff]")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def visible(token: str) -> str:
    """The token with white space, control and format characters as visible marks, which XML allows too."""
    if not token:
        return "∅"
    shown = "".join(_mark(character) for character in token)
    # A combining mark would otherwise sit on whatever stands before it.
    return "◌" + shown if unicodedata.combining(shown[0]) else shown


def running(token: str) -> str:
    """`visible` within a text: a dot for a token whose character a later one completes."""
    return visible(token) if token else "·"


def printed(token: str) -> str:
    """`visible` where lines may break and spaces are spaces."""
    return visible(token).replace("␣", " ").replace("⏎", "⏎\n")


def storable(value: Any, *, xml: bool = False) -> Any:
    """Strings, also in lists, tuples and values of dicts, with U+FFFD for what UTF-8, or XML, cannot hold."""
    if isinstance(value, str):
        return (_NOT_XML if xml else _LONE).sub("\ufffd", value)
    if isinstance(value, dict):
        return {key: storable(item, xml=xml) for key, item in value.items()}
    return [storable(item, xml=xml) for item in value] if isinstance(value, (list, tuple)) else value


def number(value: float) -> str:
    """Signed, three significant digits, a real minus; "–" where there is no number."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "−∞" if value < 0 else "+∞"
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-3 <= size < 1e5:
        digits = f"{size:.2e}"
    else:
        digits = f"{size:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return ("−" if value < 0 else "+") + digits


def tick(value: float) -> str:
    """Signed, two significant digits, no trailing zeros: room beside an axis is short."""
    return f"{value:+.2g}".replace("-", "−") if value else "0"


def interval(low: float, high: float) -> str:
    """[low, high], or "–" if it is not known."""
    return "–" if math.isnan(low) or math.isnan(high) else f"[{number(low)}, {number(high)}]"


def probability(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _mark(character: str) -> str:
    if character in _MARKS:
        return _MARKS[character]
    category = unicodedata.category(character)
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    if category in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        return f"‹{ord(character):04X}›"
    return character
