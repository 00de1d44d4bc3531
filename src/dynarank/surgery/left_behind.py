"""Optimizers that were not passed to a change, and so go on with parameters that it replaced.

They would train what did not change, the biases say, and nothing else. Who holds a parameter cannot
be asked when it is replaced, but the next ``optimizer.step()`` can be: replaced parameters that are
still alive are remembered, weakly, and while there are any, every step looks for them in its
groups.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, GeneratorType
from typing import Any
from weakref import ref

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from dynarank.distributed.wrappers import live, thawed
from dynarank.layers import RankedLayer, own_parameters
from dynarank.surgery.edit import Edit
from dynarank.surgery.optimizer_steps import unwatch_steps, watch_steps
from dynarank.surgery.own_references import groups_of, is_optimizer, wrapped
from dynarank.surgery.problem import Problem, shape
from dynarank.surgery.replaced import kept_parameters

__all__ = ["Replaced", "replaced_of", "replaced_problems", "watch_replaced"]

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


@dataclass(frozen=True)
class Replaced:
    """A parameter that a change replaced and that is still alive, and its layer's path."""

    old: ref[Parameter]
    path: str
    new: tuple[int, ...]  # the ids of the parameters that the weight has now


def replaced_of(model: nn.Module) -> list[Replaced]:
    """The replaced parameters of this model, but for those that are kept to return."""
    modules, spared = set(model.modules()), {id(p) for p in model.parameters()} | kept_parameters()
    return [
        Replaced(ref(old), path, tuple(map(id, _present(layer, name))))
        for old, (path, layer, name) in _REPLACED.items()
        if layer() in modules and id(old) not in spared
    ]


def replaced_problems(model: nn.Module, optimizers: Sequence[Any]) -> list[Problem]:
    """I9: parameters of this model that a change replaced, and that some container still holds.

    Who holds one in a local variable is not seen, nor an autograd graph: both end soon.

    Args:
        model: without its wrappers.
        optimizers: their groups and states are not said again.
    """
    modules = set(model.modules())
    mine = [(old, entry) for old, entry in _REPLACED.items() if entry[1]() in modules]
    if not mine:
        return []
    del mine[:]
    gc.collect()
    families = [wrapped(one) for one in optimizers]
    known = [g["params"] for family in families for g in groups_of(family)]
    known += [one.state for family in families for one in family]
    kept = kept_parameters()
    problems: list[Problem] = []
    for old, (path, module, name) in _REPLACED.items():
        if id(old) not in kept and module() in modules and (holders := _holders([old], known)):
            problems.append(
                Problem(
                    "I9",
                    path if name == "weight" else path.removesuffix(f".{name}") + f".{name}",
                    f"its parameter of shape {shape(old)} was replaced by a change, and is still "
                    f"held by {', '.join(holders)}, so its memory is not free: delete that",
                )
            )
    return problems


def _holders(parameters: list[Parameter], known: Sequence[object]) -> list[str]:
    """What holds the parameter in a list of one, apart from that list, frames and what is known."""
    found: list[str] = []
    with thawed():
        holders = gc.get_referrers(*parameters)
    for holder in holders:
        passing = isinstance(holder, FrameType | GeneratorType) or holder is parameters
        if passing or any(holder is one for one in known):
            continue
        if isinstance(holder, Mapping):
            key = next((repr(k) for k, v in holder.items() if v is parameters[0]), None)
            found.append(f"a dict, under {key}" if key else "a dict, as a key")
        elif isinstance(holder, list | tuple | set | frozenset):
            found.append(f"a {type(holder).__name__} of {len(holder)}")
        else:
            found.append(f"a {type(holder).__name__}")
    return found


def _check(optimizer: Optimizer) -> None:
    """Raise RuntimeError if an optimizer is about to leave changed layers untrained."""
    if not _REPLACED:
        unwatch_steps(_check)
        return
    replaced = {id(p): entry for p, entry in _REPLACED.items()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    lost: dict[str, list[Parameter]] = {}
    for path, layer, name in (replaced[id(p)] for p in held if id(p) in replaced):
        new = [p for p in _present(layer, name) if p.grad is not None]
        if new := _missing(new, held):
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


def _present(layer: ref[nn.Module], name: str) -> list[Parameter]:
    """The parameters that a weight has now."""
    if (module := layer()) is None:
        return []
    names = module.resolved(name).names if isinstance(module, RankedLayer) else (name,)
    found = [own_parameters(module).get(one) for one in names]
    return [p for p in found if p is not None]


def _missing(parameters: Sequence[Parameter], held: Iterable[Parameter]) -> list[Parameter]:
    """Those of the parameters that are not held."""
    ids = {id(p) for p in held}
    return [p for p in parameters if id(p) not in ids]
