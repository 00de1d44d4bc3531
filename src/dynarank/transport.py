"""The optimizer through a change of form: groups, and the moments it has gathered.

Legend: W the effective weight, G its gradient; M an average of G (first moment), V of G * G
(second moment); f the factors, J = vjp of ``scale * join`` at f, so that dL/df = J(G).

Whatever the two forms, a moment goes through the full-rank one:

- to factors: ``M_f = J(M)``, exact if the factors stood still over the averaging window; and
  ``V_f = J_(f*f)((V - M * M)+) + M_f * M_f``, the variance taken as independent between entries
  (LDAdam's form, arXiv 2410.16103), which underestimates where a row's gradients are correlated;
- from factors: the least M with ``J(M) = M_f``; V by the decomposition's ``lift_squares``;
- always ``V := max(V, M * M)``: a transported V can vanish where M does not, and the step
  M / sqrt(V) would be without bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dynarank.decompositions import Decomposition, Factors, UnfitWeightError, precise
from dynarank.edit import Edit
from dynarank.forms import Adapted, Form, FullRank
from dynarank.layers import WeightSpec

__all__ = [
    "Moments",
    "Optimizers",
    "Transport",
    "as_list",
    "check_movable",
    "prepare_transport",
]

Moments: TypeAlias = Literal["project", "reset"]
Optimizers: TypeAlias = Optimizer | Iterable[Optimizer] | None

# Optimizer state by role: SGD's velocity and Adam's averages; steps are copied, not transformed.
FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
COUNTERS = ("step",)
MOVABLE = ("SGD", "Adam", "AdamW", "RAdam")


@dataclass
class Transport:
    """Prepared contents of the optimizers' groups and states, committed or undone as a whole."""

    groups: list[tuple[dict[str, Any], dict[str, list[Any]]]] = field(default_factory=list)
    states: list[tuple[Optimizer, Parameter, dict[str, Any]]] = field(default_factory=list)
    dropped: list[tuple[Optimizer, Parameter]] = field(default_factory=list)
    _undo: list[tuple[Any, dict[Any, Any]]] = field(default_factory=list)

    def commit(self) -> None:
        """Write the groups and states."""
        states = {id(o): o.state for o, *_ in (*self.dropped, *self.states)}
        changing: list[dict[Any, Any]] = [*(group for group, _ in self.groups), *states.values()]
        self._undo = [(mapping, dict(mapping)) for mapping in changing]
        for group, contents in self.groups:
            group.update(contents)
        for optimizer, parameter in self.dropped:
            del optimizer.state[parameter]
        for optimizer, parameter, state in self.states:
            optimizer.state[parameter] = state

    def undo(self) -> None:
        """Take back ``commit``; nothing if it was not called."""
        for mapping, contents in self._undo:
            mapping.clear()
            mapping.update(contents)


