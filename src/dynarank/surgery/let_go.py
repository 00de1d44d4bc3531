"""Containers that still hold parameters which a change replaced, one step later.

Who clips or averages the parameters in a list that was made before goes on with the old ones, and
nothing tells. A variable, an attribute or an autograd graph that holds one is left alone.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from dynarank.distributed.wrappers import live, thawed
from dynarank.surgery.left_behind import Replaced, replaced_of
from dynarank.surgery.own_references import groups_of, is_optimizer, wrapped
from dynarank.surgery.problem import listed

__all__ = ["check_let_go"]

_CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)


def check_let_go(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Raise RuntimeError if a container holds a parameter of this model that a change replaced.

    A list of what one of several groups of an optimizer was made of is warned of only: such lists
    are seldom used again.
    """
    if not replaced_of(model):
        return
    with thawed():
        gc.collect()
        used, spare = _found(replaced_of(model), optimizers)
    if used:
        raise RuntimeError(
            f"{_said(used)}: what is done with it would miss the new ones; make it again after "
            "each change, or ask model.parameters() each time; if nothing needs it, delete it"
        )
    if spare:
        said = f"{_said(spare)}, as a group of the optimizer did; make it again if it is used"
        warnings.warn(said, RuntimeWarning, stacklevel=4)


def _found(
    replaced: Sequence[Replaced], optimizers: Sequence[Any]
) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The containers by name, with the layers whose parameters they hold; then those of groups."""
    alive = [p for one in replaced if (p := one.old()) is not None]
    paths = {id(one.old()): one.path for one in replaced}
    used: dict[str, set[str]] = {}
    spare: dict[str, set[str]] = {}
    groups = _groups(optimizers, replaced)
    holders = gc.get_referrers(*alive) if alive else ()
    for holder in _of_users([h for h in holders if h is not alive and isinstance(h, _CONTAINERS)]):
        ids = _ids(holder)
        found = spare if len(groups) > 1 and _layers(ids, replaced) in groups else used
        found.setdefault(_name(holder), set()).update(paths[i] for i in ids if i in paths)
    return used, spare


def _said(found: Mapping[str, set[str]]) -> str:
    holder, paths = next(iter(found.items()))
    more = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
    return f"{holder}{more} still holds parameters of {listed(paths)} that a change replaced"


def _name(holder: Any) -> str:
    others = [one for one in live(Optimizer) if is_optimizer(one)]
    if any(holder is group["params"] for group in groups_of(others)):
        return "a group of another optimizer"
    if any(holder is one.state for one in others):
        return "the state of another optimizer"
    return f"a {type(holder).__name__} of {len(holder)}"


def _ids(holder: Any) -> set[int]:
    values = holder.values() if isinstance(holder, Mapping) else ()
    return {*map(id, holder), *map(id, values)}


def _groups(optimizers: Sequence[Any], replaced: Sequence[Replaced]) -> list[set[object]]:
    """What each group of the optimizers trains, see :func:`_layers`."""
    groups = groups_of([one for given in optimizers for one in wrapped(given)])
    return [_layers(map(id, group["params"]), replaced) for group in groups]


def _layers(ids: Iterable[int], replaced: Sequence[Replaced]) -> set[object]:
    """These parameters, those of a layer that changed as its path: the same before and after."""
    paths = {key: one.path for one in replaced for key in (id(one.old()), *one.new)}
    return {paths.get(key, key) for key in ids}


def _of_users(holders: list[Any]) -> list[Any]:
    """Without the containers of variables or of torch's compiler."""
    owners = _owners(holders)
    owners |= _owners([o for every in owners.values() for o in every if isinstance(o, dict)])
    return [one for one in holders if not _is_spared(one, owners)]


def _owners(things: list[Any]) -> dict[int, list[Any]]:
    """What refers to each of these, by its id, all found at once."""
    found: dict[int, list[Any]] = {id(one): [] for one in things}
    for owner in gc.get_referrers(*things) if things else ():
        for key in {id(one) for one in gc.get_referents(owner)} & found.keys():
            found[key].append(owner)
    return found


def _is_spared(holder: Any, owners: Mapping[int, list[Any]]) -> bool:
    """Whether it is no container of the user's, but one of variables or of torch's compiler."""
    own = owners[id(holder)]
    if isinstance(holder, dict) and ("__builtins__" in holder or _attributes_of(holder, own)):
        return True  # the variables of a module, or the attributes of an object
    dicts = [one for one in own if isinstance(one, dict)]
    objects = [*own, *(o for one in dicts for o in _attributes_of(one, owners[id(one)]))]
    return any(_is_compilers(one) for one in objects)


def _attributes_of(table: object, owners: Iterable[Any]) -> list[Any]:
    """Those of the owners of a dict that have their attributes in it."""
    return [one for one in owners if getattr(one, "__dict__", None) is table]


def _is_compilers(owner: Any) -> bool:
    """Whether torch.compile has made it, of an optimizer's step: it goes on with a new one."""
    kind = type(owner)
    if issubclass(kind, nn.Module):
        return issubclass(kind, GraphModule)
    return kind.__module__.startswith(("torch._guards", "torch._dynamo", "torch._functorch"))
