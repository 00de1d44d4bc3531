"""Output in any encoding: what it lacks is written in ASCII, and nothing fails for a character."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper

__all__ = ["any_encoding"]

_ASCII = {
    "±": "+-",
    "→": "->",
    "…": "...",
    "−": "-",
    "–": "-",
    "─": "-",
    "λ": "lambda",
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
}


@contextmanager
def any_encoding() -> Generator[None]:
    """Within, stdout and stderr take every text, even closed; names not in UTF-8 are escaped."""
    with ExitStack() as undo:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, undo.enter_context(open(os.devnull, "w", encoding="utf-8")))
                undo.callback(setattr, sys, name, None)
            else:
                undo.callback(setattr, sys, name, stream)
            if isinstance(stream, TextIOWrapper):
                undo.callback(_set_errors, stream, stream.errors)
                stream.reconfigure(errors="dynarank")
        yield


def _set_errors(stream: TextIOWrapper, errors: str | None) -> None:
    if not stream.closed:
        stream.reconfigure(errors=errors)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(one, ascii(one)[1:-1]) for one in text), error.end


codecs.register_error("dynarank", _in_ascii)
