"""What a rank scheduler does in a run, as records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from dynarank.form_data import form_to_data
from dynarank.forms import Change, Plan, form_name
from dynarank.records import ChangeRecord, DecisionRecord, PhaseRecord, Record
from dynarank.schedules.base import Decision

__all__ = ["RankEvents", "phase_record"]


class RankEvents:
    """Writes the decisions of a schedule and the changes of form that followed.

    Args:
        write: called with each record.
        epoch_at: the epochs done at a step.
    """

    def __init__(self, write: Callable[[Record], None], epoch_at: Callable[[int], float]) -> None:
        self.write, self.epoch_at = write, epoch_at
        self.known = 0  # decisions recorded so far

    def decided(self, decisions: Sequence[Decision]) -> None:
        """Record the decisions since the last call; all of the run are given."""
        for decision in decisions[self.known :]:
            self.write(
                DecisionRecord(
                    epoch=self.epoch_at(decision.step),
                    step=decision.step,
                    path=decision.path,
                    form=form_to_data(decision.form),
                    reason=decision.reason,
                    readings=dict(decision.readings),
                )
            )
        self.known = len(decisions)

    def changed(self, step: int, changes: Sequence[Change]) -> None:
        """Record the changes of form after a step."""
        for change in changes:
            self.write(
                ChangeRecord(
                    epoch=self.epoch_at(step),
                    step=step,
                    path=change.path,
                    before=form_to_data(change.before),
                    after=form_to_data(change.after),
                    error=change.error,
                    update_error=change.update_error,
                )
            )


def phase_record(
    model: nn.Module,
    plan: Plan,
    *,
    epoch: float,
    step: int,
    predicted_flops: int,
    counted_flops: int | None,
    relative_flops: float,
    memory_bytes: int | None,
    processes: int = 1,
) -> PhaseRecord:
    """The record of a phase that begins at this step: the forms and parameters of the model."""
    parameters = list(model.parameters())
    return PhaseRecord(
        epoch=epoch,
        step=step,
        forms=dict(Counter(form_name(form) for form in plan.values())),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
        predicted_flops=predicted_flops,
        counted_flops=counted_flops,
        relative_flops=relative_flops,
        memory_bytes=memory_bytes,
        processes=processes,
        all_reduced_bytes_per_step=gradient_bytes(model) if processes > 1 else 0,
    )


def gradient_bytes(model: nn.Module) -> int:
    """The size of the gradients that a step gives: those of the trainable parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
