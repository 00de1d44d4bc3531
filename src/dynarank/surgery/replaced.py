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

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.forms import Adapted, Change, Form, FullRank, LowRank
from dynarank.layers import RankedLayer, own_parameters
from dynarank.surgery.edit import Edit, InShards, like_old, restore_on_exit
from dynarank.surgery.exact_weights import kept
from dynarank.surgery.optimizer_steps import trains, unwatch_steps, watch_steps
from dynarank.surgery.own_references import wrapped
from dynarank.surgery.param_groups import Contents
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.site import Site

__all__ = [
    "forget_replaced",
    "given_back",
    "keep_replaced",
    "kept_parameters",
    "recall",
    "returning_states",
]


@dataclass
class _Replaced:
    """A weight as it was before a change, and what tells that nothing was written to it since."""

    form: Form
    last: LowRank | Adapted | None
    frozen: frozenset[str]
    norms: tuple[float, ...]
    parameters: dict[str, Parameter]
    states: list[tuple[ref[Any], dict[str, Any]]]  # by optimizer, and the parameter's name
    bias: tuple[Parameter, Tensor, int] | None  # its value and version, if the change moved it
    new: list[ref[Parameter]]
    versions: list[int] | None  # of the new parameters; None: do not look
    shards: InShards | None = None  # what puts sharded parameters back

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
                last=site.last_factored_form,
                frozen=site.frozen_factors,
                norms=site.factor_norms,
                parameters=edit.old,
                states=_states(edit, optimizers),
                bias=None if edit.shift is None or bias is None else _moved(bias),
                new=[*map(ref, new)],
                versions=[p._version for p in new],
                shards=None if edit.shards is None else edit.shards.reverse(site.factor_norms),
            )
            _REPLACED.setdefault(site.module, {})[site.spec.name] = one
            undo.callback(forget_replaced, site.module)
    if _REPLACED:
        watch_steps(_before_step)


def kept_parameters() -> set[int]:
    """The ids of all parameters that are kept."""
    found = (one for by_name in _REPLACED.values() for one in by_name.values())
    return {id(p) for one in found for p in one.parameters.values()}


def given_back(site: Site, after: Form, undo: ExitStack) -> Edit | None:
    """The edit that gives a weight exactly what it had in this form; None if that is not known.

    A bias that the change moved is moved back at once; ``undo`` can take that back.
    """
    assert site.form is not None
    change, old = Change(site.path, site.form, after, 0.0), site.parameters()
    if isinstance(after, FullRank) and (weight := kept(site)) is not None:
        value = like_old(weight, site.spec.name, site, after).clone()
        return Edit(site, change, old, new_parameters(site, {site.spec.name: value}))
    one = _kept_of(site, after)
    if one is None or not one.stands_for(site):
        return None
    if one.bias is not None and one.bias[0]._version == one.bias[2]:
        undo.callback(one.bias[0].data.copy_, one.bias[0].detach().clone())
        one.bias[0].data.copy_(one.bias[1])
    if one.shards is not None:
        return Edit(site, change, old, one.parameters, shards=one.shards)
    values = {n: like_old(p, n, site, after) for n, p in one.parameters.items()}
    made = new_parameters(site, values)  # as the layer is now: moved, converted, frozen
    for name, p in one.parameters.items():
        p.data = made[name].data
        p.requires_grad_(made[name].requires_grad)
    return Edit(site, change, old, one.parameters)


def returning_states(edits: Iterable[Edit]) -> Contents:
    """What the optimizers are to hold once these edits have given weights their old forms again."""
    tables: dict[int, tuple[Any, dict[Any, Any]]] = {}
    for edit in edits:
        one = _kept_of(edit.site, edit.change.after)
        for optimizer, states in () if one is None else one.states:
            if (owner := optimizer()) is not None:
                _, held = tables.setdefault(id(owner), (owner.state, dict(owner.state)))
                for p in edit.new.values():
                    held.pop(p, None)
                held.update({edit.new[name]: state for name, state in states.items()})
    return list(tables.values())


def recall(edits: Iterable[Edit], undo: ExitStack) -> None:
    """Note of these weights what was noted of them beside the form when they last had it."""
    for edit in edits:
        one = _kept_of(edit.site, edit.change.after)
        for place in () if one is None else edit.site.places:
            layer, name = place.module, place.spec.name
            if one is not None and isinstance(layer, RankedLayer):
                restore_on_exit(layer.__dict__, undo)
                layer.set_form(name, one.form, one.frozen, one.norms)
                layer.remember(name, one.last)


def forget_replaced(*modules: nn.Module) -> None:
    """Drop what is kept of these modules."""
    for module in modules:
        _REPLACED.pop(module, None)
    if not _REPLACED:
        unwatch_steps(_before_step)


def _kept_of(site: Site, form: Form) -> _Replaced | None:
    """What is kept of a weight that had this form."""
    one = _REPLACED.get(site.module, {}).get(site.spec.name)
    return one if one is not None and one.form == form else None


def _moved(bias: Parameter) -> tuple[Parameter, Tensor, int]:
    return bias, bias.detach().clone(), bias._version


def _states(edit: Edit, optimizers: Sequence[Any]) -> list[tuple[ref[Any], dict[str, Any]]]:
    """The states of the parameters that an edit replaces, by optimizer."""
    return [
        (ref(one), {name: one.state[p] for name, p in edit.old.items() if p in one.state})
        for given in optimizers
        for one in wrapped(given)
        if isinstance(one.state, dict)
    ]


def _before_step(optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module, weights in list(_REPLACED.items()):
        if any(id(one()) in held for each in weights.values() for one in each.new):
            if trains(optimizer):
                forget_replaced(module)
            for each in weights.values():  # a step of rate 0 leaves the values
                each.versions = None
