"""Text from a file or a name, made safe to print: one line, no escape codes, bounded."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, limit: int = 200) -> str:
    r"""Show control characters, line breaks, bidi marks and the like as escapes; cut the middle.

    Args:
        text: what is to be printed.
        limit: the largest number of characters of the result.

    Example:
        >>> printable("red \x1b[31m and\nmore")
        'red \\x1b[31m and\\nmore'
        >>> printable("a" * 100, limit=9)
        'aaaa…aaaa'
    """
    return _cut("".join(map(_shown, _cut(text, limit))), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = max(limit - 1, 0) // 2
    head = max(limit - 1, 0) - tail
    return text[:head] + "…" + text[len(text) - tail :]


def _shown(character: str) -> str:
    # isprintable: neither control, format (bidi marks, zero width), surrogate nor unassigned.
    return character if character.isprintable() else ascii(character)[1:-1]
