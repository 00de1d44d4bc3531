"""The forms of layers as plain data, and a model brought back to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynarank.decompositions import UnfitWeightError
from dynarank.schedules.form_data import form_from_data, form_to_data
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import survey
from dynarank.surgery.verbs import apply_plan

__all__ = ["forms_to_data", "restore_forms"]


def forms_to_data(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """The form of each layer, and the last one with factors: a deflation returns to its rank."""
    sites = find_sites(model, survey(model), paths)
    forms = {path: site.form for path, site in sites.items()}
    last = {path: site.last_factored_form for path, site in sites.items()}
    return {
        "last_factored_forms": {path: form_to_data(form) for path, form in last.items() if form},
        "forms": {path: form_to_data(form) for path, form in forms.items() if form},
    }


def restore_forms(
    model: nn.Module, optimizers: Sequence[Optimizer], data: Mapping[str, Any]
) -> None:
    """The inverse of :func:`forms_to_data`; the weights are to be loaded afterwards.

    Values that are not finite are set to zero where they are in the way.
    """
    for key in ("last_factored_forms", "forms"):
        plan = {path: form_from_data(form) for path, form in data[key].items()}
        try:
            apply_plan(model, plan, optimizer=optimizers, moments="reset")
        except UnfitWeightError:
            for site in find_sites(model, survey(model), plan).values():
                for parameter in site.parameters().values():
                    parameter.data.nan_to_num_(0, 0, 0)
            apply_plan(model, plan, optimizer=optimizers, moments="reset")
