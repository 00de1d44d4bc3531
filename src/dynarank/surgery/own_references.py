"""Optimizers that keep parameters, or values for them, outside of groups and state.

Some wrap another optimizer (SAM, Lookahead, accelerate): it changes with them. Some keep a list of
their own (LBFGS): a list of a group's parameters, or of all, follows them. Anything else would
leave the changed layers untrained or mixed up with old values, so it is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from dynarank.surgery.edit import Edit
from dynarank.surgery.param_groups import Contents, Group

__all__ = [
    "follow",
    "groups_of",
    "inner_optimizer",
    "innermost",
    "is_optimizer",
    "takes_hooks",
    "wrapped",
]

_CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)
_SHARDED = "ZeroRedundancyOptimizer"


def is_optimizer(value: object) -> bool:
    """Whether it has parameter groups and state, as torch's optimizers have."""
    return hasattr(value, "param_groups") and hasattr(value, "state")


def wrapped(optimizer: Any) -> list[Any]:
    """The optimizer and those that it wraps, each once.

    Example:
        >>> wrapper = torch.optim.SGD([torch.ones(1)])
        >>> wrapper.base_optimizer = torch.optim.Adam(wrapper.param_groups)
        >>> [type(one).__name__ for one in wrapped(wrapper)]
        ['SGD', 'Adam']
    """
    found = [optimizer]
    for one in found:  # grows meanwhile
        for value in _kept(one).values():
            inside = value if isinstance(value, list | tuple) else [value]
            found += [v for v in inside if is_optimizer(v) and not any(v is f for f in found)]
    return found


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer whose state a wrapper's is: that in its ``optimizer`` (accelerate's, say).

    Or the only one in it, if the wrapper is one of torch's that takes no hooks itself.
    """
    seen = {id(optimizer)}
    while (inner := _inside(optimizer)) is not None and id(inner) not in seen:
        optimizer = inner
        seen.add(id(inner))
    return optimizer


def _inside(optimizer: Any) -> Any:
    if (named := getattr(optimizer, "optimizer", None)) is not None or takes_hooks(optimizer):
        return named
    torchs = isinstance(optimizer, Optimizer) and len(innermost(optimizer)) == 1
    return next(iter(wrapped(optimizer)[1:]), None) if torchs else None


def takes_hooks(optimizer: Any) -> bool:
    """Whether torch's hooks can be put on it: not if it has skipped ``Optimizer.__init__``."""
    if isinstance(optimizer, Optimizer):
        return hasattr(optimizer, "_optimizer_step_post_hooks")
    return hasattr(optimizer, "register_step_post_hook")


def innermost(optimizer: Any) -> list[Any]:
    """Those that take the steps: the optimizers within it that wrap no other."""
    return [one for one in wrapped(optimizer) if len(wrapped(one)) == 1]


def groups_of(optimizers: Sequence[Any]) -> list[Group]:
    """The groups of an optimizer and those it wraps; they often share them."""
    return list({id(group): group for one in optimizers for group in one.param_groups}.values())


def follow(optimizers: Sequence[Any], edits: Sequence[Edit], regrouped: Contents) -> Contents:
    """What the own lists of an optimizer (and of those it wraps) are to hold.

    Args:
        optimizers: from :func:`wrapped`.
        edits: the changes of their layers.
        regrouped: from :func:`~dynarank.surgery.param_groups.regroup`.

    Raises:
        ValueError: an attribute holds parameters that change, or values for them, which cannot
            follow.
    """
    olds = {id(p): p for edit in edits for p in edit.old.values()}
    if not olds:
        return []
    lists, contents = _Lists(optimizers, regrouped), Contents()
    for one in optimizers:
        if _SHARDED in (kind.__name__ for kind in type(one).__mro__):
            raise ValueError(
                f"{type(one).__name__} deals its parameters to processes by tables that cannot "
                "follow a change of form; shard the model by fully_shard (FSDP2), which shards "
                "optimizer states too, or use a plain optimizer"
            )
        if isinstance(one, LBFGS):  # it counts all entries once
            contents.append((vars(one), {**vars(one), "_numel_cache": None}))
        for name, value in _kept(one).items():
            for holder, items in _holders(value, lists.known):
                if any(id(item) in olds or (type(item) is int and item in olds) for item in items):
                    if (new := lists.after(holder)) is None:
                        raise _refusal(one, name, "parameters of layers that change")
                    contents.append((holder, new))
                elif any(lists.is_value_for(item, olds.values()) for item in items):
                    raise _refusal(one, name, "values for the parameters of layers that change")
        if not isinstance(one, LBFGS) and lists.has_whole_vector(one, olds):
            raise _refusal(one, "state", "vectors of all parameters")
    return contents


