"""Changes of form that could not be made: each is tried again after 1, 2, 4, ... steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dynarank.decompositions import UnfitWeightError
from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import Processes
from dynarank.form_data import request_from_data, request_to_data
from dynarank.forms import Change, Form, Request, Within
from dynarank.surgery.optimizer_state import Moments, Optimizers
from dynarank.surgery.sites import Site
from dynarank.surgery.transaction import Averages, change_forms

__all__ = ["Postponed", "Waiting", "change_fit_layers"]

Wanted = Sequence[tuple[Site, Form]]

# The longest wait, in steps. A try costs at most as much as a few training steps (for a weight that
# is not finite, one pass over it), so one in 64 steps costs a few percent. In a shorter run a
# layer waits for no more than 1% of it, but at least 8 steps.
LONGEST, SHARE, SHORTEST = 64, 0.01, 8


@dataclass(frozen=True)
class Waiting:
    """A layer whose change is postponed: its form, what it waits for, and the next try.

    It waits for a form, or for a budget that could not be measured.
    """

    before: Form
    after: Form | Within
    patience: int  # steps between the last try and the next
    retry_at: int

    def to_data(self) -> dict[str, Any]:
        """It as plain data, for JSON."""
        forms = request_to_data({"before": self.before, "after": self.after})
        return {**forms, "patience": self.patience, "retry_at": self.retry_at}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Waiting:
        """The inverse of :meth:`to_data`."""
        forms = request_from_data({key: data[key] for key in ("before", "after")})
        values: dict[str, Any] = {**data, **forms}
        return cls(**values)


class Postponed:
    """The layers whose change of form is postponed, each with its own patience.

    Args:
        total_steps: of the run; the longest wait is 1% of it, within 8 and 64 steps. At the last
            step each change is tried once more.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.longest = min(LONGEST, max(SHORTEST, int(SHARE * total_steps)))
        self.layers: dict[str, Waiting] = {}

    def due_at(self, step: int) -> bool:
        """Whether a change is tried again at this step."""
        return any(self._is_due(one, step) for one in self.layers.values())

    def _is_due(self, one: Waiting, step: int) -> bool:
        return step >= one.retry_at or step == self.total_steps

    def budgets(self, step: int) -> dict[str, bool]:
        """The layers that wait for a budget to be measured, and whether that is tried now."""
        waiting = self.layers.items()
        return {p: self._is_due(w, step) for p, w in waiting if isinstance(w.after, Within)}

    def due(self, wanted: Wanted, request: Request, step: int) -> list[tuple[Site, Form]]:
        """The wanted changes that are tried at this step; those not wanted anymore are forgotten.

        A layer that is to get another form than the one it waits for is tried at once.
        """
        budgets = {path: one for path, one in request.items() if isinstance(one, Within)}
        asked = {site.path: form for site, form in wanted} | budgets
        self.layers = {p: one for p, one in self.layers.items() if asked.get(p) == one.after}
        waiting = {p for p, one in self.layers.items() if not self._is_due(one, step)}
        return [(site, form) for site, form in wanted if site.path not in waiting]

    def record(
        self, tried: Sequence[tuple[Site, Form | Within]], unfit: Iterable[str], step: int
    ) -> None:
        """Keep the layers that were unfit with twice their patience; forget the others."""
        unfit, layers = set(unfit), dict(self.layers)
        for site, after in tried:
            last = layers.pop(site.path, None)
            if site.path in unfit and site.form is not None:
                patience = min(2 * last.patience, self.longest) if last else 1
                layers[site.path] = Waiting(site.form, after, patience, step + patience)
        self.layers = layers

    def warning(self, unfit: Mapping[str, str], step: int) -> str:
        """What to say of the layers that were unfit, with the reasons: by the next try."""
        if step == self.total_steps:
            return f"step {step}: the run ends with changes never made: " + "; ".join(
                f"{reason} (it stays {self.layers[path].before})" for path, reason in unfit.items()
            )
        waits = sorted({self.layers[path].patience for path in unfit})
        said = (
            f"next try in {wait} steps: "
            + "; ".join(why for path, why in unfit.items() if self.layers[path].patience == wait)
            for wait in waits
        )
        return f"step {step}: no change of form now, " + "; ".join(said)


def change_fit_layers(
    wanted: Wanted,
    optimizer: Optimizers,
    moments: Moments,
    calibration: Mapping[str, ActivationStats] | None = None,
    *,
    seed: int | None = None,
    keep: bool = False,
    undo: ExitStack | None = None,
    together: Processes,
    averages: Averages = None,
) -> tuple[list[Change], dict[str, str]]:
    """Change the layers that can be changed; also the reasons why the others cannot, by path.

    The arguments are those of :func:`change_forms`.
    """
    unfit: dict[str, str] = {}
    while left := [(site, form) for site, form in wanted if site.path not in unfit]:
        try:
            how: dict[str, Any] = {"seed": seed, "keep": keep, "undo": undo, "together": together}
            how["averages"] = averages
            return change_forms(left, optimizer, moments, calibration, **how), unfit
        except UnfitWeightError as error:
            paths = [site.path for site, _ in left]
            known = {path: why for path, why in error.layers.items() if path in paths}
            unfit |= known or dict.fromkeys(paths, str(error))
    return [], unfit
