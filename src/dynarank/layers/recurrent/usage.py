"""The calls of a recurrent module's matrices in a forward pass: rows, steps and gradients.

The rows of the initial state need no gradient, unless a state was given that does: they are *idle*.
(In a packed sequence, the first step of the reverse direction is the last row of each of the
longest sequences; if the factors are not joined, it is the last row of all sequences, and a few
more rows are idle.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dynarank.decompositions import Geometry
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers.execution import Call, Execution, Flops
from dynarank.layers.tracing import input_shape
from dynarank.layers.weight import WeightSpec

__all__ = ["SequenceCall", "recurrent_calls"]

# The overhead of a training step of the Python loop over one of torch's kernel, in FLOPs: the loop
# is slower if it saves 35 MFLOP per step or less, and faster from 42 MFLOP on (fp32 LSTM, hidden
# 128 to 1024, batch 8 to 64; one core of an AMD EPYC, 2026-11).
_STEP = 42_000_000
# On other devices a kernel step is far cheaper than launches from Python: never chosen by "auto".
_NEVER = 10**15


@dataclass(frozen=True)
class SequenceCall(Call):
    """The product of a sequence with a matrix of a recurrent layer.

    Args:
        idle: the number of input rows that need no gradient although the others do.
        steps: the number of sequential products; 0: a single product of all rows.
    """

    idle: int = 0
    steps: int = 0

    def own_executions(self, spec: WeightSpec, form: Form) -> list[Execution]:
        """The executions with one matrix in the kernel, and those with separate factors."""
        whole = self._product(math.prod(spec.shape), self.input_grad)
        if isinstance(form, FullRank):
            return [Execution("full-rank", whole)]
        join = spec.decomposition(form).join_flops(spec.shape, form.resolved_rank)
        formed = whole + Flops(join, join * (1 + 2 * self.trains))
        names = ("factored", "joined") if isinstance(form, LowRank) else ("two-branch", "merged")
        found = [
            Execution(names[0], self._apart(spec, form), overhead=self._overhead()),
            Execution(names[1], formed, keep=True),
        ]
        return [one for one in found if form.execution in ("auto", one.name)]

    def _apart(self, spec: WeightSpec, form: LowRank | Adapted) -> Flops:
        """The FLOPs of the factors in turn, and of the base if there is one."""
        first, *others = (math.prod(shape) for shape in spec.factor_shapes(form))
        inner = self.input_grad or self.trains
        chain = self._product(first, self.input_grad)
        for entries in others:
            chain += self._product(entries, inner, all_rows=self.trains)
        if isinstance(form, LowRank):
            return chain
        base = math.prod(spec.shape)
        if self.steps:
            return chain + self._product(base, self.input_grad, trains=False)
        return chain + self._product(base, inner)  # the kernel sees base and factor as one matrix

    def _product(
        self, entries: int, back: bool, *, all_rows: bool = False, trains: bool | None = None
    ) -> Flops:
        rows = self.shape[0]
        forward = 2 * rows * entries
        returned = 2 * (rows if all_rows else rows - self.idle) * entries * back
        return Flops(
            forward, forward + returned + forward * (self.trains if trains is None else trains)
        )

    def _overhead(self) -> int:
        return self.steps * (_STEP if self.device in ("cpu", "meta") else _NEVER)


@dataclass(frozen=True)
class _Sequence:
    """The number of sequences at each step, and whether the given states need gradients."""

    sizes: tuple[int, ...]
    given: tuple[bool, ...]
    device: str


def recurrent_calls(
    net: nn.RNNBase, input: Any, hx: Any, names: Mapping[str, Sequence[str]]
) -> dict[str, list[Call]]:
    """The calls of a recurrent module, one per matrix.

    Args:
        net: the module.
        input: the input of its forward pass.
        hx: the initial states of its forward pass, or None.
        names: for each matrix, the names of the parameters that form it.
    """
    x = input.data if isinstance(input, PackedSequence) else cast(Tensor, input)
    grad = torch.is_grad_enabled()
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    given = tuple(grad and s.requires_grad for s in states) or (False,)
    sequence = _Sequence(_sizes(net, input), given, x.device.type)
    width, flows, directions = input_shape(x)[-1], grad and x.requires_grad, 1 + net.bidirectional
    found: dict[str, list[Call]] = {}
    listed = cast(list[list[str]], cast(Any, net)._all_weights)
    for layer in range(net.num_layers):
        carried = False
        for i in range(directions):
            own = listed[layer * directions + i]
            trains = {name: grad and _trains(net, names.get(name, (name,))) for name in own}
            found |= _direction(net, sequence, width, flows, trains, bool(i))
            carried |= flows or any(given) or any(trains.values())
        width, flows = (net.proj_size or net.hidden_size) * directions, carried
    return found


def _direction(
    net: nn.RNNBase,
    sequence: _Sequence,
    width: int,
    flows: bool,
    trains: Mapping[str, bool],
    reverse: bool,
) -> dict[str, list[Call]]:
    """The calls of one layer in one direction; ``flows``: whether its input needs a gradient."""
    sizes, rows = sequence.sizes, sum(sequence.sizes)
    first = sizes[-1] if reverse else sizes[0]
    gates = flows or any(sequence.given) or any(t for n, t in trains.items() if "hr" not in n)
    carried = gates or any(trains.values())
    idle = {"ih": 0, "hh": 0 if sequence.given[0] else first, "hr": 0 if gates else first}
    widths = {"ih": width, "hh": net.proj_size or net.hidden_size, "hr": net.hidden_size}
    found: dict[str, list[Call]] = {}
    for name, its in trains.items():
        kind = name.split("_")[1]
        if name.startswith("weight"):
            wanted = flows if kind == "ih" else carried
            found[name] = [
                SequenceCall(
                    (rows, widths[kind]),
                    Geometry(),
                    wanted,
                    its,
                    device=sequence.device,
                    idle=idle[kind] if wanted else 0,
                    steps=0 if kind == "ih" else len(sizes),
                )
            ]
    return found


def _sizes(net: nn.RNNBase, input: Any) -> tuple[int, ...]:
    """The number of sequences at each step."""
    if isinstance(input, PackedSequence):
        return tuple(input.batch_sizes.tolist())
    if input.dim() == 2:
        return (1,) * input_shape(input)[0]
    steps, batch, _ = input_shape(input)
    if net.batch_first:
        steps, batch = batch, steps
    return (batch,) * steps


def _trains(net: nn.Module, names: Sequence[str]) -> bool:
    return any(getattr(net, name).requires_grad for name in names)
