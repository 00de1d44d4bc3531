"""A callback that notes the spectra of the layers that change form, before and after."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.training.harness.spectra import digits, spectra
from dynarank.forms import Change, Form, form_name
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.surgery.sites import Site


class Witness(Callback):
    """What changed, when, and the spectra before and after.

    Attributes:
        changes: a list of plain data, one entry a change of any number of layers.
        seconds: the time that looking took.
    """

    def __init__(self, changes: list[dict[str, Any]]) -> None:
        self.changes, self.seconds = changes, 0.0
        self._before: dict[str, Any] = {}

    def before_change(self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]) -> None:
        """Note the spectra."""
        self._before = self._look(ranks, [site.path for site, _ in wanted])

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Note the changes."""
        after = self._look(ranks, [change.path for change in changes])
        layers = {
            change.path: {
                "from": short(change.before), "to": short(change.after),
                "error": digits(change.error),
                "before": self._before.get(change.path), "after": after.get(change.path),
            }
            for change in changes
        }  # fmt: skip
        self.changes.append({"step": ranks.last_step, "layers": layers})

    def _look(self, ranks: Ranks, paths: list[str]) -> dict[str, Any]:
        begun = time.process_time()
        found = spectra(ranks.model, paths)
        self.seconds += time.process_time() - begun
        return found


def short(form: Form) -> str:
    """The form in a few words, such as "low-rank 16 svd"."""
    parts = [form_name(form), *(str(getattr(form, k, "")) for k in ("rank", "decomposition"))]
    return " ".join(parts).rstrip()
