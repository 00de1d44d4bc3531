"""Changes search what is made from now on only: what is loaded by now takes most of the time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_FROZEN = gc.get_freeze_count


def freeze() -> None:
    """Leave what is there out of garbage collections, which many tests ask for, and of changes."""
    gc.collect()
    gc.freeze()


def search_only_new_objects() -> None:
    """Freeze, and let changes in this process take frozen objects for none."""
    freeze()
    gc.get_freeze_count = int


@contextmanager
def frozen_objects_too() -> Iterator[None]:
    """Changes look among frozen objects, as they do outside of tests."""
    before, gc.get_freeze_count = gc.get_freeze_count, _FROZEN
    try:
        yield
    finally:
        gc.get_freeze_count = before
