"""Docstrings as the site shows them: examples with ``>>>``, and names that lead to their page."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Reads ``Example:`` as a section of examples, and roles as links."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change one object's docstring before it is parsed."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda match: link(match, obj), text)


def link(match: re.Match[str], obj: griffe.Object) -> str:
    """A link to the name's entry, if the site has one; else the name alone."""
    short, name = match[1], match[2]
    try:
        target = name if name.startswith("dynarank.") else obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{target}" optional>`{shown}`</autoref>'
