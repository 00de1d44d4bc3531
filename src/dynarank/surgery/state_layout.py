"""What each optimizer keeps of a parameter, in terms of averages of its gradient g.

A change of form moves averages of the gradient (``means``) and of its square (``squares``). Most
optimizers keep just these. The others are read into such terms, moved, and written back:

- **Adamax:** ``exp_inf``, the largest recent ``|g|``, is moved as a square, by its own square.
- **RMSprop:** ``momentum_buffer`` averages ``g / d``, where d is the root of ``square_avg``; it is
  moved times d, as a mean of g, and divided by the new d.
- **Adagrad:** ``sum`` is moved without the value at which it began.
- **Adadelta:** ``acc_delta`` averages the squares of its steps, each g times a rate. It is moved as
  ``square_avg`` is, which averages the rates.
- **Adafactor:** ``row_var`` and ``col_var`` are moved as the product that it makes of them.
- **ASGD:** ``ax`` averages the parameter, see :mod:`dynarank.surgery.weight_average`.

Note [Decoupled decay]
Some optimizers of torch (and their subclasses) add weight decay to the gradient, unless their
``decoupled_weight_decay`` is set. Of any other optimizer a moment is moved as if there were no
decay in it: most of them decouple it (AdamW, Muon, Lion), and a group does not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dynarank.decompositions import precise

__all__ = [
    "AVERAGES",
    "MOVABLE",
    "SHAPED",
    "Averaging",
    "StateLayout",
    "keeps_squares",
    "layout_of",
    "torch_class",
]

State: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Averaging:
    """The averaging that a parameter group's options ask for."""

    betas: tuple[float, float] | None  # Adam's; None: a velocity, which has no bias correction
    decay: float  # L2 weight decay, a part of the gradient; 0 if decoupled
    gain: float  # the weight of a constant in the (bias-corrected) first moment

    @staticmethod
    def of(group: Mapping[str, Any]) -> Averaging:
        """That of a parameter group; its weight decay is L2 unless it says otherwise."""
        decay = 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0))
        if "betas" in group:
            first, second, *_ = group["betas"]
            return Averaging((float(first), float(second)), decay, 1.0)
        momentum, dampening = (float(group.get(k) or 0) for k in ("momentum", "dampening"))
        gain = (1 - dampening) / (1 - momentum) if momentum < 1 else 1.0
        return Averaging(None, decay, gain)

    def corrections(self, step: Any) -> tuple[float, float]:
        """The bias corrections of the two averages after ``step``: ``1 - beta^step``, or 1."""
        if self.betas is None or step is None:
            return 1.0, 1.0
        steps = max(float(step), 1.0)
        return 1 - self.betas[0] ** steps, 1 - self.betas[1] ** steps


