"""An optimizer's state says of which forms and of which parameters it is.

torch numbers parameters by their order in the groups and loads by number, without a look at what
they are. So ``optimizer.state_dict()`` has one more entry, plain data: the form of each factored
weight whose parameters the optimizer holds, and the name of every parameter. On loading, the model
is brought to these forms first, and each state goes to the parameter of its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, count
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim import Optimizer

from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Adapted, Form, FullRank
from dynarank.surgery.loading import note_forms_loaded
from dynarank.surgery.optimizer_steps import unwatch_steps, watch_steps
from dynarank.surgery.own_references import inner_optimizer, takes_hooks
from dynarank.surgery.restore import restore_forms
from dynarank.surgery.sites import Site, survey

__all__ = ["KEY", "sign_states", "unsign_states"]

KEY = "dynarank"

# The entries of a state with the shape of the parameter, in torch's optimizers.
_SHAPED = (
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg",
    "grad_avg", "acc_delta", "sum", "ax", "prev", "step_size",
)  # fmt: skip
_WAY_OUT = "make the optimizer of the same parameters, in the same groups, as in the saved run"


class _Signer:
    """Signs the states of one optimizer, and reads the signatures of those loaded into it."""

    def __init__(self, optimizer: Optimizer, given: Any, model: nn.Module) -> None:
        self.model, self.given = ref(model), ref(given)
        self.hooks: list[Any] = [
            optimizer.register_state_dict_post_hook(_sign),
            optimizer.register_load_state_dict_pre_hook(_before_load),
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


_SIGNERS: WeakKeyDictionary[Optimizer, _Signer] = WeakKeyDictionary()
_MODELS: WeakSet[nn.Module] = WeakSet()
_SEEN: WeakSet[Optimizer] = WeakSet()  # that have stepped, since there are these models


def sign_states(model: nn.Module, optimizers: Iterable[Any] = ()) -> None:
    """From now on the states of a model's optimizers are signed.

    Args:
        model: the model.
        optimizers: its optimizers; others of its parameters follow with their first step.
    """
    if model not in _MODELS:
        _MODELS.add(model)
        _SEEN.clear()
    for given in optimizers:
        _attach(given, model)
    watch_steps(_before_step)


def unsign_states(model: nn.Module, optimizers: Iterable[Any] | None = None) -> None:
    """Leave states as torch makes them, and take the hooks off.

    Args:
        model: the model.
        optimizers: those whose states are signed no more; None: all of the model.
    """
    if optimizers is None:
        _MODELS.discard(model)
        optimizers = [one for one, signer in _SIGNERS.items() if signer.model() is model]
    for optimizer in map(inner_optimizer, optimizers):
        if isinstance(optimizer, Optimizer) and (signer := _SIGNERS.pop(optimizer, None)):
            signer.remove()
            _SEEN.add(optimizer)
    if not _MODELS:
        unwatch_steps(_before_step)


def _attach(given: Any, model: nn.Module) -> None:
    optimizer = inner_optimizer(given)
    if isinstance(optimizer, Optimizer) and takes_hooks(optimizer):
        if (before := _SIGNERS.pop(optimizer, None)) is not None:
            before.remove()
        _SIGNERS[optimizer] = _Signer(optimizer, given, model)


def _before_step(optimizer: Optimizer) -> None:
    """Sign the states of an optimizer that nobody has named, if it holds a known model's."""
    if optimizer in _SEEN or optimizer in _SIGNERS:
        return
    _SEEN.add(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_MODELS):
        if any(id(p) in held for p in model.parameters()):
            _attach(optimizer, model)


def _sign(optimizer: Optimizer, state: dict[str, Any]) -> None:
    model = _model_of(optimizer)
    if model is not None:
        forms = {site.path: site.form for site in _held_sites(optimizer, model)}
        data = {p: form_to_data(f) for p, f in forms.items() if f and not isinstance(f, FullRank)}
        state[KEY] = {"forms": data, "names": _names(optimizer, model)}


def _before_load(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Bring the model to the forms of a state, and the state to the order of the parameters.

    Raises:
        ValueError: it is the state of other parameters. Nothing has changed then.
    """
    model, signed = _model_of(optimizer), state.get(KEY)
    ready = {key: value for key, value in state.items() if key != KEY}
    with ExitStack() as undo:
        if model is not None and signed is not None:
            forms, names = _read(signed, state)
            _bring(model, optimizer, forms, undo)
            ready = _by_name(optimizer, model, ready, names)
        _check_fit(optimizer, model, ready, signed is not None)
        undo.pop_all()
    return ready


def _model_of(optimizer: Optimizer) -> nn.Module | None:
    signer = _SIGNERS.get(optimizer)
    return None if signer is None else signer.model()


def _held_sites(optimizer: Optimizer, model: nn.Module) -> Iterator[Site]:
    """The weights of which the optimizer holds a parameter."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for site in survey(model):
        if site.form is not None and any(id(p) in held for p in site.parameters().values()):
            yield site


def _bring(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Form], undo: ExitStack
) -> None:
    """Give weights the forms that they have in the state, if it is another one."""
    now = {site.path: site.form for site in _held_sites(optimizer, model)}
    wanted = {path: saved.get(path, FullRank()) for path in (*now, *saved)}
    if wanted == now:
        return
    signers = [one for one in _SIGNERS.values() if one.model() is model]
    given = [owner for one in signers if (owner := one.given()) is not None]
    try:
        restore_forms(model, wanted, None, given, undo)
    except ValueError as error:
        raise ValueError(f"the optimizer's state is of another model: {error}") from error
    note_forms_loaded(model.modules())


