"""Changes of form that several processes make together: one prepares a weight, all receive it.

Each process would find factors of its own: an SVD is not the same in bits with another number of
threads, and with equal singular values it is another one altogether, so that a mixture of two
processes' factors is no decomposition of anything. So each weight has one owner. The weights are
dealt in rounds of one a process, the most expensive first, so that a round takes about as long in
each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynarank.decompositions import LinAlgError, UnfitWeightError, precise
from dynarank.distributed.processes import DisagreementError, PeerError, Processes
from dynarank.forms import Adapted, Change, Form, FullRank, LowRank, same_weight
from dynarank.layers import own_parameters
from dynarank.surgery.edit import Edit, like_old
from dynarank.surgery.param_groups import Contents
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.sharded import WholeEdit, gathered, is_resharded
from dynarank.surgery.site import Site
from dynarank.surgery.unfit import UnfitLayers

__all__ = ["agree_on", "fit_everywhere", "prepare_together", "rounds", "send_states"]

_T = TypeVar("_T")
_Wanted = tuple[Site, Form]

# Replicas whose weights are this far apart (relative) were never averaged: rounding on unlike
# machines is far below, other initial weights or missing averages far above.
_APART = 1e-2


def agree_on(wanted: Sequence[_Wanted], how: Mapping[str, Any], together: Processes) -> None:
    """Check that all processes are about the same change of the same weights.

    Raises:
        DisagreementError: they are not; or a weight differs between replicas.
        PeerError: a process does not come.
    """
    if together.size == 1:
        return
    plan = {site.path: f"{site.form} -> {after}" for site, after in wanted}
    shapes = {site.path: list(site.shape) for site, _ in wanted}
    together.agree("the change of forms", {"plan": plan, "shapes": shapes, **how})
    prints = together.gather("the weights", [_fingerprint(site) for site, _ in wanted])
    for rank, found in enumerate(prints):
        for (site, _), here, there in zip(wanted, prints[0], found, strict=True):
            if (here is None) != (there is None):
                broken = 0 if here is None else rank
                raise DisagreementError(
                    f"layer {site.path!r} has weights that are not finite in process {broken}, but "
                    f"not in process {rank - broken}. Nothing has changed. Averaged gradients keep "
                    "replicas alike: look for what only this process does to its weights"
                )
            if here is None or there is None:
                continue
            if any(abs(a - b) > _APART * here[0] for a, b in zip(here, there, strict=True)):
                raise DisagreementError(
                    f"layer {site.path!r} has other weights in process {rank} than in process 0 "
                    f"(their norms and two sums are {_numbers(there)} and {_numbers(here)}). "
                    "Nothing has changed. Wrap the model before this (DistributedDataParallel "
                    "gives all processes the weights of process 0), or give all processes the same "
                    "seed; processes that train different models change them within "
                    "dynarank.distributed.independent()"
                )


def prepare_together(
    wanted: Sequence[_Wanted],
    prepare: Callable[[Site, Form], Edit | WholeEdit],
    optimizers: Sequence[Any],
    together: Processes,
) -> tuple[list[Edit], list[int]]:
    """The edits of these weights, the same in all processes, and who owns each.

    Args:
        wanted: the weights and their new forms.
        prepare: prepares one; a weight that is sharded is whole then.
        optimizers: those that train them.
        together: the processes.

    Raises:
        UnfitWeightError: weights are unfit, in all processes for the same ones.
        PeerError: the owner of a weight could not prepare it; there, what it raised.
    """
    unfit, made = UnfitLayers(), dict[str, tuple[Edit, int]]()
    for dealt in rounds(wanted, together.size):
        own = next((pair for rank, pair in enumerate(dealt) if rank == together.rank), None)
        with ExitStack() as held:
            for rank, (site, after) in enumerate(dealt):
                if is_resharded(site, after):
                    held.enter_context(gathered(site, optimizers, together.global_rank(rank)))
            found = _Outcome.of(own, prepare)
        for rank, one in enumerate(found.exchanged(together)[: len(dealt)]):
            site, after = dealt[rank]
            if one.unfit:
                unfit.reasons[site.path] = one.unfit
                continue
            edit = found.made if rank == together.rank else one.received(site, after)
            found.made = None if rank == together.rank else found.made  # whole no longer
            if isinstance(edit, WholeEdit):
                edit = edit.in_shards(optimizers, together.global_rank(rank))
            else:
                assert edit is not None
                together.send(_sent(edit), rank)
            made[site.path] = edit, rank
    unfit.check()
    edits = [made[site.path] for site, _ in wanted]
    return [edit for edit, _ in edits], [owner for _, owner in edits]


def rounds(wanted: Sequence[_Wanted], size: int) -> list[list[_Wanted]]:
    """The weights in rounds of one for each process, the most expensive first."""
    ordered = sorted(wanted, key=lambda pair: (-_work(*pair), pair[0].path))
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def send_states(
    edits: Sequence[Edit], owners: Sequence[int], contents: Contents, together: Processes
) -> None:
    """Give all processes the owners' optimizer states of the new parameters."""
    tables = [new for _, new in contents if isinstance(new, dict)]
    own = [(edit, who) for edit, who in zip(edits, owners, strict=True) if edit.shards is None]
    found = [_states(edit, tables) for edit, _ in own]  # those of shards came with the edit
    layouts = {
        edit.change.path: {key: f"{v.dtype} {list(v.shape)}" for key, v in states.items()}
        for (edit, _), states in zip(own, found, strict=True)
    }
    together.agree("the optimizer's states", layouts)  # or values would go astray
    for (_, owner), states in zip(own, found, strict=True):
        together.send(states.values(), owner)


