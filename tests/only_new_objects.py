"""Changes search what is made from now on only: what is loaded by now takes most of the time."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Leave what is there out of garbage collections, which many tests ask for, and of changes."""
    gc.collect()
    gc.freeze()


def search_only_new_objects() -> None:
    """Freeze, and let changes in this process take frozen objects for none."""
    freeze()
    gc.get_freeze_count = int
