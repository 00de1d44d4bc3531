"""What a cut of a square matrix calls of ``torch.linalg``, and what it could call instead.

A decay computes these for each matrix at each cut, on the device of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Times

__all__ = ["run"]

_DRIVERS = {"cpu": [None], "cuda": [None, "gesvd", "gesvdj", "gesvda"]}


def run(bench: Bench) -> None:
    """Time each function, the fastest kinds first."""
    size = bench.sizes.matrix
    matrix = torch.randn(size, size, device=bench.device.torch)
    steps: dict[str, Callable[[], object]] = {}
    for name, (rows, step) in _functions(matrix, bench.device.kind).items():
        key = f"{name}, {rows} x {rows}"
        bench.put(key, function=name, rows=rows)
        steps[key] = step

    def told(key: str, times: Times) -> None:
        bench.put(key, **spread(times))

    bench.alternate(steps, told, repeats=1)


def _functions(matrix: Tensor, device: str) -> dict[str, tuple[int, Callable[[], object]]]:
    """The size and the call of each function, by its name.

    Singular values are those of the core of a product of two factors, at the first cut's rank.
    """
    size, rank = len(matrix), len(matrix) * 5 // 8
    gram, core = matrix @ matrix.T, matrix[:rank, :rank].contiguous()
    double = gram[:rank, :rank].double()
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "eigh, fp32": (size, lambda: torch.linalg.eigh(gram)),
        "eigh, fp64": (size, lambda: torch.linalg.eigh(gram.double())),
        "qr, fp32": (size, lambda: torch.linalg.qr(matrix)),
        "pinv of a symmetric one, fp64": (
            rank, lambda: torch.linalg.pinv(double, hermitian=True),
        ),
        "svd, fp32, on the CPU": (rank, lambda: _moved(torch.linalg.svd(core.cpu()), device)),
    }  # fmt: skip
    for driver in _DRIVERS[device]:
        name = f"svd, fp32, {driver or 'as it is by default'}"
        found[name] = rank, lambda driver=driver: torch.linalg.svd(core, driver=driver)
    return found


def _moved(parts: tuple[Tensor, ...], device: str) -> list[Tensor]:
    """The parts on the device."""
    return [part.to(device) for part in parts]
