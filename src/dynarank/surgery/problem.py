"""One broken invariant of a training state: which, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Problem", "listed", "shape"]


class Problem(NamedTuple):
    """A broken invariant.

    Args:
        invariant: its number, ``"I1"`` to ``"I11"``, see :func:`dynarank.check`.
        where: the parameter, buffer, layer or object.
        text: what was found, the rule, and the way out.
    """

    invariant: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.where}: {self.text}"


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, to be shown."""
    return tuple(tensor.shape)


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many others there are."""
    found = sorted(names)
    more = f" and {len(found) - most} others" if len(found) > most else ""
    return ", ".join(map(repr, found[:most])) + more
