"""Pickling a rank scheduler: what of it cannot be pickled is named."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

__all__ = ["check_picklable"]


def check_picklable(ranks: object, attributes: Iterable[str]) -> None:
    """Raise TypeError for an attribute that pickle does not take, such as a local function."""
    for name in attributes:
        try:
            pickle.Pickler(_Nowhere()).dump(getattr(ranks, name))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise TypeError(
                f"the rank scheduler cannot be pickled, because its {name} cannot ({error}): a "
                "function must be defined at the top level of a module. Save ranks.state_dict() "
                "instead, and give it to RankScheduler(..., state=)"
            ) from error


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)
