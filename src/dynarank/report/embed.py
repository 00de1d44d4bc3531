"""Embedded parts of the page: style, scripts, data, and the content security policy."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from dynarank.report.markup import Html
from dynarank.report.theme import css_variables

__all__ = ["data_block", "packaged", "policy", "script", "style"]


def packaged(name: str) -> str:
    """Read a data file of this package."""
    return files("dynarank.report").joinpath(name).read_text(encoding="utf-8")


def style() -> str:
    """The page's style sheet, preceded by the colors of both themes."""
    return f"{css_variables()}\n{packaged('page.css')}"


def script(name: str) -> Html:
    """A ``<script>`` element with a script of this package."""
    return Html(f"<script>{packaged(name)}</script>")


def policy(scripts: Sequence[str]) -> str:
    """The content security policy: no network, and only these scripts, allowed by hash.

    Example:
        >>> policy([])
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    """
    base = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    hashes = " ".join(f"'sha256-{_hash(packaged(name))}'" for name in scripts)
    return f"{base}; script-src {hashes}" if hashes else base


def data_block(name: str, data: Any) -> Html:
    """A JSON ``<script>`` element, escaped so that no text can close it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
