"""The functions that change the forms of a model's weights, and its optimizer, all or nothing.

Each surveys the model once, finds which weights get another form, and changes them in one
transaction (:mod:`dynarank.surgery.transaction`). An exception anywhere leaves model and optimizer
exactly as they were.

A model may be wrapped (DDP, ``torch.compile``, FSDP2). Where several processes train it, all of
them call the same function, see :mod:`dynarank.distributed.processes`.

Call them between ``optimizer.step()`` and the next forward pass. Gradients move with their weights,
so an unfinished accumulation goes on, see :mod:`dynarank.surgery.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal, TypeAlias, TypeVar

from torch import nn

from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import processes_of
from dynarank.distributed.unwrap import unwrapped
from dynarank.distributed.wrappers import one_scan
from dynarank.forms import (
    Adapted,
    AdaptedExecution,
    Change,
    Form,
    FullRank,
    LowRank,
    Plan,
    RankLike,
)
from dynarank.layers import RankedLayer
from dynarank.layers.own_forward import forward_obstacle
from dynarank.surgery.edit import restore_module_on_exit
from dynarank.surgery.loading import follow_loads, unfollow_loads
from dynarank.surgery.optimizer_signature import sign_states, unsign_states
from dynarank.surgery.optimizer_state import Moments, Optimizers, as_list
from dynarank.surgery.saving import warn_of_little
from dynarank.surgery.selection import (
    LayerFilter,
    RankMap,
    has_factors,
    rank_for,
    select,
)
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.transaction import change_forms, differences
from dynarank.surgery.wrappers import check_unwrapped

__all__ = ["apply_plan", "deflate", "factorize", "inflate", "merge"]

_Model = TypeVar("_Model", bound=nn.Module)
Wanted: TypeAlias = list[tuple[Site, Form]]


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: Optimizers = None,
    moments: Moments = "project",
    calibration: Mapping[str, ActivationStats] | None = None,
) -> list[Change]:
    """Bring ``model`` to ``plan``, in place; layers that the plan does not name stay as they are.

    Law: applying a plan twice equals applying it once; what does not change keeps its object.

    Args:
        model: any module, wrapped (DDP, ``torch.compile``) or not; its modules keep their identity,
            hooks and names, and paths are those without wrappers.
        plan: a form for each path.
        optimizer: the optimizer (or optimizers) of the model: new parameters take the places of
            the old ones, and their state moves with them. An optimizer that is not passed but
            holds old parameters raises RuntimeError in its next step.
        moments: ``"project"`` moves the optimizer's moments through the change, ``"reset"`` drops
            them. A :class:`GradientWindow` projects too, but takes second moments from the
            gradients it holds of the layer, if any. ``"calibrated"`` is the same under a
            :class:`RankScheduler`, which keeps gradients; here it projects. ``"prune"`` zeroes 90%
            of them where a new adapter replaces another, else projects.
        calibration: from :func:`dynarank.calibrate`: weights that become low-rank (by an SVD) keep
            the directions in which their outputs have energy, instead of their own largest, and
            their biases make up for the mean of the rest. A bias that is frozen or shared with
            another layer stays, with a warning.

    Returns:
        One change for each layer that changed form. If rounding takes more than 10% of an adapter's
        update as it is merged (``Change.update_error``), there is a warning.

    Raises:
        ValueError: a path does not exist or cannot change form, a rank is above the layer's limit,
            a trainable layer is in no optimizer, the model is already wrapped, or the calibration
            is of another model. Nothing has changed then.
        UnfitWeightError: a weight has gradient hooks, is not finite, cannot be decomposed, or
            overflows its dtype. Nothing has changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [str(change.after.rank) for change in apply_plan(model, {"0": LowRank(2)})]
        ['2']
    """
    return _bring(model, lambda core: differences(core, plan), optimizer, moments, calibration)


def factorize(
    model: _Model,
    rank: RankLike | RankMap,
    *,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    optimizer: Optimizers = None,
    moments: Moments = "project",
    calibration: Mapping[str, ActivationStats] | None = None,
) -> _Model:
    """Bring layers to ``LowRank(rank)``: ``W -> join(split(W, rank))``; returns the model.

    Args:
        model: changed in place.
        rank: an int, a share of the layer's own cost (a float in (0, 1]) or a :class:`Rank`; or one
            of these for each glob pattern of paths (``{"*.fc?": 0.25}``); the first match counts.
        layers: a filter ``(module, path) -> bool`` or glob patterns of paths. None: the layers that
            have or had factors; if there are none, every layer that gets cheaper, except
            embeddings, output layers and weights with a side below 16. ``print(dr.survey(model,
            rank))`` shows which, :mod:`dynarank.surgery.defaults` says why.
        decomposition: the decomposition's name.
        optimizer: see :func:`apply_plan`.
        moments: see :func:`apply_plan`.
        calibration: see :func:`apply_plan`.

    Raises:
        ValueError: as :func:`apply_plan`; or no layer is selected, a pattern matches none, or a
            selected layer cannot be handled correctly (parametrized, tied).

    Warns:
        UserWarning: no layers are named, and less than 5% of the model's weights is saved.

    Example:
        >>> factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)[0].up.shape
        torch.Size([8, 2])
    """

    def wanted(core: nn.Module) -> Wanted:
        every = survey(core)
        sites = select(every, layers, rank, decomposition)
        plan = {s.path: LowRank(rank_for(rank, s), decomposition) for s in sites}
        found = differences(core, plan, sites)
        if layers is None and not isinstance(rank, Mapping) and not has_factors(every):
            warn_of_little(every, [plan], stacklevel=6)
        return found

    _bring(model, wanted, optimizer, moments, calibration)
    return model


def inflate(
    model: _Model,
    *,
    layers: LayerFilter = None,
    optimizer: Optimizers = None,
    moments: Moments = "project",
) -> _Model:
    """Bring ranked layers to ``FullRank()``; the model's function is unchanged.

    Arguments, result and errors are those of :func:`factorize`.

    Example:
        >>> inflate(factorize(nn.Sequential(nn.Linear(8, 8)), rank=2))[0].weight.shape
        torch.Size([8, 8])
    """

    def wanted(core: nn.Module) -> Wanted:
        sites = select(survey(core), layers)
        return differences(core, {site.path: FullRank() for site in sites}, sites)

    _bring(model, wanted, optimizer, moments)
    return model


def deflate(
    model: _Model,
    rank: RankLike | RankMap | None = None,
    *,
    to: Literal["adapted", "low-rank"] = "adapted",
    layers: LayerFilter = None,
    decomposition: str | None = None,
    alpha: float = 16.0,
    execution: AdaptedExecution = "auto",
    optimizer: Optimizers = None,
    moments: Moments = "project",
    calibration: Mapping[str, ActivationStats] | None = None,
) -> _Model:
    """Bring layers down from full rank, in one of two ways; returns the model.

    ``to="adapted"``: freeze W and add a zero-output adapter; the function is unchanged and the cost
    of a step is hardly reduced. ``to="low-rank"``: truncate; the function changes by the energy cut
    off, and the cost is proportional to the rank.

    Args:
        model: changed in place.
        rank: as for :func:`factorize`; None: the rank each layer had when it last had factors.
        to: the form that layers get.
        layers: as for :func:`factorize`.
        decomposition: the decomposition's name; None: the one each layer last had, or ``"svd"``.
        alpha: the adapter's scale is ``alpha / rank``.
        execution: how the adapted form multiplies, see :class:`Adapted`.
        optimizer: see :func:`apply_plan`.
        moments: see :func:`apply_plan`.
        calibration: see :func:`apply_plan`; used with ``to="low-rank"`` only.

    Raises:
        ValueError: as :func:`factorize`; or ``rank`` is None and a layer never had factors.

    Example:
        >>> model = inflate(factorize(nn.Sequential(nn.Linear(8, 8)), rank=2))
        >>> deflate(model)[0].form.rank
        2
    """
    if to not in ("adapted", "low-rank"):
        raise ValueError(f'a model deflates to "adapted" or "low-rank", got {to!r}')

    def wanted(core: nn.Module) -> Wanted:
        sites = select(survey(core), layers, rank, decomposition or "svd")
        plan = {s.path: _deflated(s, rank, to, decomposition, alpha, execution) for s in sites}
        return differences(core, plan, sites)

    _bring(model, wanted, optimizer, moments, calibration)
    return model


def _deflated(
    site: Site,
    rank: RankLike | RankMap | None,
    to: str,
    decomposition: str | None,
    alpha: float,
    execution: AdaptedExecution,
) -> Form:
    """The form that a layer deflates to."""
    last = site.last_factored_form
    asked = last.rank if last and rank is None else rank
    if asked is None:
        raise ValueError(f"layer {site.path!r} never had factors to return to; give rank=")
    name = decomposition or (last.decomposition if last else "svd")
    how = rank_for(asked, site), name
    return LowRank(*how) if to == "low-rank" else Adapted(*how, alpha, execution)


def merge(model: _Model, *, optimizer: Optimizers = None, moments: Moments = "project") -> _Model:
    """Convert every ranked layer back to its plain module; the model's function is unchanged.

    ``W = base + scale * join(factors)``, trainable. A model without ranked layers is unchanged.

    Example:
        >>> type(merge(factorize(nn.Sequential(nn.Linear(8, 8)), rank=2))[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    with ExitStack() as undo:
        _bring(model, _factored_to_full, optimizer, moments, undo=undo)
        core = unwrapped(model)
        for module in core.modules():
            if isinstance(module, RankedLayer):
                restore_module_on_exit(module, undo)
                module.to_plain()
        undo.pop_all()
    unfollow_loads(core)
    unsign_states(core)
    return model


def _factored_to_full(core: nn.Module) -> Wanted:
    """Full rank for every weight with factors, of layers that can become plain ones."""
    for path, module in core.named_modules():
        if isinstance(module, RankedLayer) and (reason := forward_obstacle(module)):
            raise ValueError(f"layer {path!r} cannot become a plain layer: {reason}")
    sites = survey(core)
    plan = {
        site.path: FullRank()
        for site in sites
        if isinstance(site.module, RankedLayer) and site.module.has_factors(site.spec.name)
    }
    return differences(core, plan, sites)


def _bring(
    model: nn.Module,
    wanted: Callable[[nn.Module], Wanted],
    optimizer: Optimizers,
    moments: Moments,
    calibration: Mapping[str, ActivationStats] | None = None,
    undo: ExitStack | None = None,
) -> list[Change]:
    """Make the wanted changes of the model inside its wrappers, in all processes that train it."""
    check_unwrapped(model)
    core = unwrapped(model)
    optimizers = as_list(optimizer)
    with one_scan():
        together = processes_of(*core.modules(), training=bool(optimizers))
        found = together.attempt("a change of forms", lambda: wanted(core))
        how: dict[str, Any] = {"together": together, "undo": undo}
        changes = change_forms(found, optimizers or None, moments, calibration, **how)
    # From now on, states that are saved tell the forms, and those that are loaded bring them.
    follow_loads(core)
    sign_states(core, optimizers)
    return changes
