"""Activation-aware truncation under a schedule: weights truncated by what their layers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from dynarank.forms import Plan
from dynarank.monitors.calibration import Calibration, calibrate
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.surgery.verbs import differences, truncates

__all__ = ["ActivationAwareTruncation"]


class ActivationAwareTruncation(Callback):
    """Has weights that become low-rank keep the directions in which their outputs have energy.

    Right before weights are truncated, and only then, a few batches are run through the model, see
    :func:`dynarank.calibrate`.

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

    def before_change(self, ranks: Ranks, plan: Plan) -> Calibration | None:
        """Run the batches if a weight is going to be truncated."""
        if not truncates(differences(ranks.model, plan)):
            return None
        return calibrate(ranks.model, self.batches(), forward=self.forward)
