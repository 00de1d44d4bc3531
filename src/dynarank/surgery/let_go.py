"""Containers that still hold parameters which a change replaced, one step later.

Who clips or averages the parameters in a list that was made before goes on with the old ones, and
nothing tells. A variable, an attribute or an autograd graph that holds one is left alone.
"""

from __future__ import annotations

import gc
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from dynarank.distributed.wrappers import live, thawed
from dynarank.surgery.left_behind import Replaced, replaced_of
from dynarank.surgery.own_references import groups_of, is_optimizer, wrapped
from dynarank.surgery.problem import listed

__all__ = ["check_let_go"]

_OTHER, _EXPORTED = "another optimizer", "an exported program"
_WAY = (
    "make it again after each change, or ask model.parameters() each time; if nothing needs it, "
    "delete it"
)
_WAYS = {
    _OTHER: "if it is of an earlier run, delete it (del optimizer) and the LR schedulers made of "
    "it; if it trains, give it to the RankScheduler too",
    _EXPORTED: "it shares the others with the model, so it would compute with a mixture; delete "
    "it, and export again, or export copy.deepcopy(model), which stays as it is",
}
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
        said, used = _told(replaced_of(model), optimizers)
    if used:
        way = next((way for what, way in _WAYS.items() if what in said), _WAY)
        raise RuntimeError(f"{said}: what is done with it would miss the new ones; {way}")
    if said:
        said += ", as a group of the optimizer did; make it again if it is used"
        warnings.warn(said, RuntimeWarning, stacklevel=4)


def _told(replaced: Sequence[Replaced], optimizers: Sequence[Any]) -> tuple[str, bool]:
    """What is to be said, and whether it is an error; a traceback of it keeps no holder alive."""
    used, spare = _found(replaced, optimizers)
    return (_said(used or spare) if used or spare else ""), bool(used)


def _found(
    replaced: Sequence[Replaced], optimizers: Sequence[Any]
) -> tuple[list[tuple[Any, set[str]]], list[tuple[Any, set[str]]]]:
    """The containers, each with the layers whose parameters it holds; then those of groups."""
    alive = [p for one in replaced if (p := one.old()) is not None]
    paths = {id(one.old()): one.path for one in replaced}
    used: list[tuple[Any, set[str]]] = []
    spare: list[tuple[Any, set[str]]] = []
    groups = _groups(optimizers, replaced)
    holders = gc.get_referrers(*alive) if alive else ()
    for holder in _of_users([h for h in holders if h is not alive and isinstance(h, _CONTAINERS)]):
        ids = _ids(holder)
        found = spare if len(groups) > 1 and _layers(ids, replaced) in groups else used
        found.append((holder, {paths[i] for i in ids if i in paths}))
    return used, spare


def _said(found: Sequence[tuple[Any, set[str]]]) -> str:
    more = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
    paths = set[str]().union(*(own for _, own in found))
    held = f"still holds parameters of {listed(paths)} that a change replaced"
    return f"{_name(found[0][0])}{more} {held}"


def _name(holder: Any) -> str:
    for one in filter(is_optimizer, live(Optimizer)):
        if any(holder is group["params"] for group in one.param_groups):
            return f"a group of {_OTHER} ({type(one).__name__})"
        if holder is one.state:
            return f"the state of {_OTHER} ({type(one).__name__})"
    name, owner = f"a {type(holder).__name__} of {len(holder)}", _owner(holder)
    if type(owner).__module__.startswith("torch.export") or _is_in_a_graph(owner):
        return f"{_EXPORTED} ({type(owner).__name__})"
    if owner is None:
        return name
    return (
        f"{name} ({next(k for k, v in vars(owner).items() if v is holder)!r} of {_said_of(owner)})"
    )


def _owner(holder: Any) -> Any:
    """The object or module that has a container as an attribute or a variable, if any."""
    around = gc.get_referrers(holder)
    tables = [one for one in around if isinstance(one, dict)]
    for one in [*around, *(gc.get_referrers(*tables) if tables else ())]:
        if any(value is holder for value in [*getattr(one, "__dict__", {}).values()]):
            return one
    return None


def _is_in_a_graph(owner: Any) -> bool:
    graphs = live(GraphModule) if isinstance(owner, nn.Module) else []
    return any(owner is module for graph in graphs for module in graph.modules())


def _said_of(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else type(owner).__name__


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
