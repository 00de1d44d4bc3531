"""The transaction of a change of form: which weights change, and all that changes with them.

Compute and verify the new weights, compute the optimizer's groups and states, commit by moving
references, check. An exception anywhere leaves model and optimizer exactly as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeAlias
from uuid import uuid4

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import Processes
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, Plan, same_weight
from dynarank.surgery.average_edits import average_edits
from dynarank.surgery.committed import check_committed, warn_of_losses
from dynarank.surgery.edit import Edit, prepare_edit
from dynarank.surgery.gradients import move_gradients
from dynarank.surgery.left_behind import watch_replaced
from dynarank.surgery.optimizer_state import Moments, Optimizers, as_list, new_contents, write
from dynarank.surgery.param_groups import Contents
from dynarank.surgery.replaced import keep_replaced
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sharded import (
    WholeEdit,
    check_gatherable,
    is_resharded,
    prepare_whole,
    states_in_shards,
)
from dynarank.surgery.shared_edits import (
    agree_on,
    fit_everywhere,
    prepare_together,
    send_states,
)
from dynarank.surgery.sites import Site, survey
from dynarank.surgery.unfit import UnfitLayers
from dynarank.surgery.unfollowed import check_updates
from dynarank.surgery.wrappers import check_unwrapped, rebuild_wrappers, wrappers_that_follow

__all__ = ["Averages", "change_forms", "differences", "truncates"]

Averages: TypeAlias = Callable[[], Sequence[nn.Module]] | None
_ALONE = Processes()


def differences(
    model: nn.Module, plan: Plan, sites: Sequence[Site] | None = None
) -> list[tuple[Site, Form]]:
    """The weights whose form differs from the plan's, and the plan's form, its rank resolved.

    ``sites``: the result of a survey, if there was one. Raises as :func:`dynarank.apply_plan` does.
    """
    for path, form in plan.items():
        if not isinstance(path, str) or not isinstance(form, FullRank | LowRank | Adapted):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"a plan maps paths (str) to forms, got {path!r}: {form!r}")
    check_unwrapped(model)
    sites = survey(model) if sites is None else sites
    named: dict[int, tuple[str, Form]] = {}
    wanted: list[tuple[Site, Form]] = []
    for path, site in find_sites(model, sites, plan).items():
        try:
            after = site.spec.resolve(plan[path])
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
        other, form = named.setdefault(id(site), (path, after))
        if form != after:
            raise ValueError(f"{other!r} and {path!r} are one weight with two forms")
        if after != site.form and other == path:
            wanted.append((site, after))
    return wanted


def truncates(wanted: Sequence[tuple[Site, Form]]) -> bool:
    """Whether one of these changes truncates a weight, which is what a calibration is for."""
    return any(
        isinstance(after, LowRank) and site.form is not None and not same_weight(site.form, after)
        for site, after in wanted
    )


def change_forms(
    wanted: Sequence[tuple[Site, Form]],
    optimizer: Optimizers = None,
    moments: Moments = "project",
    calibration: Mapping[str, ActivationStats] | None = None,
    *,
    prepared: Sequence[Edit] = (),
    seed: int | None = None,
    keep: bool = False,
    undo: ExitStack | None = None,
    together: Processes = _ALONE,
    averages: Averages = None,
) -> list[Change]:
    """Give weights the forms that :func:`differences` found; raises as ``apply_plan``.

    Args:
        wanted: the weights and their new forms.
        optimizer: as of :func:`dynarank.apply_plan`, whose are the next two as well.
        moments: their policy.
        calibration: the activation statistics.
        prepared: changes of other weights, to be made with these.
        seed: of new adapters; None: ``torch.initial_seed()``.
        keep: whether what is replaced is kept until the next optimizer step, to return exactly.
        undo: the caller's stack, which takes the change back unless it is emptied.
        together: the processes that make the change together, all of which must call this.
        averages: returns the copies of the model that follow it; None in all processes or in none.
    """
    optimizers = as_list(optimizer)
    how = {
        "moments": moments if isinstance(moments, str) else type(moments).__name__,
        "states": states_in_shards(wanted, optimizers),
    }
    agree_on(wanted, how, together)
    due = [*((edit.site, edit.change.after) for edit in prepared), *wanted]

    def ready() -> list[DistributedDataParallel]:
        check_gatherable(due, moments, together.members)
        return wrappers_that_follow([site for site, _ in due])

    wrappers = fit_everywhere("a change of forms", ready, together)
    with torch.inference_mode(False):  # parameters made in inference mode could never train

        def prepare(site: Site, form: Form) -> Edit | WholeEdit:
            activity = (calibration or {}).get(site.path)
            if is_resharded(site, form):
                return prepare_whole(site, form, optimizers, moments, activity, seed)
            return prepare_edit(site, form, activity, seed)

        edits, owners = _prepared(wanted, prepare, optimizers, together)
        edits = [*prepared, *(replace(edit, made_by=uuid4().hex) for edit in edits)]
        contents = fit_everywhere(
            "the optimizer's states", lambda: new_contents(edits, optimizers, moments), together
        )
        send_states(edits[len(prepared) :], owners, contents, together)
        fit_everywhere("the gradients", lambda: _move_gradients(edits), together)
        followers = _followers(edits, averages, calibration, together)
    together.attempt("a change of forms", lambda: warn_of_losses(edits))  # a filter may raise it
    wrappers = wrappers if any(edit.old for edit in edits) else []
    with ExitStack() as own:
        stack = own if undo is None else undo
        stack.callback(rebuild_wrappers, wrappers, None)  # called last
        if keep:
            keep_replaced(edits, optimizers, stack)
        commit = lambda: _commit(edits, followers, contents, optimizers, stack)  # noqa: E731
        together.attempt("a change of forms", commit)
        together.attempt("rebuilding the wrapper", lambda: rebuild_wrappers(wrappers, stack))
        own.pop_all()  # all is well: nothing to undo
    watch_replaced([*edits, *followers])
    check_updates()
    return [edit.change for edit in edits]


def _prepared(
    wanted: Sequence[tuple[Site, Form]],
    prepare: Callable[[Site, Form], Edit | WholeEdit],
    optimizers: Sequence[Any],
    together: Processes,
) -> tuple[list[Edit], list[int]]:
    """The edits, and the number of the process that owns each."""
    if together.size > 1 or any(is_resharded(site, form) for site, form in wanted):
        return prepare_together(wanted, prepare, optimizers, together)
    unfit, edits = UnfitLayers(), list[Edit]()
    for site, form in wanted:
        with unfit.layer(site.path):
            edit = prepare(site, form)
            assert isinstance(edit, Edit)
            edits.append(edit)
    unfit.check()
    return edits, [0] * len(edits)


def _followers(
    edits: Sequence[Edit],
    averages: Averages,
    calibration: Mapping[str, ActivationStats] | None,
    together: Processes,
) -> list[Edit]:
    """The edits of the averages, which each process has of its own, or none."""
    if averages is None:
        return []
    own = lambda: average_edits(edits, averages(), calibration)  # noqa: E731
    return fit_everywhere("the averages", own, together)


def _move_gradients(edits: Sequence[Edit]) -> None:
    unfit = UnfitLayers()
    for edit in edits:
        with unfit.layer(edit.site.path):
            move_gradients(edit)
    unfit.check()


def _commit(
    edits: Sequence[Edit],
    followers: Sequence[Edit],
    contents: Contents,
    optimizers: Sequence[Any],
    undo: ExitStack,
) -> None:
    for edit in (*edits, *followers):
        edit.commit(undo)
    write(contents, undo)
    check_committed(edits, optimizers)
