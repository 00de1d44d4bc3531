"""The known name that is nearest to a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]

_CUTOFF = 0.5  # of difflib's ratio: 1 is equal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: a question, or nothing if none is near.

    Example:
        >>> did_you_mean("digit", ["digits", "imdb-lstm"])
        "; did you mean 'digits'?"
        >>> did_you_mean("DIGITS", ["digits"]), did_you_mean("x", ["digits"])
        ("; did you mean 'digits'?", '')
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, _CUTOFF)
    if not near:
        lower = {one.lower(): one for one in names}
        near = [lower[one] for one in difflib.get_close_matches(name.lower(), lower, 1, _CUTOFF)]
    return f"; did you mean {near[0]!r}?" if near else ""
