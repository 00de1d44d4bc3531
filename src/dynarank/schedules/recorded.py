"""Recorded decisions: replayed as a schedule, or decided again from the recorded readings.

Records are plain data, the parsed lines of ``records.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from dynarank.forms import Form, FullRank, Plan, Within
from dynarank.schedules.base import Clock, Decision, RankSchedule, Readings, step_of
from dynarank.schedules.readings import SpectralReading

__all__ = [
    "Replay",
    "decide_again",
    "replay",
    "spectra_from_records",
]


@dataclass(frozen=True)
class Replay(RankSchedule):
    """A schedule that replays recorded decisions, each from its step on.

    Args:
        before: the form of a layer before its first decision.
        decisions: the decisions, in any order; of several for one layer and step the last counts.

    Example:
        >>> from dynarank.forms import FullRank, LowRank
        >>> schedule = Replay(LowRank(2), (Decision(5, "a", FullRank(), "a rule"),))
        >>> schedule(Clock(5, 10), Readings({"a": (8, 8), "b": (8, 8)}))
        {'a': FullRank(), 'b': LowRank(rank=2, decomposition='svd')}
    """

    before: Form
    decisions: tuple[Decision, ...] = ()

    def __post_init__(self) -> None:
        in_order = sorted(self.decisions, key=lambda decision: decision.step)
        object.__setattr__(self, "decisions", tuple(in_order))

    def __call__(self, clock: Clock, readings: Readings, /) -> Plan:
        """The form last decided for each layer.

        Raises:
            ValueError: a decision is about a layer that is not scheduled.
        """
        plan = dict.fromkeys(readings.layers, self.before)
        for decision in self.decisions:
            if decision.path not in plan:
                raise ValueError(
                    f"the decision at step {decision.step} is about the layer {decision.path!r}, "
                    f"which is not scheduled ({', '.join(plan)}); give the layers of the recorded "
                    "run"
                )
            if decision.step <= clock.step:
                plan[decision.path] = decision.form
        return plan


def replay(decisions: Iterable[Decision | Mapping[str, Any]], before: Form) -> Replay:
    """A schedule that replays recorded decisions step by step, regardless of the readings.

    Args:
        decisions: decisions, or a run's records as plain data; records of other kinds are ignored.
        before: the form of a layer before its first decision.

    Raises:
        ValueError: a decision with an unknown form.

    Example:
        >>> from dynarank.forms import LowRank
        >>> line = {"kind": "decision", "epoch": 0.5, "step": 5, "path": "a", "reason": "a rule",
        ...         "form": {"form": "full-rank"}, "readings": {"effective_rank": 1.5}}
        >>> replay([line], LowRank(2)).decisions[0].form
        FullRank()
    """
    made = (
        one if isinstance(one, Decision) else _decision(one)
        for one in decisions
        if isinstance(one, Decision) or one.get("kind", "decision") == "decision"
    )
    return Replay(before, tuple(made))


def _decision(data: Mapping[str, Any]) -> Decision:
    """The decision in a record; non-finite numbers, which JSON lacks, are stored as strings."""
    figures = {name: float(value) for name, value in data["readings"].items()}
    kept = {f.name: data[f.name] for f in fields(Decision)}
    return Decision.from_data({**kept, "readings": figures})


def spectra_from_records(
    records: Iterable[Mapping[str, Any]],
) -> dict[int, dict[str, SpectralReading]]:
    """The spectra of a run's records, by step and layer.

    Args:
        records: the lines of ``records.jsonl`` as plain data; other kinds are ignored.

    Example:
        >>> layer = {"effective_rank": 1.5, "stable_rank": 1.25, "energy_rank": 2, "rank": 1,
        ...          "spectral_ratio": 0.75, "full_rank": 8}
        >>> found = spectra_from_records([{"kind": "spectrum", "step": 5, "layers": {"a": layer}}])
        >>> found[5]["a"].effective_rank
        1.5
    """
    found: dict[int, dict[str, SpectralReading]] = {}
    for record in records:
        if record.get("kind") == "spectrum":
            layers = {path: _reading(layer) for path, layer in record["layers"].items()}
            found.setdefault(int(record["step"]), layers)
    return found


def _reading(data: Mapping[str, Any]) -> SpectralReading:
    """The reading in a record; non-finite numbers, which JSON lacks, are stored as strings."""
    numbers: dict[str, Any] = {
        name: float(value) if isinstance(value, str) else value
        for name, value in data.items()
        if name != "values"
    }
    return SpectralReading(**numbers, values=tuple(map(float, data.get("values", ()))))


def decide_again(
    schedule: RankSchedule,
    layers: Mapping[str, tuple[int, ...]],
    total_steps: int,
    spectra: Mapping[int, Mapping[str, SpectralReading]],
    *,
    before: Form = FullRank(),  # noqa: B008 (frozen)
    changes: Mapping[int, Mapping[str, Form]] | None = None,
) -> list[Decision]:
    """Recompute a schedule's decisions from recorded readings; they should equal the recorded ones.

    Args:
        schedule: the schedule of the run.
        layers: the shapes of the weights, by path.
        total_steps: the number of steps of the run.
        spectra: the spectra that the schedule was given, by step; those of steps at which it does
            not read any are ignored.
        before: the form of the layers before the first plan was applied.
        changes: the actual changes of form after a step, by step and path. None: every planned
            change was made at once.

    Example:
        >>> from dynarank.schedules.library.closed_loop import ClosedLoop
        >>> schedule = ClosedLoop(2, patience=1, warmup=0.0)
        >>> spectra = {step: {"a": SpectralReading(rank, 2.0, 3, 1.0, rank=9, full_rank=9)}
        ...            for step, rank in ((1, 8.0), (2, 4.0))}
        >>> [(d.step, d.reason) for d in decide_again(schedule, {"a": (9, 9)}, 10, spectra)]
        [(2, 'effective rank has fallen from its best')]
    """
    every = schedule.spectra_every
    stride = None if every is None else max(1, step_of(every, total_steps))
    state, forms = schedule.start(), dict[str, Form].fromkeys(layers, before)
    found: list[Decision] = []
    for done in range(total_steps + 1):  # after the last step too, where the clock does not advance
        clock = Clock(min(done, total_steps - 1), total_steps)
        seen = spectra.get(done, {}) if stride and done % stride == 0 else {}
        plan, state, decisions = schedule.update(
            state, clock, Readings(layers, forms=forms, spectra=seen)
        )
        found += decisions
        if changes is None or done == 0:
            forms = {path: one for path, one in plan.items() if not isinstance(one, Within)}
        else:
            forms = {**forms, **changes.get(done, {})}
    return found
