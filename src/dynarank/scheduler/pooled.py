"""Statistics of the batches of all processes: each has only its share of the training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.decompositions.truncation import ActivationStats
from dynarank.distributed.processes import Processes
from dynarank.distributed.unit_class import is_unit
from dynarank.monitors.calibration import Calibration, calibrate
from dynarank.surgery.selection import LayerFilter
from dynarank.surgery.shared_edits import fit_everywhere

__all__ = ["as_many_batches", "calibrate_together", "pool_batch_norms"]


def calibrate_together(
    model: nn.Module,
    batches: Iterable[Any],
    layers: LayerFilter,
    together: Processes,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Calibration:
    """:func:`dynarank.calibrate` over the batches of all processes.

    E[v v'] = sum_i n_i E_i[v v'] / sum_i n_i, over the processes i and their n_i vectors v.
    """
    as_many = as_many_batches(model, batches, together)
    own = fit_everywhere(
        "the activation statistics",
        lambda: calibrate(model, as_many, layers=layers, forward=forward),
        together,
    )
    if together.size == 1:
        return own
    seen = {path: _layout(one) for path, one in own.items()}
    known: dict[str, Any] = {}
    for one in together.gather("the layers that batches reached", seen):
        known = {**one, **known}
    pooled = {path: _pooled(own.get(path), known[path], together) for path in sorted(known)}
    missed = {path: why for path, why in own.missed.items() if path not in pooled}
    return Calibration(pooled, missed)


def as_many_batches(model: nn.Module, batches: Iterable[Any], together: Processes) -> Iterable[Any]:
    """The batches to run in this process: as many as in each other, if processes run them together.

    That is so under FSDP2, which gathers parameters in each forward pass, and with SyncBatchNorm.
    """
    kinds = {type(module) for module in model.modules()}
    if together.size == 1 or not any(is_unit(k) or issubclass(k, nn.SyncBatchNorm) for k in kinds):
        return batches
    own = together.attempt("the batches", lambda: list(batches))
    return own[: min(together.gather("the number of batches", len(own)))]


def _layout(stats: ActivationStats) -> tuple[Any, ...]:
    return stats.side, tuple(stats.second.shape), stats.second.dtype, stats.mean is not None


def _pooled(
    own: ActivationStats | None, layout: tuple[Any, ...], together: Processes
) -> ActivationStats:
    """The statistics of all vectors; a process whose batches did not reach the layer adds none."""
    side, shape, dtype, centered = layout
    device = torch.device("cpu") if own is None else own.second.device
    second = torch.zeros(shape, dtype=dtype, device=device)
    mean = torch.zeros(shape[:-1], dtype=dtype, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    if own is not None:
        count += own.count
        mean = mean if own.mean is None else own.mean.to(dtype) * own.count
    together.sum(count)
    together.sum(mean)
    n = max(float(count), 1.0)
    mean /= n
    if own is not None:
        second = own.second.clone()
        if own.mean is not None:  # about the mean of all
            apart = own.mean.to(dtype) - mean
            second += apart[..., None] * apart[..., None, :]
        second *= own.count
    together.sum(second)
    return ActivationStats(side, second / n, int(n), mean if centered else None)


@torch.no_grad()
def pool_batch_norms(found: Mapping[str, Mapping[str, Tensor]], together: Processes) -> None:
    """Average running statistics in place over processes, by their numbers of batches."""
    for statistics in found.values() if together.size > 1 else ():
        count = statistics["num_batches_tracked"]
        own = count.double()
        total = own.clone()
        together.sum(total)
        for name in ("running_mean", "running_var"):
            value = statistics[name].double() * own
            together.sum(value)
            statistics[name].copy_(value / total.clamp(min=1))
        count.copy_(total)
