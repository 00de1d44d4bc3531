"""The structure of a saved run: its weights' forms, before or after their values are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dynarank.decompositions import UnfitWeightError
from dynarank.distributed.processes import processes_of
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, Plan
from dynarank.layers import RankedLayer
from dynarank.surgery.edit import Edit, restore_on_exit
from dynarank.surgery.optimizer_state import write
from dynarank.surgery.replaced import given_back, recall, returning_states
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.transaction import change_forms, differences

__all__ = ["restore_forms"]


def restore_forms(
    model: nn.Module,
    forms: Plan,
    last: Mapping[str, LowRank | Adapted] | None,
    optimizers: Sequence[Optimizer],
    undo: ExitStack,
) -> None:
    """Give weights the forms that they had in a saved run; ``undo`` can take it all back.

    A weight that had the form until a change since the last step gets exactly what it had, with its
    optimizer state. One whose parameters keep their names and shapes keeps them, with their state:
    values that were loaded before stay. The others are re-expressed and lose their state, and what
    is not finite becomes zero: their values are loaded afterwards.

    Args:
        model: the model.
        forms: the form of each weight, its rank a number.
        last: the form in which a weight last had factors, for those that ever had; None: as it is.
        optimizers: the model's optimizers.
        undo: a stack of what takes the changes back.

    Raises:
        ValueError: as :func:`dynarank.apply_plan`. Nothing has changed then.
    """
    together = processes_of(*model.modules(), training=bool(optimizers))
    exact, others, alike = list[Edit](), list[tuple[Site, Form]](), list[tuple[Site, Form]]()
    for site, after in differences(model, forms):
        if (edit := given_back(site, after, undo)) is not None:
            exact.append(edit)
        else:
            (alike if _same_parameters(site, after) else others).append((site, after))
    how: dict[str, Any] = {"prepared": exact, "undo": undo, "together": together}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what is lost is loaded again
        try:
            change_forms(others, optimizers, "reset", **how)
        except UnfitWeightError as error:
            for site in (site for site, _ in others if site.path in error.layers):
                _zero(site, undo)
            change_forms(others, optimizers, "reset", **how)
    for place in (place for site, _ in others for place in site.places):
        layer, name = place.module, place.spec.name
        if isinstance(layer, RankedLayer):  # made by no change: its values are loaded afterwards
            frozen, norms = layer.frozen_factors[name], layer.factor_norms.get(name, ())
            layer.set_form(name, layer.forms[name], frozen, norms)
    write(returning_states(exact), undo)
    recall(exact, undo)
    for site, after in alike:
        _relabel(site, after, undo)
    if last is not None:
        for path, site in find_sites(model, survey(model), forms).items():
            _remember(site, last.get(path), undo)


def _zero(site: Site, undo: ExitStack) -> None:
    for parameter in site.parameters().values():
        undo.callback(parameter.data.copy_, parameter.data.clone())
        parameter.data.zero_()


def _same_parameters(site: Site, after: Form) -> bool:
    """Whether the form has parameters of the same names and shapes."""
    before = site.form
    if isinstance(before, FullRank) or isinstance(after, FullRank) or before is None:
        return before == after
    return site.spec.same_parameters(before, after)


def _relabel(site: Site, after: Form, undo: ExitStack) -> None:
    """Record another form of the same parameters."""
    assert site.form is not None
    Edit(site, Change(site.path, site.form, after, 0.0), {}, {}).commit(undo)


def _remember(site: Site, last: LowRank | Adapted | None, undo: ExitStack) -> None:
    """Set the form in which the weight last had factors."""
    if last == site.last_factored_form:
        return
    if not all(isinstance(place.module, RankedLayer) for place in site.places):
        _relabel(site, FullRank(), undo)
    for place in site.places:
        layer, name = place.module, place.spec.name
        assert isinstance(layer, RankedLayer)
        restore_on_exit(layer.__dict__, undo)
        layer.remember(name, last)