def _states(edit: Edit, tables: Iterable[Mapping[Any, Any]]) -> dict[str, Tensor]:
    """The tensors in the states of an edit's new parameters."""
    found: dict[str, Tensor] = {}
    for table in tables:
        for name, p in edit.new.items():
            state: Any = table.get(p)
            for key in sorted(state, key=str) if state else ():
                if isinstance(state[key], Tensor):
                    found[f"{name}: {key}"] = state[key]
    return found


def fit_everywhere(what: str, function: Callable[[], _T], together: Processes) -> _T:
    """As ``together.attempt``, but layers that are unfit in one process are unfit in all.

    Raises:
        UnfitWeightError: with the layers of all processes.
    """
    if together.size == 1:
        return function()
    unfit, made = dict[str, str](), None

    def attempt() -> None:
        nonlocal made, unfit
        try:
            made = function()
        except (UnfitWeightError, LinAlgError) as error:
            unfit = dict(getattr(error, "layers", {})) or {"": str(error)}

    together.attempt(what, attempt)
    all_of_them: dict[str, str] = {}
    for one in together.gather(f"{what}: unfit layers", unfit):
        all_of_them = {**one, **all_of_them}
    if all_of_them:
        known = {path: why for path, why in all_of_them.items() if path}
        raise UnfitWeightError("; ".join(all_of_them.values()), known)
    return made  # pyright: ignore[reportReturnType]