@dataclass(frozen=True)
class StateLayout:
    """The entries of an optimizer's state of one parameter, by what they mean.

    Args:
        means: averages of the gradient; the first that is there belongs to the squares.
        squares: averages or sums of its square.
        scalars: numbers that all parameters of a weight have in common.
        weights: averages of the parameter itself.
        stored: what is kept in place of a square.
        l2: whether weight decay is a part of the gradient, see Note [Decoupled decay].
    """

    means: tuple[str, ...] = ("momentum_buffer", "exp_avg")
    squares: tuple[str, ...] = ("exp_avg_sq", "max_exp_avg_sq")
    scalars: tuple[str, ...] = ("step",)
    weights: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    l2: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """All entries that it knows."""
        return (*self.means, *self.squares, *self.scalars, *self.weights, *self.stored)

    def common(self, states: Sequence[State]) -> dict[str, Any]:
        """The scalars of a weight's states: those of the one with most steps."""
        counted = [s for s in states if s.get("step") is not None]
        latest = max(counted, key=lambda s: float(s["step"]), default={})
        return {key: latest[key] for key in self.scalars if key in latest}

    def averaging(self, group: Mapping[str, Any]) -> Averaging:
        """That of a parameter in this group."""
        return Averaging.of(group if self.l2 else {**group, "weight_decay": 0})

    def read(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state in terms of averages, in fp64 where it is not the entry itself."""
        return dict(state)

    def written(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of :meth:`read`, with every entry that the group's options ask for."""
        if group.get("amsgrad") and "exp_avg_sq" in state:
            return {"max_exp_avg_sq": state["exp_avg_sq"], **state}
        return dict(state)

    def fresh(
        self, states: Sequence[State], group: Mapping[str, Any], restart: bool
    ) -> dict[str, Any]:
        """The state of a parameter that gets none of the old ones; empty: made at its step.

        Args:
            states: the old ones of its weight.
            group: its parameter group.
            restart: whether it counts its steps from zero.
        """
        return {}


class _Adamax(StateLayout):
    def averaging(self, group: Mapping[str, Any]) -> Averaging:
        return Averaging.of({**group, "betas": (group["betas"][0], 0.0)})  # u is not corrected

    def read(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        largest = state.get("exp_inf")
        return {**state} if largest is None else {**state, "exp_inf": precise(largest).square()}

    def written(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        return {**state, "exp_inf": state["exp_inf"].sqrt()} if "exp_inf" in state else {}


class _RMSprop(StateLayout):
    def averaging(self, group: Mapping[str, Any]) -> Averaging:
        first, second = group["alpha" if group["centered"] else "momentum"], group["alpha"]
        return Averaging.of({**group, "betas": (first, second)})

    def read(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        if state.get("momentum_buffer") is None:
            return dict(state)
        gradient = precise(state["momentum_buffer"]) * self._root(state, group)
        return {**state, "momentum_buffer": (1 - group["momentum"]) * gradient}

    def written(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        if not state:
            return {}
        zeros = torch.zeros_like(state["square_avg"])
        mean, buffer = state.get("grad_avg", zeros), state.get("momentum_buffer", zeros)
        # d' >= abs(mean): a step of the mean gradient is no longer than the learning rate.
        least = mean.square() * group["centered"] + torch.maximum(mean.abs(), buffer.abs()).square()
        new = {**state, "square_avg": torch.maximum(state["square_avg"], least)}
        if group["centered"]:
            new["grad_avg"] = mean
        if group["momentum"] > 0:
            new["momentum_buffer"] = buffer / self._root(new, group) / (1 - group["momentum"])
        return new

    def _root(self, state: State, group: Mapping[str, Any]) -> Tensor:
        """What the gradient is divided by."""
        square = precise(state["square_avg"])
        if state.get("grad_avg") is not None:
            square = (square - precise(state["grad_avg"]).square()).clamp(min=0)
        return square.sqrt() + group["eps"]


class _Adagrad(StateLayout):
    def read(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        if state.get("sum") is None:
            return dict(state)
        return {**state, "sum": (precise(state["sum"]) - self._began(group)).clamp(min=0)}

    def written(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        return {**state, "sum": state["sum"] + self._began(group)} if state else {}

    def fresh(
        self, states: Sequence[State], group: Mapping[str, Any], restart: bool
    ) -> dict[str, Any]:
        # Until torch 2.12 it makes its state only once.
        step = self.common(states)["step"]
        new = torch.zeros_like(step) if restart else step
        return {"step": new, "sum": torch.tensor(self._began(group), device=step.device)}

    def _began(self, group: Mapping[str, Any]) -> float:
        return float(group["initial_accumulator_value"])


class _Adafactor(StateLayout):
    def averaging(self, group: Mapping[str, Any]) -> Averaging:
        return Averaging(None, 0.0, 1.0)

    def read(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        if state.get("row_var") is None:
            return dict(state)
        row, column = precise(state["row_var"]), precise(state["col_var"])
        mean = row.mean(-2, keepdim=True)
        whole = torch.where(mean > 0, row @ column / mean, 0.0)
        kept = {key: v for key, v in state.items() if key not in self.stored}
        return {**kept, "variance": whole}

    def written(self, state: State, group: Mapping[str, Any]) -> dict[str, Any]:
        if not state or state["variance"].ndim < 2:
            return dict(state)
        kept = {key: v for key, v in state.items() if key != "variance"}
        whole: Tensor = state["variance"]
        rows, columns = whole.mean(-1, keepdim=True), whole.mean(-2, keepdim=True)
        return {**kept, "row_var": rows, "col_var": columns}


AVERAGES = StateLayout()  # what SGD and Adam keep
# Of torch's optimizers, by class; Rprop, LBFGS and SparseAdam have nothing that could be moved.
_ADAM = StateLayout(l2=True)
_LAYOUTS = {
    "SGD": _ADAM,
    "Adam": _ADAM,
    "AdamW": AVERAGES,
    "RAdam": _ADAM,
    "Muon": AVERAGES,
    "NAdam": StateLayout(scalars=("step", "mu_product"), l2=True),
    "Adamax": _Adamax(("exp_avg",), ("exp_inf",), l2=True),
    "RMSprop": _RMSprop(("grad_avg", "momentum_buffer"), ("square_avg",), l2=True),
    "Adagrad": _Adagrad((), ("sum",)),
    "Adadelta": StateLayout((), ("square_avg", "acc_delta")),
    "Adafactor": _Adafactor((), ("variance",), stored=("row_var", "col_var")),
    "ASGD": StateLayout((), (), ("step", "eta", "mu"), ("ax",)),
}
MOVABLE = tuple(_LAYOUTS)
# The entries that have the shape of the parameter.
SHAPED = tuple(
    {key: None for one in _LAYOUTS.values() for key in (*one.means, *one.squares, *one.weights)}
)


def torch_class(optimizer: Any) -> str:
    """The class of torch that an optimizer is or derives from."""
    classes = (c for c in type(optimizer).__mro__ if c.__module__.startswith("torch.optim"))
    return next((c.__name__ for c in classes), "Optimizer")


def layout_of(optimizer: Any) -> StateLayout:
    """What an optimizer keeps; one that is not of torch: no more than SGD and Adam do."""
    return _LAYOUTS.get(torch_class(optimizer), AVERAGES)


def keeps_squares(optimizer: Any) -> bool:
    """Whether it keeps averages of squares, as its class or its groups tell."""
    own = layout_of(optimizer).squares
    return any("betas" in g for g in optimizer.param_groups) or own not in ((), AVERAGES.squares)
