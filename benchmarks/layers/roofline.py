"""The roofline of a layer: the slower of arithmetic and memory, product by product.

seconds = sum over products of max(FLOPs / peak, bytes / bandwidth), peak and bandwidth measured on
the current machine by one large product and one large copy.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dynarank.decompositions import Geometry
from dynarank.decompositions.geometry import output_shape
from dynarank.layers.execution import map_flops

__all__ = ["Roofline", "machine_roofline"]


@dataclass(frozen=True)
class Roofline:
    """Peak FLOPs and bytes a second."""

    flops: float
    bandwidth: float

    def product(self, x: Sequence[int], weight: Sequence[int], geometry: Geometry) -> float:
        """Seconds of one product, forward: input and output once through memory, fp32."""
        y = output_shape(x, weight, geometry)
        moved = 4 * (math.prod(x) + math.prod(y) + math.prod(weight))
        return max(map_flops(x, weight, geometry) / self.flops, moved / self.bandwidth)

    def chain(
        self, x: Sequence[int], weights: Sequence[Sequence[int]], stages: Sequence[Geometry]
    ) -> float:
        """Seconds of a training step of a chain: each product forward and twice backward."""
        total = 0.0
        for weight, geometry in zip(weights, stages, strict=True):
            total += 3 * self.product(x, weight, geometry)
            x = output_shape(x, weight, geometry)
        return total


def machine_roofline() -> Roofline:
    """Measure the machine: a 2048-cubed product and a copy of 256 MiB."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(2**26), torch.empty(2**26)
    product = _median(lambda: a @ b)
    copy = _median(lambda: target.copy_(source))
    return Roofline(2 * 2048**3 / product, 2 * 4 * 2**26 / copy)


def _median(run: Callable[[], object]) -> float:
    found: list[float] = []
    for _ in range(6):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return statistics.median(found[1:])