@dataclass
class _Outcome:
    """What became of a process's weight in a round, told to all; the edit itself stays."""

    error: str = ""
    unfit: str = ""
    errors: tuple[float, float | None] = (0.0, None)
    shifted: bool = False
    bias_left: str = ""
    strides: tuple[tuple[int, ...], ...] = ()
    whole: Any = None  # what a WholeEdit tells
    made: Edit | WholeEdit | None = None
    raised: Exception | None = None

    @classmethod
    def of(cls, own: _Wanted | None, prepare: Callable[[Site, Form], Edit | WholeEdit]) -> _Outcome:
        if own is None:
            return cls()
        (site, after), unfit = own, UnfitLayers()
        try:
            with unfit.layer(site.path):
                made = prepare(site, after)
                edit, whole = (
                    (made.edit, made.told()) if isinstance(made, WholeEdit) else (made, None)
                )
                errors = edit.change.error, edit.change.update_error
                strides = tuple(p.stride() for p in edit.new.values())
                shifted = edit.shift is not None
                return cls("", "", errors, shifted, edit.bias_left, strides, whole, made)
        except Exception as error:
            return cls(error=f"{type(error).__name__}: {error}", raised=error)
        return cls(unfit=unfit.reasons[site.path])

    def exchanged(self, together: Processes) -> list[_Outcome]:
        """The outcomes of all processes; raises if one could not."""
        told = (
            self.error, self.unfit, self.errors, self.shifted, self.bias_left, self.strides,
            self.whole,
        )  # fmt: skip
        found = [_Outcome(*one) for one in together.gather("the prepared layers", told)]
        if self.raised is not None:
            raise self.raised
        if failed := [(rank, one.error) for rank, one in enumerate(found) if one.error]:
            raise PeerError(f"process {failed[0][0]} could not prepare a change: {failed[0][1]}")
        return found

    def received(self, site: Site, after: Form) -> Edit | WholeEdit:
        """The edit of another process, whose values are not here yet."""
        before, old = site.form, site.parameters()
        assert before is not None
        change = Change(site.path, before, after, *self.errors)
        if same_weight(before, after):
            return Edit(site, change, {}, {})
        if self.whole is not None:
            edit = Edit(site, change, old, {}, bias_left=self.bias_left)
            return WholeEdit.received(edit, self.whole)
        shapes, like = site.spec.parameter_shapes(after), next(iter(old.values()))
        values = {name: like.new_empty(shape) for name, shape in shapes.items()}
        if _keeps_base(before, after):
            values[next(iter(values))] = like.detach()
        values = {name: like_old(value, name, site, after) for name, value in values.items()}
        shift = own_parameters(site.module).get("bias") if self.shifted else None
        empty = None if shift is None else torch.empty_like(shift)
        new = new_parameters(site, values)
        for one, stride in zip(new.values(), self.strides, strict=True):
            if one.stride() != stride:  # which a shape may not tell: that of a 1 x 1 kernel
                like = one.data
                one.data = like.new_empty_strided(one.shape, stride).copy_(like)
        return Edit(site, change, old, new, empty, self.bias_left)


def _keeps_base(before: Form, after: Form) -> bool:
    """Whether the old weight itself is the new base, which every process has."""
    return isinstance(before, FullRank) and isinstance(after, Adapted)


def _sent(edit: Edit) -> Iterable[Tensor]:
    """The tensors of an edit that its owner sends."""
    kept = _keeps_base(edit.change.before, edit.change.after)
    values = edit.trained.values() if kept else edit.new.values()
    return [*values, *([] if edit.shift is None else [edit.shift])]


def _work(site: Site, after: Form) -> float:
    """About how many multiplications it takes to prepare a change: an SVD of an m x n weight m n^2.

    Only the order counts.
    """
    entries, rows = math.prod(site.shape), site.shape[0]
    cut = isinstance(after, LowRank) and site.form is not None
    return entries * (min(rows, entries // max(rows, 1)) if cut else 1)


def _fingerprint(site: Site) -> tuple[float, float, float] | None:
    """The norm of a weight's parameters, their sum and that of each third; None: it is not finite.

    Weights may be centered, so that their sum tells nothing.
    """
    if site.sharding is not None:  # each process has another part
        return 0.0, 0.0, 0.0
    values = [precise(p).flatten() for p in site.parameters().values()]
    norm = math.hypot(*(float(v.norm()) for v in values))
    total = sum(float(v.sum()) for v in values)
    part = sum(float(v[::3].sum()) for v in values)
    return (norm, total, part) if math.isfinite(norm + total + part) else None


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
