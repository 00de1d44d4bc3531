"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` in the three forms, each matrix in a form of its own.

Legend: N rows of the input (all steps of all sequences), T steps, h the hidden size; ``ih`` an
input matrix, ``hh`` a recurrent one, ``hr`` the projection of h (``proj_size``).

========  ==============================  ==========================================================
matrix    joined, merged                  factored, two-branch
========  ==============================  ==========================================================
``ih``    formed once per forward pass,   all factors but the last are applied at once; the
          then torch's fused kernel       last is the fused kernel's input matrix. Two branches:
                                          ``[base, scale * up] @ [x, down x]``, again one kernel
``hh``    same as ``ih``                  applied at each step, in a Python loop
``hr``    same as ``ih``                  applied at each step, in a Python loop
========  ==============================  ==========================================================

``"auto"`` takes the fewest FLOPs, with the overhead of a loop step converted to FLOPs; on devices
other than CPUs it never loops. If every matrix is joined, merged or full-rank, the whole module is
one kernel call; else there is one for each layer and direction. ``recompute`` has no effect: the
kernel saves its input and weights itself.

Training step relative to the plain layer's, low-rank, ``"auto"``, medians of 5 interleaved (fp32,
one layer, one core of a busy AMD EPYC, 2026-11): LSTM, hidden 256, batch 32: .50 at r = h/8, .82 at
h/4; 512 by 8: .52, .73; 512 by 32: .39, .57; 1024 by 32: .21, .37. GRU, 256 by 32: .87, .90; 512 by
32: .32, .43. At 128 by 8 the spread was larger than any gain.

In the adapted form only the factors train, by automatic differentiation through the weight.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dynarank.decompositions import Factors
from dynarank.forms import FullRank, LowRank
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, in_base_dtype, read_out, read_parameters
from dynarank.layers.recurrent.loop import (
    GATES,
    Direction,
    States,
    chain,
    mirror,
    run_direction,
    run_kernel,
)
from dynarank.layers.recurrent.usage import recurrent_calls
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedGRU", "RankedLSTM", "RankedRNN"]

_APART = ("factored", "two-branch")  # the executions that do not form the weight


