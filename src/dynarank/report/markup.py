"""Small pieces of HTML. Text from records is escaped on its way in; only ``Html`` passes as is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["Html", "details", "element", "safe", "table"]


class Html(str):
    """A piece of finished HTML, as against text."""

    __slots__ = ()


def safe(content: str) -> Html:
    """Make content ready for a page: escape it, unless it is ``Html`` already."""
    return content if isinstance(content, Html) else Html(html.escape(content))


def element(tag: str, *content: str, **attributes: str) -> Html:
    """Write one element with its content; ``class_`` stands for ``class``."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{written}>{''.join(map(safe, content))}</{tag}>")


def details(summary: str, *content: str) -> Html:
    """Write a block that opens when its summary is clicked."""
    return element("details", element("summary", summary), *content)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[int] = (0,)
) -> Html:
    """Write a table in a container of its own that scrolls when the page is narrow.

    Args:
        columns: the headings.
        rows: cells, as many as headings.
        text: the columns which hold text and stand left; all others hold numbers and stand right.

    """
    kinds = ["text" if index in text else "number" for index in range(len(columns))]
    head = _row("th", columns, kinds, scope="col")
    body = [_row("td", row, kinds) for row in rows]
    inner = element("table", element("thead", head), element("tbody", *body))
    return element("div", inner, class_="wide", tabindex="0")


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str], **attributes: str) -> Html:
    paired = zip(cells, kinds, strict=True)
    return element("tr", *(element(tag, cell, class_=kind, **attributes) for cell, kind in paired))
