"""BatchNorm recalibration: running statistics computed again after a truncation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from dynarank.decompositions import UnfitWeightError
from dynarank.distributed.processes import Processes
from dynarank.forms import Change, LowRank, same_weight
from dynarank.layers.running import call_model, preserve_state
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.scheduler.pooled import as_many_batches, pool_batch_norms

__all__ = ["BatchNormRecalibration", "check_batches", "recalibrate_batch_norms"]

_ALONE = Processes()


class BatchNormRecalibration(Callback):
    """Recalibrates BatchNorm after each truncation during training.

    Statistics that are not finite, because a weight is not, are not stored: a warning says so.

    Args:
        batches: a function that returns the batches for :func:`recalibrate_batch_norms`, called at
            each truncation.

    Raises:
        ValueError: it is not a function, such as an iterator, which has batches only once.
    """

    def __init__(self, batches: Callable[[], Iterable[Any]]) -> None:
        self.batches = check_batches(batches)

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        """Recalibrate if a weight was truncated; the first plan is of an untrained model."""
        truncated = (
            isinstance(change.after, LowRank) and not same_weight(change.before, change.after)
            for change in changes
        )
        if ranks.last_step and any(truncated):
            try:
                batches = ranks.processes.attempt("batches", self.batches)
                recalibrate_batch_norms(ranks.model, batches, together=ranks.processes)
            except UnfitWeightError as error:
                said = f"step {ranks.last_step}: {error}"
                warnings.warn(said, RuntimeWarning, stacklevel=2)


@torch.no_grad()
def recalibrate_batch_norms(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    together: Processes = _ALONE,
) -> None:
    """Set every BatchNorm's running mean and variance to those of ``batches``.

    Truncating a weight changes the inputs of the BatchNorm that follows. Its running statistics
    adapt within about 1 / momentum steps; until then evaluation uses outdated ones. Weights, other
    buffers, module modes and the global random state do not change, nor do the running statistics
    if an exception is raised, or of a BatchNorm that no batch reaches or that is frozen: in
    evaluation mode while the model trains, or with a frozen weight. A model without BatchNorm is
    not run.

    Args:
        model: run in training mode, without gradients.
        batches: as :func:`dynarank.calibrate` takes them; a few hundred examples suffice.
        forward: as for :func:`dynarank.calibrate`.
        together: processes that have a replica each: the statistics are those of all batches.

    Raises:
        ValueError: no batch, such as from an iterator that is exhausted.
        UnfitWeightError: statistics that are not finite.

    Example:
        >>> norm = nn.BatchNorm1d(1, affine=False)
        >>> recalibrate_batch_norms(norm, [torch.tensor([[1.0], [3.0]])])
        >>> norm.running_mean.item()
        2.0
    """
    every = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    frozen = {path for path, norm in every.items() if _frozen(norm, model)}
    norms = {p: n for p, n in every.items() if p not in frozen and n.running_mean is not None}
    if not norms:
        return
    with preserve_state(model, training=True, grad=False), ExitStack() as momenta:
        for path in frozen:
            every[path].eval()
        for norm in norms.values():
            momenta.callback(setattr, norm, "momentum", norm.momentum)
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        as_many = as_many_batches(model, batches, together)
        run = lambda: _run(model, as_many, forward or call_model)  # noqa: E731
        together.attempt("BatchNorm recalibration", run)
        found = {path: dict(norm.named_buffers(recurse=False)) for path, norm in norms.items()}
        pool_batch_norms(found, together)
    for path, statistics in found.items():
        if not all(value.isfinite().all() for value in statistics.values()):
            raise UnfitWeightError(
                f"the inputs of BatchNorm {path!r} are not finite; all running statistics are left"
            )
    for path, statistics in found.items():
        for name, buffer in norms[path].named_buffers(recurse=False):
            if statistics["num_batches_tracked"]:
                buffer.copy_(statistics[name])


def check_batches(batches: Callable[[], Iterable[Any]]) -> Callable[[], Iterable[Any]]:
    """Raise ValueError unless it is a function that returns batches."""
    if not callable(batches):
        raise ValueError(
            "batches is a function that returns batches, called at each truncation, got "
            f"{batches!r}; give lambda: batches, which must not be an iterator: that ends"
        )
    return batches


def _frozen(norm: _BatchNorm, model: nn.Module) -> bool:
    """Whether its statistics are the user's choice: they do not move while the model trains."""
    still = norm.weight is not None and not norm.weight.requires_grad  # pyright: ignore[reportUnnecessaryComparison]
    others = any(p.requires_grad for p in model.parameters())
    return not norm.training and (model.training or (still and others))


def _run(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object]
) -> None:
    empty = True
    for batch in batches:
        forward(model, batch)
        empty = False
    if empty:
        raise ValueError(
            "there is no batch to recalibrate BatchNorm on; give a few, and not an iterator that "
            "has ended: a function that returns batches is called at each truncation"
        )
