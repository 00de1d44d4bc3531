"""HTML elements as strings: text is escaped, ``Html`` is passed through."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["Html", "details", "element", "safe", "table"]


class Html(str):
    """A string that is HTML already and is not escaped again."""

    __slots__ = ()


_LONG = 40  # letters of a cell
# Control characters, marks that change the direction of the text around them, lone surrogates.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def safe(content: str) -> Html:
    """Escape content, unless it is ``Html`` already; hidden characters are shown as escapes."""
    if isinstance(content, Html):
        return content
    return Html(html.escape(_HIDDEN.sub(lambda found: ascii(found[0])[1:-1], content)))


def element(tag: str, *content: str, **attributes: str) -> Html:
    """Build an element with its content; ``class_`` stands for ``class``."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{written}>{''.join(map(safe, content))}</{tag}>")


def details(summary: str, *content: str) -> Html:
    """Build a ``<details>`` block that opens when its summary is clicked."""
    return element("details", element("summary", summary), *content)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)
) -> Html:
    """Build a table in a container that scrolls when the page is narrow.

    Args:
        columns: the headings.
        rows: one cell per heading.
        text: the columns of text, aligned left; all others are numbers, aligned right.

    """
    kinds = ["text" if index in text else "number" for index in range(len(columns))]
    head = _row("th", columns, kinds, scope="col")
    body = [_row("td", map(_cell, row), kinds) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, class_="wide", tabindex="0", role="group", aria_label="Table")


def _cell(content: str) -> str:
    """A long name wraps; other cells do not."""
    if isinstance(content, Html) or len(content) <= _LONG:
        return content
    return element("span", content, class_="wrapped")


def _row(tag: str, cells: Iterable[str], kinds: Sequence[str], **attributes: str) -> Html:
    paired = zip(cells, kinds, strict=True)
    return element("tr", *(element(tag, cell, class_=kind, **attributes) for cell, kind in paired))