def as_list(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers as a list, none as an empty one.

    Raises:
        TypeError: something else than an optimizer or several.
    """
    if optimizers is None:
        return []
    found = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    for one in found:
        if not (hasattr(one, "param_groups") and hasattr(one, "state")):
            raise TypeError(f"optimizer is a torch optimizer or a list of them, got {one!r}")
    return found


def check_movable(optimizers: Sequence[Optimizer], moments: str) -> None:
    """Raise for an optimizer of torch's whose state is not known how to move.

    Raises:
        ValueError: such an optimizer, under ``moments="project"``.
    """
    for one in optimizers:
        name, home = type(one).__name__, type(one).__module__
        if moments == "project" and home.startswith("torch.optim") and name not in MOVABLE:
            raise ValueError(
                f"the state of {name} is not known how to move through a change of form (known: "
                f"{', '.join(MOVABLE)}); use moments='reset'"
            )


def prepare_transport(
    edits: Sequence[Edit], optimizers: Sequence[Optimizer], moments: str
) -> Transport:
    """Compute what the optimizers must hold after ``edits``; change nothing.

    Each new parameter takes the place of the old ones, in their group and position; moments follow
    by policy: ``"project"`` as this module says, ``"reset"`` as if the optimizer had never stepped
    on the layer (its step counter with it).

    Raises:
        ValueError: unknown policy; a layer that trains is in no optimizer, or in two; under
            ``"project"``, the optimizer keeps a state that is not known how to move.
    """
    if moments not in ("project", "reset"):
        raise ValueError(f'moments is "project" or "reset", got {moments!r}')
    transport = Transport()
    if not optimizers:
        return transport
    homes = [(edit, _home(edit, optimizers)) for edit in edits]
    for optimizer in optimizers:
        mine = [edit for edit, home in homes if home is optimizer]
        transport.groups += _regroup(optimizer, mine)
        for edit in mine:
            old = [p for p in edit.old.values() if p in optimizer.state]
            transport.dropped += [(optimizer, p) for p in old]
            if moments == "project":
                states = _project(optimizer, edit)
                transport.states += [(optimizer, p, state) for p, state in states]
    return transport


def _home(edit: Edit, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    """The optimizer that holds the layer; a frozen layer may have none."""
    ids = {id(p) for p in edit.old.values()}
    found = [
        o for o in optimizers if any(id(p) in ids for g in o.param_groups for p in g["params"])
    ]
    if len(found) == 1:
        return found[0]
    if not found and not any(p.requires_grad for p in edit.new.values()):
        return None
    count = "two optimizers hold" if found else "no optimizer given holds"
    raise ValueError(
        f"layer {edit.path!r} trains, but {count} its parameters ({', '.join(edit.old)}); pass the "
        "one that does as optimizer= (a list if there are several), or freeze the layer first"
    )


def _regroup(
    optimizer: Optimizer, edits: Sequence[Edit]
) -> list[tuple[dict[str, Any], dict[str, list[Any]]]]:
    """The new contents of every group that holds an edited layer."""
    edit_of = {id(p): edit for edit in edits for p in edit.old.values()}
    placed: set[int] = set()
    result: list[tuple[dict[str, Any], dict[str, list[Any]]]] = []
    for group in optimizer.param_groups:
        if not any(id(p) in edit_of for p in group["params"]):
            continue
        names = group.get("param_names", [""] * len(group["params"]))
        members: list[tuple[str, Parameter]] = []
        for name, parameter in zip(names, group["params"], strict=True):
            edit = edit_of.get(id(parameter))
            if edit is None:
                members.append((name, parameter))
            elif id(edit) not in placed:
                placed.add(id(edit))
                stem = name.rpartition(".")[0]
                members += [
                    (f"{stem}.{n}".lstrip("."), p) for n, p in _held(edit, edit.new).items()
                ]
        contents: dict[str, list[Any]] = {"params": [p for _, p in members]}
        if "param_names" in group:
            contents["param_names"] = [n for n, _ in members]
        result.append((group, contents))
    return result


def _held(edit: Edit, parameters: dict[str, Parameter]) -> dict[str, Parameter]:
    """Those that train: all but the base."""
    return {name: p for name, p in parameters.items() if not edit.site.spec.is_base(name)}


def _project(optimizer: Optimizer, edit: Edit) -> list[tuple[Parameter, dict[str, Any]]]:
    """The states of the edit's new parameters; empty if the optimizer has not stepped on it."""
    spec = edit.site.spec
    old = list(_held(edit, edit.old).values())
    states = [optimizer.state.get(p, {}) for p in old]
    keys = list(dict.fromkeys(k for state in states for k in state if state[k] is not None))
    _check_known(edit.path, keys)
    _check_finite(edit.path, states)
    new = list(_held(edit, edit.new).values())
    moved: dict[str, list[Any]] = {}
    first: Tensor | None = None
    for key in sorted(keys, key=(COUNTERS + FIRST_MOMENTS + SECOND_MOMENTS).index):
        values = [state.get(key) for state in states]
        if key in COUNTERS:
            value = next(v for v in values if v is not None)
            moved[key] = [v.clone() if isinstance(v, Tensor) else v for v in [value] * len(new)]
            continue
        parts = tuple(
            torch.zeros_like(precise(p)) if v is None else precise(v)
            for p, v in zip(old, values, strict=True)
        )
        if key in FIRST_MOMENTS:
            first = _to_full(spec, edit.before, edit.old, parts)
            moved[key] = _cast(_from_full(spec, edit.after, edit.new, first), new)
        else:
            second = _squares_to_full(spec, edit.before, edit.old, parts)
            moved[key] = _cast(_squares_from_full(spec, edit.after, edit.new, second, first), new)
    return [(p, {key: moved[key][i] for key in moved}) for i, p in enumerate(new) if moved]


def _check_known(path: str, keys: Sequence[str]) -> None:
    known = FIRST_MOMENTS + SECOND_MOMENTS + COUNTERS
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(
            f"layer {path!r}: the optimizer keeps {', '.join(unknown)}, which is not known how to "
            f"move (known: {', '.join(known)}, of SGD, Adam and AdamW); use moments='reset'"
        )


def _check_finite(path: str, states: Sequence[dict[str, Any]]) -> None:
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    if not all(torch.isfinite(value).all() for value in tensors):
        raise UnfitWeightError(
            f"layer {path!r}: the optimizer's state holds NaN or infinite values"
        )


def _cast(values: Factors, parameters: Sequence[Parameter]) -> list[Tensor]:
    """Each value in its parameter's dtype, device and memory layout."""
    return [torch.empty_like(p).copy_(v).detach() for v, p in zip(values, parameters, strict=True)]


def _factors(
    spec: WeightSpec, form: Form, parameters: dict[str, Parameter]
) -> tuple[Decomposition, Factors, float]:
    assert not isinstance(form, FullRank)
    factors = spec.factors(form, {name: precise(p) for name, p in parameters.items()})
    return spec.decomposition(form), factors, form.scale if isinstance(form, Adapted) else 1.0


def _to_full(
    spec: WeightSpec, form: Form, parameters: dict[str, Parameter], moments: Factors
) -> Tensor:
    """Canonical; as are the other full-rank moments here."""
    if isinstance(form, FullRank):
        return spec.turn(moments[0])
    decomposition, factors, scale = _factors(spec, form, parameters)
    return decomposition.lift(factors, moments) / scale


def _from_full(
    spec: WeightSpec, form: Form, parameters: dict[str, Parameter], moment: Tensor
) -> Factors:
    if isinstance(form, FullRank):
        return (spec.turn(moment),)
    decomposition, factors, scale = _factors(spec, form, parameters)
    return decomposition.pull(factors, scale * moment)


def _squares_to_full(
    spec: WeightSpec, form: Form, parameters: dict[str, Parameter], squares: Factors
) -> Tensor:
    if isinstance(form, FullRank):
        return spec.turn(squares[0])
    decomposition, factors, scale = _factors(spec, form, parameters)
    return decomposition.lift_squares(factors, squares) / scale**2


def _squares_from_full(
    spec: WeightSpec,
    form: Form,
    parameters: dict[str, Parameter],
    square: Tensor,
    moment: Tensor | None,
) -> Factors:
    mean = torch.zeros_like(square) if moment is None else moment
    if isinstance(form, FullRank):
        return (spec.turn(torch.maximum(square, mean.square())),)
    decomposition, factors, scale = _factors(spec, form, parameters)
    variance = (square - mean.square()).clamp(min=0)
    spread = decomposition.pull(tuple(f.square() for f in factors), scale**2 * variance)
    means = decomposition.pull(factors, scale * mean)
    return tuple(s + m.square() for s, m in zip(spread, means, strict=True))
