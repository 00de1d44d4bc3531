from __future__ import annotations

import pytest

from dynarank.files.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, é 漢字 🎉", "plain text, é 漢字 🎉"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\x00"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\u2028\u2029\x85\x9b", r"\u2028\u2029\x85\x9b"),
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_what_moves_the_cursor_is_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 20, 200])
def test_the_length_is_bounded(limit: int) -> None:
    for text in ("x" * 1000, "\x1b" * 1000, "\U000e0001" * 1000, "\ud800" * limit):
        shown = printable(text, limit)
        assert len(shown) <= max(limit, 1) and (shown.isprintable())
    assert printable("x" * limit, limit) == "x" * limit
