"""One direction of a recurrent layer: by torch's fused kernel, or step by step with factors.

Legend: T steps, B sequences, N = TB rows (the rows of a packed sequence); h the hidden size, g the
number of gates; a *branch* is a chain of matrices, a recurrent matrix the sum of its branches.

The kernel takes one input matrix and one recurrent matrix. Factors of the input matrix can be moved
outside exactly: all but the last are applied to the whole sequence beforehand, and the last one is
the kernel's input matrix. Factors of the recurrent matrix cannot: they must be applied at each
step, in a Python loop. The loop pays off if a step saves more than the loop costs (see
``layers.recurrent.usage``).

Equations as in the documentation of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dynarank.decompositions import Factors, Geometry
from dynarank.decompositions.geometry import apply

__all__ = [
    "CELLS",
    "GATES",
    "Direction",
    "States",
    "chain",
    "mirror",
    "run_direction",
    "run_kernel",
]

States: TypeAlias = tuple[Tensor, ...]  # (h,), or (h, c) for an LSTM

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}

_KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


@dataclass(frozen=True)
class Direction:
    """The matrices of one layer in one direction.

    Args:
        mode: ``nn.RNNBase.mode``.
        into: the input matrix (gh, columns of the input).
        state: the branches of the recurrent matrix.
        biases: the two biases, of the input and of the recurrent matrix, or none.
        out: the branches of the matrix that projects h (``proj_size``); empty without.
    """

    mode: str
    into: Tensor
    state: tuple[Factors, ...]
    biases: tuple[Tensor, ...] = ()
    out: tuple[Factors, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether no matrix is factored, as the kernel requires."""
        return all(len(b) == 1 and len(b[0]) == 1 for b in (self.state, self.out) if b)

    @property
    def weights(self) -> list[Tensor]:
        """The arguments of the kernel, in its order."""
        return [self.into, self.state[0][0], *self.biases, *(b[0] for b in self.out)]


def run_direction(
    one: Direction, x: Tensor, sizes: Tensor | None, states: States, training: bool
) -> tuple[Tensor, States]:
    """Run one layer forward in time.

    Args:
        one: the matrices.
        x: (T, B, columns), or (N, columns) if packed.
        sizes: the ``batch_sizes`` of a packed sequence; None if it is not packed.
        states: the initial states, each (B, size).
        training: whether the module is in training mode.

    Returns:
        The outputs and the final states.
    """
    if not one.whole:
        return _loop(one, x, sizes, states)
    first = tuple(s.unsqueeze(0) for s in states)
    y, last = run_kernel(one.mode, x, sizes, first, one.weights, bool(one.biases), training)
    return y, tuple(s.squeeze(0) for s in last)


def run_kernel(
    mode: str,
    x: Tensor,
    sizes: Tensor | None,
    states: States,
    weights: Sequence[Tensor],
    bias: bool,
    training: bool,
    layers: int = 1,
    dropout: float = 0.0,
    both: bool = False,
) -> tuple[Tensor, States]:
    """Run torch's own kernel; ``states`` are (layers * directions, B, size)."""
    hx = states if mode == "LSTM" else states[0]
    options = (bias, layers, dropout, training, both)
    with warnings.catch_warnings():
        if x.is_cuda:  # weights that are recomputed each time are not contiguous in memory
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        if sizes is None:
            y, *last = _KERNELS[mode](x, hx, list(weights), *options, False)
        else:
            y, *last = _KERNELS[mode](x, sizes, hx, list(weights), *options)
    return y, tuple(last)


def mirror(sizes: Tensor) -> Tensor:
    """The row indices that reverse each sequence of a packed batch; an involution.

    Example:
        >>> mirror(torch.tensor([2, 2, 1]))  # sequences of lengths 3 and 2: rows a0 b0 a1 b1 a2
        tensor([4, 3, 2, 1, 0])
    """
    offsets = sizes.cumsum(0) - sizes
    step = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    sequence = torch.arange(len(step), device=sizes.device) - offsets[step]
    rows = torch.arange(int(sizes[0]), device=sizes.device)
    lengths = (sizes.unsqueeze(0) > rows.unsqueeze(1)).sum(1)
    return offsets[lengths[sequence] - 1 - step] + sequence


def chain(x: Tensor, factors: Factors, bias: Tensor | None = None) -> Tensor:
    """Multiply ``x`` by one matrix after another."""
    return apply(x, factors, (Geometry(),) * len(factors), bias)


def _product(x: Tensor, branches: Sequence[Factors], bias: Tensor | None = None) -> Tensor:
    y = chain(x, branches[0], bias)
    for branch in branches[1:]:
        y = y + chain(x, branch)
    return y


def _loop(one: Direction, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
    """Run step by step; the input is multiplied once beforehand, as in the kernel."""
    into, back = one.biases or (None, None)
    gates, cell = F.linear(x, one.into, into), CELLS[one.mode]
    outputs: list[Tensor] = []
    ended: list[States] = []  # the final states of finished sequences, the shortest first
    for gate in gates.unbind(0) if sizes is None else gates.split(cast(Any, sizes.tolist())):
        rows = len(gate)
        if rows < len(states[0]):
            ended.append(tuple(s[rows:] for s in states))
            states = tuple(s[:rows] for s in states)
        states = cell(gate, _product(states[0], one.state, back), states)
        if one.out:
            states = (_product(states[0], one.out), *states[1:])
        outputs.append(states[0])
    last = zip(states, *reversed(ended), strict=True)
    y = torch.stack(outputs) if sizes is None else torch.cat(outputs)
    return y, tuple(torch.cat(parts) if ended else parts[0] for parts in last)


def _lstm(into: Tensor, back: Tensor, states: States) -> States:
    i, f, g, o = (into + back).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(into: Tensor, back: Tensor, states: States) -> States:
    width = into.shape[-1] // 3
    r, z = torch.sigmoid(into[..., : 2 * width] + back[..., : 2 * width]).chunk(2, -1)
    n = torch.tanh(into[..., 2 * width :] + r * back[..., 2 * width :])
    return (n + z * (states[0] - n),)


def _tanh(into: Tensor, back: Tensor, states: States) -> States:
    return (torch.tanh(into + back),)


def _relu(into: Tensor, back: Tensor, states: States) -> States:
    return (torch.relu(into + back),)


CELLS: dict[str, Callable[[Tensor, Tensor, States], States]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
}
