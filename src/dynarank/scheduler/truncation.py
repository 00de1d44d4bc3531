"""Activation-aware truncation as a callback of the rank scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from dynarank.forms import Form
from dynarank.monitors.calibration import Calibration
from dynarank.scheduler.batch_norm import check_batches
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.scheduler.pooled import calibrate_together
from dynarank.surgery.sites import Site
from dynarank.surgery.transaction import truncates

__all__ = ["ActivationAwareTruncation"]


class ActivationAwareTruncation(Callback):
    """Makes truncations activation-aware: the layers' outputs change as little as possible.

    Right before each truncation, :func:`dynarank.calibrate` runs a few batches through the model.

    Args:
        batches: a function that returns the batches for :func:`dynarank.calibrate`.
        forward: ``(model, batch) -> anything``, if a batch is not just the model's arguments.

    Raises:
        ValueError: ``batches`` is not a function.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Any]],
        *,
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        self.batches, self.forward = check_batches(batches), forward

    def before_change(
        self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]
    ) -> Calibration | None:
        """Run the batches if a weight is going to be truncated."""
        if truncates(wanted):
            how = self.batches(), None, ranks.processes
            return calibrate_together(ranks.model, *how, forward=self.forward)
        return None