def _read(signed: Any, state: Mapping[str, Any]) -> tuple[dict[str, Form], list[list[str]]]:
    """The forms and the names of a signature.

    Raises:
        ValueError: it is none.
    """
    try:
        forms = {str(path): form_from_data(data) for path, data in signed["forms"].items()}
        names = [[str(name) for name in row] for row in signed["names"]]
        sizes = [len(group["params"]) for group in state["param_groups"]]
        if [len(row) for row in names] != sizes:
            raise ValueError(f"it names {[*map(len, names)]} parameters, the groups have {sizes}")
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"the entry {KEY!r} of the optimizer's state does not say of which parameters it is: "
            f"{error!r}; the state is damaged. Without the entry it is loaded by number"
        ) from error
    return forms, names


def _names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """The name of each parameter, by group; those that are not the model's are counted."""
    known = {id(p): _plain(name) for name, p in model.named_parameters()}
    rows: list[list[str]] = []
    for group in optimizer.param_groups:
        others = count()
        at = f"parameter of group {len(rows)} outside of the model, number"
        rows.append([known.get(id(p)) or f"{at} {next(others)}" for p in group["params"]])
    return rows


def _by_name(
    optimizer: Optimizer, model: nn.Module, state: dict[str, Any], names: list[list[str]]
) -> dict[str, Any]:
    """The state with its groups and parameters in the order of the optimizer's.

    The frozen base of an adapter, which has no state, may be in the groups of one of them only.

    Raises:
        ValueError: they are other parameters, or in other groups.
    """
    own = _names(optimizer, model)
    if own == names:
        return state
    bases = _bases(model)
    groups = state["param_groups"]
    numbers = {
        name: number
        for group, row in zip(groups, names, strict=True)
        for number, name in zip(group["params"], row, strict=True)
    }
    _check_names({*chain(*own)} - bases, numbers.keys() - bases)
    saved = [{*row} - bases for row in names]
    made: list[dict[str, Any]] = []
    for row in own:
        if {*row} - bases not in saved:
            raise ValueError(_other_groups(row, own, names))
        group = groups[saved.index({*row} - bases)]
        made.append({**group, "params": [numbers.get(name, name) for name in row]})
        if "param_names" in group:
            made[-1]["param_names"] = list(row)
    return {**state, "param_groups": made}


def _bases(model: nn.Module) -> set[str]:
    """The names of all frozen bases of adapters."""
    bases: set[int] = set()
    for site in survey(model):
        own = site.parameters() if isinstance(site.form, Adapted) else {}
        bases |= {id(p) for name, p in own.items() if site.spec.is_base(name)}
    return {_plain(name) for name, p in model.named_parameters() if id(p) in bases}


def _plain(name: str) -> str:
    """The name that a parameter has without ``torch.compile``."""
    return name.replace("_orig_mod.", "")


def _check_names(own: set[str], saved: set[str]) -> None:
    if other := sorted(own ^ saved):
        here, there = ("holds", "does not have") if other[0] in own else ("does not hold", "has")
        raise ValueError(
            f"the optimizer {here} the parameter {other[0]!r}, which the state {there} "
            f"({len(own - saved)} are only in the optimizer, {len(saved - own)} only in the state "
            f"to be loaded); {_WAY_OUT}"
        )


def _other_groups(row: list[str], own: list[list[str]], saved: list[list[str]]) -> str:
    there = [index for index, one in enumerate(saved) if row[0] in one]
    return (
        f"the optimizer has {row[0]!r} in a group with {len(row) - 1} other parameters (groups of "
        f"{[*map(len, own)]}), the state in group {there} (groups of {[*map(len, saved)]}); "
        f"{_WAY_OUT}"
    )


def _check_fit(
    optimizer: Optimizer, model: nn.Module | None, state: Mapping[str, Any], signed: bool
) -> None:
    """Raise ValueError for a state that does not belong to the parameters as they are."""
    if misfit := _misfit(optimizer, model, state):
        way_out = _WAY_OUT
        if not signed:
            way_out = (
                "if it was saved while layers had other forms, load the rank scheduler's state "
                "first, then those of the model and the optimizer"
            )
        raise ValueError(f"the optimizer's state does not fit its parameters: {misfit}; {way_out}")


def _misfit(optimizer: Optimizer, model: nn.Module | None, state: Mapping[str, Any]) -> str:
    counts = [
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    ]
    if counts[0] != counts[1]:
        return f"its groups have {counts[0]} parameters, the optimizer's have {counts[1]}"
    known = {} if model is None else {id(p): repr(name) for name, p in model.named_parameters()}
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, parameter in zip(indices, held, strict=True):
        entries: Mapping[str, Any] = state["state"].get(index) or {}
        for key in _SHAPED:
            value = entries.get(key)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                shapes = tuple(value.shape), tuple(parameter.shape)
                name = known.get(id(parameter), index)
                return f"its {key} of {name} has the shape {shapes[0]}, the parameter {shapes[1]}"
    return ""