class _Recurrent(RankedLayer):
    """The base class of ranked recurrent layers.

    Torch has a separate list of the parameters (``_flat_weights``). Here it contains None for each
    weight that is not a parameter under its own name; effective weights are formed in each forward
    pass and not kept.
    """

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """Two or three matrices for each layer and direction."""
        net = cast(Any, module)
        state, directions = net.proj_size or net.hidden_size, 1 + net.bidirectional
        gates = GATES[net.mode] * net.hidden_size
        found: list[WeightSpec] = []
        for i, names in enumerate(net._all_weights):
            columns = net.input_size if i < directions else state * directions
            shapes = {"ih": (gates, columns), "hh": (gates, state), "hr": (state, net.hidden_size)}
            matrices = (name for name in names if name.startswith("weight"))
            found += [WeightSpec(name, shapes[name.split("_")[1]]) for name in matrices]
        return tuple(found)

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """One call per matrix, with all rows of the sequence."""
        forms = module.forms if isinstance(module, RankedLayer) else {}
        names = {
            spec.name: spec.parameter_names(forms.get(spec.name, FullRank()))
            for spec in cls.weights_of(module)
        }
        return recurrent_calls(cast(Any, module), inputs["input"], inputs.get("hx"), names)

    def form_changed(self) -> None:
        """Rebuild torch's list of parameters."""
        super().form_changed()
        self._init_flat_weights()

    def to_plain(self) -> nn.Module:
        """The plain module, which rebuilds its list of parameters itself."""
        super().to_plain()
        cast(Any, self)._init_flat_weights()
        return self

    def _init_flat_weights(self) -> None:
        net = cast(Any, self)
        flat = [
            None if self.has_factors(name) else getattr(self, name, None)
            for name in net._flat_weights_names
        ]
        self.__dict__["_flat_weights"] = flat
        self.__dict__["_flat_weight_refs"] = [None if p is None else weakref.ref(p) for p in flat]
        net.flatten_parameters()  # torch's; does nothing while a weight is missing

    def reset_parameters(self) -> None:
        """As of the plain layer: each weight and bias uniform in +-1 / sqrt(hidden_size)."""
        net = cast(Any, self)
        bound = 1 / math.sqrt(net.hidden_size)
        for name in net._flat_weights_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)

    def __getattr__(self, name: str) -> Any:
        """The effective weight, for a weight that is not a parameter under its own name."""
        return read_out(self, name) if self.has_factors(name) else super().__getattr__(name)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """The plain layer's checks; that one reads the dtype from the list of parameters."""
        dims, columns = 3 if batch_sizes is None else 2, cast(Any, self).input_size
        if input.dim() != dims or input.size(-1) != columns:
            raise RuntimeError(
                f"input must have {dims} dimensions, the last of size {columns}; "
                f"got {tuple(input.shape)}"
            )
        dtype = next(iter(read_parameters(self).values())).dtype
        device = input.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if input.dtype != dtype and not autocast:
            raise ValueError(
                f"input has dtype {input.dtype} and the weights {dtype}; convert either"
            )

    @torch._disable_dynamo  # pyright: ignore  # like the plain layer, not part of the graph
    def forward(self, input: Any, hx: Any = None) -> Any:
        """The plain layer's forward pass with the effective weights."""
        net = cast(Any, self)
        if all(isinstance(form, FullRank) for form in self.forms.values()):
            return cast(Any, super()).forward(input, hx)
        packed = isinstance(input, PackedSequence)
        if not packed and input.dim() == 2:
            axis = 0 if net.batch_first else 1
            y, states = self.forward(input.unsqueeze(axis), _map(hx, lambda s: s.unsqueeze(1)))
            return y.squeeze(axis), _map(states, lambda s: s.squeeze(1))
        x, sizes, order, back = input if packed else (input, None, None, None)
        states = self._first_states(x, sizes, hx, order)
        net.check_forward_args(x, states if net.mode == "LSTM" else states[0], sizes)
        executions = self._chosen(input, hx)
        swapped = net.batch_first and not packed
        y, states = self._run(x.transpose(0, 1) if swapped else x, sizes, states, executions)
        y = y.transpose(0, 1) if swapped else y
        states = tuple(s if back is None else s.index_select(1, back) for s in states)
        return (
            PackedSequence(y, sizes, order, back) if packed else y,
            states if net.mode == "LSTM" else states[0],
        )

    def _first_states(
        self, x: Tensor, sizes: Tensor | None, hx: Any, order: Tensor | None
    ) -> States:
        net = cast(Any, self)
        if hx is not None:
            given = tuple(hx) if net.mode == "LSTM" else (hx,)
            return tuple(s if order is None else s.index_select(1, order) for s in given)
        shapes = [net.get_expected_hidden_size(x, sizes)]
        if net.mode == "LSTM":
            shapes.append(net.get_expected_cell_size(x, sizes))
        return tuple(x.new_zeros(shape) for shape in shapes)

    def _chosen(self, input: Any, hx: Any) -> dict[str, str]:
        """The name of the execution of each weight that is not full-rank."""
        calls = type(self).calls(self, {"input": input, "hx": hx})
        return {
            name: self.execution(self.resolved(name), calls[name][0]).name
            for name, form in self.forms.items()
            if not isinstance(form, FullRank)
        }

    def _run(
        self, x: Tensor, sizes: Tensor | None, states: States, executions: Mapping[str, str]
    ) -> tuple[Tensor, States]:
        """Run the layers in turn, or all in one kernel call; time is the first dimension."""
        net = cast(Any, self)
        directions = 1 + net.bidirectional
        if not any(execution in _APART for execution in executions.values()):
            flat = [self._whole(name) for name in net._flat_weights_names]
            return run_kernel(
                net.mode, x, sizes, states, flat, net.bias, self.training,
                net.num_layers, net.dropout, net.bidirectional,
            )  # fmt: skip
        last: list[States] = []
        for layer in range(net.num_layers):
            if layer and net.dropout:
                x = F.dropout(x, net.dropout, self.training)
            outputs: list[Tensor] = []
            for i in range(layer * directions, (layer + 1) * directions):
                names, own = net._all_weights[i], tuple(s[i] for s in states)
                y, ended = self._direction(names, x, sizes, own, executions, i > layer * directions)
                outputs.append(y)
                last.append(ended)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _direction(
        self,
        names: list[str],
        x: Tensor,
        sizes: Tensor | None,
        states: States,
        executions: Mapping[str, str],
        reverse: bool,
    ) -> tuple[Tensor, States]:
        ih, hh = names[:2]
        biases = tuple(getattr(self, name) for name in names if name.startswith("bias"))
        out = tuple(name for name in names if name.startswith("weight_hr"))
        x, into = self._input_side(ih, x, executions.get(ih, ""))
        one = Direction(
            cast(Any, self).mode,
            into,
            self._branches(hh, executions.get(hh, "")),
            biases,
            self._branches(out[0], executions.get(out[0], "")) if out else (),
        )
        reverse_time = _time_reversal(sizes, x.device) if reverse else _same
        y, ended = run_direction(one, reverse_time(x), sizes, states, self.training)
        return reverse_time(y), ended

    def _input_side(self, name: str, x: Tensor, execution: str) -> tuple[Tensor, Tensor]:
        """The input and the input matrix of the kernel."""
        if execution not in _APART:
            return x, self._whole(name)
        *branches, (*first, last) = self._branches(name, execution)
        inner = chain(x, tuple(first)).to(x.dtype)  # the kernel needs x's dtype under autocast too
        if not branches:
            return inner, last
        return torch.cat((x, inner), -1), torch.cat((branches[0][0], last), 1)

    def _branches(self, name: str, execution: str) -> tuple[Factors, ...]:
        if execution not in _APART:
            return ((self._whole(name),),)
        form, weight = self.forms[name], self.resolved(name)
        assert not isinstance(form, FullRank)
        parameters = in_base_dtype(weight, read_parameters(self))
        factors = weight.factors(parameters)
        if isinstance(form, LowRank):
            return (factors,)
        *first, last = factors
        return (weight.base(parameters),), (*first, last * form.scale)

    def _whole(self, name: str) -> Tensor:
        """The parameter or effective weight, in the parameters' dtype even under autocast."""
        parameters = read_parameters(self)
        if (parameter := parameters.get(name)) is not None:
            return parameter
        device = next(iter(parameters.values())).device.type
        if device == "meta":
            return self.effective_weight(name)
        with torch.autocast(device, enabled=False):
            return self.effective_weight(name)


class RankedLSTM(_Recurrent, nn.LSTM):  # pyright: ignore
    """An LSTM whose matrices are each in one of the three forms."""

    plain = nn.LSTM


class RankedGRU(_Recurrent, nn.GRU):  # pyright: ignore
    """A GRU whose matrices are each in one of the three forms."""

    plain = nn.GRU


class RankedRNN(_Recurrent, nn.RNN):  # pyright: ignore
    """An Elman network whose matrices are each in one of the three forms."""

    plain = nn.RNN


def _map(states: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the states: a tensor, a tuple of tensors, or None."""
    if states is None:
        return None
    return tuple(map(change, states)) if isinstance(states, tuple | list) else change(states)


def _same(x: Tensor) -> Tensor:
    return x


def _time_reversal(sizes: Tensor | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that reverses each sequence in time; applied twice it restores them."""
    if sizes is None:
        return lambda x: x.flip(0)
    rows = mirror(sizes).to(device)
    return lambda x: x.index_select(0, rows)
