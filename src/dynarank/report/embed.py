"""What the page carries inside itself: style, scripts, data, and the policy that bars all else."""

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
    """The text of a file beside this one."""
    return files("dynarank.report").joinpath(name).read_text(encoding="utf-8")


def style() -> str:
    """The page's style sheet, the colors of both themes in front."""
    return f"{css_variables()}\n{packaged('page.css')}"


def script(name: str) -> Html:
    """A script of the package as an element."""
    return Html(f"<script>{packaged(name)}</script>")


def policy(scripts: Sequence[str]) -> str:
    """The content security policy: nothing from anywhere, and no script but these, by their hash.

    Example:
        >>> policy([])
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    """
    base = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    hashes = " ".join(f"'sha256-{_hash(packaged(name))}'" for name in scripts)
    return f"{base}; script-src {hashes}" if hashes else base


def data_block(name: str, data: Any) -> Html:
    """Data for a script: JSON in which no text can end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
