"""What a change of form replaced, kept until the next optimizer step: it can be taken back exactly.

A rank scheduler made on a model whose weights have been loaded already brings it to its first plan,
which may truncate them. If the saved position is loaded after that and says that a weight had the
form of before, the very parameters of before return, with their optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.forms import Change, Form, FullRank
from dynarank.layers import own_parameters
from dynarank.surgery.edit import Edit, like_old
from dynarank.surgery.exact_weights import kept
from dynarank.surgery.optimizer_steps import unwatch_steps, watch_steps
from dynarank.surgery.own_references import wrapped
from dynarank.surgery.param_groups import Contents
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.site import Site

__all__ = ["forget_replaced", "given_back", "keep_replaced", "returning_states"]


@dataclass
class _Replaced:
    """A weight as it was before a change, and what tells that nothing was written to it since."""

    form: Form
    parameters: dict[str, Parameter]
    states: list[tuple[ref[Any], dict[Any, Any]]]  # by optimizer
    bias: tuple[Parameter, Tensor, int] | None  # its value and version, if the change moved it
    new: list[ref[Parameter]]
    versions: list[int] | None  # of the new parameters; None: do not look

    def stands_for(self, site: Site) -> bool:
        """Whether the weight is as the change left it."""
        now = list(site.parameters().values())
        if [*map(id, now)] != [id(one()) for one in self.new]:
            return False
        return self.versions is None or self.versions == [p._version for p in now]


_REPLACED: WeakKeyDictionary[nn.Module, dict[str, _Replaced]] = WeakKeyDictionary()


def keep_replaced(edits: Iterable[Edit], optimizers: Sequence[Any], undo: ExitStack) -> None:
    """Keep what edits are going to replace, until an optimizer steps with what they make."""
    for edit in edits:
        if edit.old:
            site, new = edit.site, list(edit.new.values())
            bias = own_parameters(site.module).get("bias")
            one = _Replaced(
                form=edit.change.before,
                parameters=edit.old,
                states=_states(edit, optimizers),
                bias=None if edit.shift is None or bias is None else _moved(bias),
                new=[*map(ref, new)],
                versions=[p._version for p in new],
            )
            _REPLACED.setdefault(site.module, {})[site.spec.name] = one
            undo.callback(forget_replaced, site.module)
    if _REPLACED:
        watch_steps(_before_step)


def given_back(site: Site, after: Form, undo: ExitStack) -> Edit | None:
    """The edit that gives a weight exactly what it had in this form; None if that is not known.

    A bias that the change moved is moved back at once; ``undo`` can take that back.
    """
    assert site.form is not None
    change, old = Change(site.path, site.form, after, 0.0), site.parameters()
    if isinstance(after, FullRank) and (weight := kept(site)) is not None:
        value = like_old(weight, site.spec.name, site, after).clone()
        return Edit(site, change, old, new_parameters(site, {site.spec.name: value}))
    one = _REPLACED.get(site.module, {}).get(site.spec.name)
    if one is None or one.form != after or not one.stands_for(site):
        return None
    if one.bias is not None and one.bias[0]._version == one.bias[2]:
        undo.callback(one.bias[0].data.copy_, one.bias[0].detach().clone())
        one.bias[0].data.copy_(one.bias[1])
    values = {n: like_old(p, n, site, after) for n, p in one.parameters.items()}
    made = new_parameters(site, values)  # as the layer is now: moved, converted, frozen
    for name, p in one.parameters.items():
        p.data = made[name].data
        p.requires_grad_(made[name].requires_grad)
    return Edit(site, change, old, one.parameters)


def returning_states(edits: Iterable[Edit]) -> Contents:
    """What the optimizers are to hold once these edits have given parameters back."""
    tables: dict[int, tuple[Any, dict[Any, Any]]] = {}
    for edit in edits:
        one = _REPLACED.get(edit.site.module, {}).get(edit.site.spec.name)
        for optimizer, states in () if one is None else one.states:
            if (owner := optimizer()) is not None and one.parameters is edit.new:
                table = tables.setdefault(id(owner), (owner.state, dict(owner.state)))
                table[1].update(states)
    return list(tables.values())


def forget_replaced(*modules: nn.Module) -> None:
    """Drop what is kept of these modules."""
    for module in modules:
        _REPLACED.pop(module, None)
    if not _REPLACED:
        unwatch_steps(_before_step)


def _moved(bias: Parameter) -> tuple[Parameter, Tensor, int]:
    return bias, bias.detach().clone(), bias._version


def _states(edit: Edit, optimizers: Sequence[Any]) -> list[tuple[ref[Any], dict[Any, Any]]]:
    """The states of the parameters that an edit replaces, by optimizer."""
    return [
        (ref(one), {p: one.state[p] for p in edit.old.values() if p in one.state})
        for given in optimizers
        for one in wrapped(given)
        if isinstance(one.state, dict)
    ]


def _before_step(optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trains = any(
        bool(torch.as_tensor(group.get("lr", 1)).any()) for group in optimizer.param_groups
    )
    for module, weights in list(_REPLACED.items()):
        if any(id(one()) in held for each in weights.values() for one in each.new):
            if trains:
                forget_replaced(module)
            for each in weights.values():  # a step of rate 0 only makes states (torch's DCP)
                each.versions = None
