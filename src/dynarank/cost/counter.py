"""A FLOP counter for training steps: ``torch.utils.flop_counter``, with its gaps filled.

FlopCounterMode counts the weight gradient of a grouped convolution once per group, does not know
the grouped matrix product of mixture-of-experts layers, and sees nothing inside fused kernels. The
first two get a formula here. Fused attention and recurrent kernels are avoided: the same layers
run as matrix products, which are counted, with the same result on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynarank.cost.meta_results import RememberedMetaResults
from dynarank.layers import Flops

__all__ = ["count_step"]


def count_step(
    model: nn.Module, forward: Callable[[], Any], loss: Callable[[Any], Tensor]
) -> Flops:
    """Count the FLOPs of one forward and backward pass.

    Args:
        model: the module that ``forward`` runs.
        forward: runs the forward pass and returns its output.
        loss: a function from that output to a scalar.

    Example:
        >>> model, x = nn.Linear(8, 4), torch.ones(2, 8)
        >>> count_step(model, lambda: model(x), torch.sum)
        Flops(forward=128, training=256)
    """
    from torch.utils.flop_counter import FlopCounterMode

    formulas: dict[Any, Any] = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    if hasattr(torch.ops.aten, "_grouped_mm"):
        formulas[torch.ops.aten._grouped_mm] = _grouped_mm_flops
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.enable_grad(), _counted_kernels(model), RememberedMetaResults(), counter:
        output = forward()
        flops = counter.get_total_flops()
        scalar = loss(output)
        if scalar.requires_grad:
            scalar.backward()
        return Flops(flops, counter.get_total_flops())


@contextmanager
def _counted_kernels(model: nn.Module) -> Generator[None]:
    """Run attention and recurrent layers as matrix products instead of fused kernels."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:  # only then: convolutions without these libraries are slow
            for library in (torch.backends.mkldnn, torch.backends.cudnn):
                stack.callback(setattr, library, "enabled", library.enabled)
                setattr(library, "enabled", False)  # noqa: B010
        yield


def _convolution_backward_flops(
    dy: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    *rest: Any,
    out_shape: object = None,
    **named: Any,
) -> int:
    """The backward FLOPs of a convolution: those of forward for each of its two gradients."""
    transposed, wanted = rest[4], rest[7]
    positions = (x if transposed else dy)[2:]
    forward = 2 * dy[0] * math.prod(positions) * math.prod(weight)
    return forward * (wanted[0] + wanted[1])


def _grouped_mm_flops(
    a: Sequence[int], b: Sequence[int], *rest: Any, out_shape: object = None, **named: Any
) -> int:
    """The FLOPs of products of groups of rows, or of columns, with a matrix each.

    Together, the groups have as many rows (or columns) as the operand that is split into them.
    """
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]
