"""Optimizers that were not passed to a change, and so go on with parameters that it replaced.

They would train what did not change, the biases say, and nothing else. Who holds a parameter cannot
be asked when it is replaced, but the next ``optimizer.step()`` can be: replaced parameters that are
still alive are remembered, weakly, and while there are any, every step looks for them in its
groups.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from dynarank.layers import RankedLayer, own_parameters
from dynarank.surgery.edit import Edit
from dynarank.surgery.optimizer_steps import unwatch_steps, watch_steps
from dynarank.surgery.own_references import is_optimizer

__all__ = ["live", "watch_replaced"]

# Of each replaced parameter: its layer's path, its module, and its weight's name in the module.
_REPLACED = WeakTensorKeyDictionary()


def watch_replaced(edits: Iterable[Edit]) -> None:
    """From now on, an optimizer that steps with the edits' old parameters is told so.

    Its step raises RuntimeError if the new parameters have gradients and no optimizer holds them;
    it warns if another one does.
    """
    for edit in edits:
        for old in edit.old.values():
            _REPLACED[old] = edit.site.path, ref(edit.site.module), edit.site.spec.name
    if _REPLACED:
        watch_steps(_check)


def live(*classes: type) -> list[Any]:
    """The objects of these classes (and subclasses) that are alive, half-made ones included."""
    found = gc.get_objects()
    kinds = {kind for kind in set(map(type, found)) if issubclass(kind, classes)}
    return [one for one in found if type(one) in kinds]


def _check(optimizer: Optimizer) -> None:
    """Raise RuntimeError if an optimizer is about to leave changed layers untrained."""
    if not _REPLACED:
        unwatch_steps(_check)
        return
    replaced = {id(p): entry for p, entry in _REPLACED.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    lost: dict[str, list[Parameter]] = {}
    for path, layer, name in (replaced[id(p)] for p in held if id(p) in replaced):
        if new := _missing(_current(layer, name), held):
            lost.setdefault(path, []).extend(new)
    if not lost:
        return
    listed = ", ".join(map(repr, [*lost][:5])) + (" and others" if len(lost) > 5 else "")
    others = [one for one in live(Optimizer) if is_optimizer(one)]
    held_at_all = [p for one in others for group in one.param_groups for p in group["params"]]
    said = f"this {type(optimizer).__name__} holds old parameters of {listed}, replaced by a change"
    if any(_missing(new, held_at_all) for new in lost.values()):
        raise RuntimeError(
            f"{said} that it was not passed to: it would leave these layers untrained; pass it to "
            "the function that changes forms (optimizer=), or make a new optimizer after the change"
        )
    said += "; their new parameters are in another optimizer"
    warnings.warn(said, RuntimeWarning, stacklevel=4)
    for p in held:
        _REPLACED.pop(p, None)


def _current(layer: ref[nn.Module], name: str) -> list[Parameter]:
    """The parameters that a weight has now, those that have gradients."""
    if (module := layer()) is None:
        return []
    names = module.resolved(name).names if isinstance(module, RankedLayer) else (name,)
    found = [own_parameters(module).get(one) for one in names]
    return [p for p in found if p is not None and p.grad is not None]


def _missing(parameters: Sequence[Parameter], held: Iterable[Parameter]) -> list[Parameter]:
    """Those of the parameters that are not held."""
    ids = {id(p) for p in held}
    return [p for p in parameters if id(p) not in ids]
