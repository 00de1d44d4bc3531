"""Activation-aware truncation as a callback of the rank scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from dynarank.forms import Form
from dynarank.monitors.calibration import Calibration, calibrate
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.surgery.sites import Site
from dynarank.surgery.verbs import truncates

__all__ = ["ActivationAwareTruncation"]


class ActivationAwareTruncation(Callback):
    """Truncates weights so that their layers' outputs change least, see :func:`dynarank.calibrate`.

    A few batches are run through the model right before a truncation, and only then.

    Args:
        batches: called for the batches, as :func:`dynarank.calibrate` takes them.
        forward: how to run a batch, ``(model, batch) -> anything``, if the model needs more.
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Any]],
        *,
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        self.batches, self.forward = batches, forward

    def before_change(
        self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]
    ) -> Calibration | None:
        """Run the batches if a weight is going to be truncated."""
        if truncates(wanted):
            return calibrate(ranks.model, self.batches(), forward=self.forward)
        return None
