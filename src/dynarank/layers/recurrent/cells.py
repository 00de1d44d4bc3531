"""``nn.LSTMCell``, ``nn.GRUCell`` and ``nn.RNNCell`` in the three forms.

A cell computes one step, so its two matrices are executed like those of linear layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.decompositions import Geometry
from dynarank.forms import FullRank
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, effective
from dynarank.layers.recurrent.loop import CELLS, GATES, States
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedGRUCell", "RankedLSTMCell", "RankedRNNCell"]


class _Cell(RankedLayer):
    """The base class of ranked cells."""

    weight_ih = effective("weight_ih")
    weight_hh = effective("weight_hh")

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The input matrix and the recurrent matrix."""
        cell = cast(Any, module)
        gates = GATES[_mode(cell)] * cell.hidden_size
        return (
            WeightSpec("weight_ih", (gates, cell.input_size)),
            WeightSpec("weight_hh", (gates, cell.hidden_size)),
        )

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """One call for the input and one for the state."""
        x, hx = cast(Tensor, inputs["input"]), cast(Any, inputs.get("hx"))
        state = hx if hx is None or isinstance(hx, Tensor) else hx[0]
        own = dict(module.named_parameters(recurse=False))
        return {
            name: [
                Call(
                    (*x.shape[:-1], columns),
                    Geometry(),
                    given is not None and given.requires_grad,
                    any(p.requires_grad for n, p in own.items() if n.startswith(name)),
                )
            ]
            for name, given, columns in (
                ("weight_ih", x, x.shape[-1]),
                ("weight_hh", state, cast(Any, module).hidden_size),
            )
        }

    def reset_parameters(self) -> None:
        """As of the plain cell: each weight and bias uniform in +-1 / sqrt(hidden_size)."""
        bound = 1 / math.sqrt(cast(Any, self).hidden_size)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            if (weight := getattr(self, name)) is not None:
                nn.init.uniform_(weight, -bound, bound)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """One step with the effective weights."""
        cell = cast(Any, self)
        if all(isinstance(form, FullRank) for form in self.forms.values()):
            return cast(Any, super()).forward(input, hx)
        mode = _mode(cell)
        states = self._states(input, hx, mode)
        into = self.multiply(self.resolved("weight_ih"), input, cell.bias_ih)
        back = self.multiply(self.resolved("weight_hh"), states[0], cell.bias_hh)
        after = CELLS[mode](into, back, states)
        return after if mode == "LSTM" else after[0]

    def _states(self, x: Tensor, hx: Any, mode: str) -> States:
        cell = cast(Any, self)
        if x.dim() not in (1, 2) or x.shape[-1] != cell.input_size:
            raise RuntimeError(
                f"input must be (batch, {cell.input_size}) or ({cell.input_size},), "
                f"got {tuple(x.shape)}"
            )
        shape = (*x.shape[:-1], cell.hidden_size)
        if hx is None:
            zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
            return (zeros,) * (2 if mode == "LSTM" else 1)
        states = tuple(hx) if mode == "LSTM" else (hx,)
        for state in states:
            if state.shape != shape:
                raise RuntimeError(f"hx must be {shape} for this input, got {tuple(state.shape)}")
        return states


class RankedLSTMCell(_Cell, nn.LSTMCell):  # pyright: ignore
    """An LSTM cell whose matrices are each in one of the three forms."""

    plain = nn.LSTMCell


class RankedGRUCell(_Cell, nn.GRUCell):  # pyright: ignore
    """A GRU cell whose matrices are each in one of the three forms."""

    plain = nn.GRUCell


class RankedRNNCell(_Cell, nn.RNNCell):  # pyright: ignore
    """An Elman cell whose matrices are each in one of the three forms."""

    plain = nn.RNNCell


def _mode(cell: nn.Module) -> str:
    if isinstance(cell, nn.RNNCell):
        return f"RNN_{cell.nonlinearity.upper()}"
    return "LSTM" if isinstance(cell, nn.LSTMCell) else "GRU"
