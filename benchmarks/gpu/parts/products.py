"""Thin against full products: forward and backward of ``x W`` and of ``(x V) U``, in bf16.

Plain products of torch, without a layer around them. All steps are asked for before the device
begins: Python takes longer than small ones, and its time is beside theirs. The same tensors are
used in each step, so small ones stay in the cache of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Times

__all__ = ["run"]

_SHARES = 4, 8, 16
_REPEATS = 10


def run(bench: Bench) -> None:
    """Time each width with each number of rows."""
    for width in bench.sizes.products:
        for tokens in bench.sizes.tokens:
            if bench.deadline.passed:
                return
            _row(bench, width, tokens)


def _row(bench: Bench, width: int, tokens: int) -> None:
    ranks = {"full": 0} | {f"rank d/{share}": width // share for share in _SHARES}
    keys = {f"d = {width}, {tokens} tokens: {name}": rank for name, rank in ranks.items()}
    steps: dict[str, Callable[[], None]] = {}
    for (name, rank), key in zip(ranks.items(), keys, strict=True):
        with bench.attempt(key):
            flops = 6 * tokens * (2 * width * rank if rank else width * width)
            bench.put(key, width=width, tokens=tokens, form=name, rank=rank or width, flops=flops)
            steps[key] = partial(_step, *_tensors(bench, width, tokens, rank))

    def told(key: str, times: Times) -> None:
        bench.put(key, **spread(times))

    bench.alternate(steps, told, repeats=min(_REPEATS, 10 * bench.sizes.repeats), ahead=True)


def _tensors(
    bench: Bench, width: int, tokens: int, rank: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The input, the gradient of the output, and the weight or its factors."""
    kind = {"device": bench.device.torch, "dtype": torch.bfloat16}
    x, gradient = (torch.randn(tokens, width, **kind) for _ in range(2))
    shapes = [(width, rank), (rank, width)] if rank else [(width, width)]
    weights = [torch.randn(*shape, **kind).mul_(0.02).requires_grad_() for shape in shapes]
    return x.requires_grad_(), gradient, weights


def _step(x: Tensor, gradient: Tensor, weights: list[Tensor]) -> None:
    y = x
    for weight in weights:
        y = y @ weight
    torch.autograd.grad(y, [x, *weights], gradient)
