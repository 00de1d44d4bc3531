"""The checks of a change while it can still be undone, and the warnings of what it loses."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.optim import Optimizer

from dynarank.layers import own_parameters
from dynarank.surgery.edit import Edit
from dynarank.surgery.optimizer_fit import entries_of, is_finite
from dynarank.surgery.problem import shape

__all__ = ["check_committed", "warn_of_losses"]

# The least share of an adapter's update that a merge warns of losing: restarts add up.
_LOST = 0.1
# The least share of the weight; fp32 loses no more than this.
_VISIBLE = 1e-6


def check_committed(edits: Sequence[Edit], optimizers: Sequence[Optimizer]) -> None:
    """Check that modules and optimizers have what ``edits`` gave them, and nothing from before.

    Each module has its new parameters; each that trains is in exactly one group; no old one is
    left; the tensors of their states have their shapes and are finite.

    Raises:
        RuntimeError: they do not.
    """
    held = Counter(id(p) for one in optimizers for g in one.param_groups for p in g["params"])
    for edit in edits:
        in_groups = _in_groups(edit, held) if optimizers else ()
        if faults := [*_in_modules(edit), *in_groups, *_in_states(edit, optimizers)]:
            raise RuntimeError(
                f"layer {edit.site.path!r}, {edit.change.before} -> {edit.change.after}: "
                f"{faults[0]}. Model and optimizer are as they were before; this is a bug, in "
                "dynarank or in the class of the layer or of the optimizer"
            )


def warn_of_losses(edits: Sequence[Edit]) -> None:
    """Warn of updates that rounding takes as they are merged, and of biases that stay."""
    lost = {
        edit.site.path: share
        for edit in edits
        if (share := edit.change.update_error or 0) > _LOST and edit.change.error > _VISIBLE
    }
    if lost:
        worst = max(lost, key=lambda path: lost[path])
        _warn(
            f"merging rounds away more than {_LOST:.0%} of what these adapters learned, most "
            f"({lost[worst]:.0%}) at {worst!r}: {', '.join(lost)}. The dtype of their weights "
            "cannot hold it: keep the adapters unmerged, or convert the model to fp32 first"
        )
    if left := {edit.site.path: edit.bias_left for edit in edits if edit.bias_left}:
        _warn(
            "activation-aware truncation does not move these biases to make up for the mean of "
            f"the outputs: {', '.join(f'{path} ({why})' for path, why in left.items())}"
        )


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=8)  # the caller of apply_plan and the like


def _in_modules(edit: Edit) -> Iterator[str]:
    for site in edit.site.places:
        own = own_parameters(site.module)
        if any(own.get(name) is not p for name, p in edit.new.items()):
            yield f"the module at {site.module_paths[0]!r} does not have its new parameters"


def _in_states(edit: Edit, optimizers: Sequence[Optimizer]) -> Iterator[str]:
    for name, p in edit.new.items():
        states = [one.state[p] for one in optimizers if p in one.state]
        for key, value in (item for state in states for item in entries_of(state)):
            if value.ndim > 0 and not _fits(value, p):
                yield f"{key} of {name} has shape {shape(value)}, not {shape(p)}"
            if value.ndim > 0 and not is_finite(value):
                yield f"{key} of {name} is not finite"


def _fits(value: Tensor, p: Tensor) -> bool:
    """Whether it has the parameter's shape, or sides of 1 (means of rows or columns)."""
    sides = zip(value.shape, p.shape, strict=False)
    return value.ndim == p.ndim and all(own in (1, side) for own, side in sides)


def _in_groups(edit: Edit, held: Counter[int]) -> Iterator[str]:
    for name, p in edit.new.items():
        count, trains = held[id(p)], not edit.site.spec.is_base(name)
        if count != trains and (count > 0 or p.requires_grad):
            yield f"{name} is in {count} groups of the optimizer"
    if any(held[id(p)] for p in edit.old.values()):
        yield "the optimizer still has its old parameters"
