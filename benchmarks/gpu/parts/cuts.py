"""Functions of ``torch.linalg`` that cuts call, and drivers that they could ask for.

Not each cut calls all of them: the first one decomposes matrices and second moments, later ones
work on factors. A driver that does not converge is replaced by another, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Times

__all__ = ["run"]

_DRIVERS = {"cpu": [None], "cuda": [None, "gesvd", "gesvdj", "gesvda"]}
_RANK = 3 / 8  # of the width: what two cuts to a quarter of the FLOPs leave first

_Call = tuple[Tensor, Callable[[Tensor], object]]


def run(bench: Bench) -> None:
    """Time each function."""
    size = bench.sizes.matrix
    matrix = torch.randn(size, size, device=bench.device.torch)
    steps: dict[str, Callable[[], object]] = {}
    for name, (given, call) in _functions(matrix, bench.device.kind).items():
        rows, columns = given.shape
        key = f"{name}, {rows} x {columns}"
        bench.put(key, function=name, rows=rows, columns=columns)
        steps[key] = partial(call, given)

    def told(key: str, times: Times) -> None:
        bench.put(key, **spread(times))

    bench.alternate(steps, told, repeats=1)


def _functions(matrix: Tensor, device: str) -> dict[str, _Call]:
    """The matrix that each function is given, and its call, by its name."""
    rank = int(len(matrix) * _RANK)
    gram, core = matrix @ matrix.T, matrix[:rank, :rank].contiguous()
    tall = torch.cat([matrix] * 4)  # as the wider ones of a block
    linalg = torch.linalg
    found: dict[str, _Call] = {
        "eigh, fp32": (gram, linalg.eigh),
        "eigh, fp64": (gram.double(), linalg.eigh),
        "qr, fp32": (matrix, linalg.qr),
        "tall qr, fp32": (tall, linalg.qr),
        "tall qr, fp64": (tall.double(), linalg.qr),
        "pinv of a symmetric one, fp64": (
            gram[:rank, :rank].double(), partial(linalg.pinv, hermitian=True),
        ),
        "svd, fp32, on the CPU": (
            core, lambda given: [part.to(device) for part in linalg.svd(given.cpu())],
        ),
    }  # fmt: skip
    for driver in _DRIVERS[device]:
        name = f"svd, fp32, {driver or 'as it is by default'}"
        found[name] = core, partial(linalg.svd, driver=driver)
    return found