class _Lists:
    """The parameters of each group, and of all of them, before and after a change."""

    def __init__(self, optimizers: Sequence[Any], regrouped: Contents) -> None:
        written, groups = {id(table): new for table, new in regrouped}, groups_of(optimizers)
        before = [g["params"] for g in groups]
        after = [written.get(id(g["params"]), written.get(id(g), g)) for g in groups]
        after = [new["params"] if isinstance(new, dict) else new for new in after]
        self._before = [[*map(id, one)] for one in (*before, chain(*before))]
        self._after = [*after, [*chain(*after)]]
        self._held = {id(p): p.numel() for one in before for p in one}
        self._entries = sum(self._held.values())
        shared = *groups, *before, *(part for o in optimizers for part in (o.param_groups, o.state))
        self.known = set(map(id, shared))

    def after(self, holder: object) -> list[Any] | None:
        """What a list becomes that holds the parameters of a group or of all; else None."""
        if not isinstance(holder, list) or (now := [*map(id, holder)]) not in self._before:
            return None
        return list(self._after[self._before.index(now)])

    def is_value_for(self, item: object, olds: Iterable[Tensor]) -> bool:
        """Whether it has an entry for each of a parameter that changes, or of all of them."""
        if not isinstance(item, Tensor) or id(item) in self._held or item.numel() < 2:
            return False
        return item.numel() in (self._entries, *(old.numel() for old in olds))

    def has_whole_vector(self, optimizer: Any, olds: Mapping[int, Tensor]) -> bool:
        """Whether the state of a parameter that stays has an entry for each of all parameters."""
        return any(
            isinstance(item, Tensor) and item.numel() == self._entries != p.numel()
            for p, values in _state(optimizer)
            if isinstance(p, Tensor) and id(p) not in olds
            for _, items in _holders(values, self.known)
            for item in items
        )


def _kept(optimizer: Any) -> dict[str, Any]:
    """What an optimizer keeps: attributes, other entries of its groups, state of no parameter."""
    own: dict[str, Any] = getattr(optimizer, "__dict__", {})
    kept = {name: value for name, value in own.items() if not name.endswith("_hooks")}
    for i, group in enumerate(optimizer.param_groups):
        kept |= {f"param_groups[{i}][{k!r}]": v for k, v in group.items() if k != "params"}
    kept |= {f"state[{k!r}]": v for k, v in _state(optimizer) if not isinstance(k, Tensor)}
    return kept


def _state(optimizer: Any) -> list[tuple[Any, Any]]:
    return list(optimizer.state.items()) if isinstance(optimizer.state, Mapping) else []  # pyright: ignore


def _holders(value: Any, known: set[int]) -> Iterator[tuple[Any, list[Any]]]:
    """Each container within a value (or a tensor itself), and what it holds."""
    if isinstance(value, Tensor):
        yield None, [value]
    elif isinstance(value, _CONTAINERS) and id(value) not in known:
        known.add(id(value))
        items: list[Any] = [*value, *(value.values() if isinstance(value, Mapping) else ())]
        yield value, items
        for item in items:
            if not isinstance(item, Tensor):
                yield from _holders(item, known)


def _refusal(optimizer: Any, attribute: str, what: str) -> ValueError:
    return ValueError(
        f"{type(optimizer).__name__} holds {what} in its attribute {attribute!r}, which cannot "
        "follow a change of form (a list of a group's parameters could); change the form before "
        "you make this optimizer, or make a new one after and pass none to the change; a "
        "RankScheduler, which makes changes itself, needs an optimizer that keeps no such thing"
    )
