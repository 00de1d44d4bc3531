"""Synthetic runs on disk, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dynarank.records import (
    ChangeRecord,
    DecisionRecord,
    EpochRecord,
    HeatmapRecord,
    LayerSpectrum,
    Metric,
    PhaseRecord,
    RecordWriter,
    RunRecord,
    SpectrumRecord,
    StepRecord,
    SummaryRecord,
)

LOW = {"form": "low-rank", "rank": 8, "decomposition": "svd"}
FULL = {"form": "full-rank"}
ADAPTED = {"form": "adapted", "rank": 8, "decomposition": "svd"}
STEPS = 45

# For each schedule: what it starts as, then (epoch, form) for each change.
CHANGES = {
    "full-rank": (FULL, []),
    "low-rank": (LOW, []),
    "dynamic-rank": (LOW, [(4.4, FULL), (9.6, ADAPTED)]),
    "dynamic-rank-low": (LOW, [(4.4, FULL), (9.6, LOW)]),
    "relora": (ADAPTED, [(epoch, ADAPTED) for epoch in range(1, 12)]),
    "rotating": (LOW, []),  # its changes are written layer by layer
    "closed-loop": (LOW, []),
}
PERPLEXITY = Metric(name="perplexity", higher_is_better=False, percent=False)
MATTHEWS = Metric(name="Matthews correlation", percent=False)
COST = {"full-rank": 1.0, "low-rank": 0.567, "adapted": 1.22}


def write_run(
    folder: Path,
    schedule: str = "dynamic-rank",
    *,
    seed: int = 0,
    layers: list[str] | int = 3,
    finished: bool = True,
    epochs: int = 12,
    accuracy: float = 0.97,
    diverged: bool = False,
    recipe: str = "digits",
    metric: Metric | None = None,
    pictures: bool = False,
) -> Path:
    """Write one run of ``schedule`` below ``folder``; returns the run's folder.

    With ``pictures`` there are singular values and heat-maps too.
    """
    names = [f"blocks.{i}.conv" for i in range(layers)] if isinstance(layers, int) else layers
    run = folder / f"{schedule}-{seed}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"batch_size": 32, "schedule": schedule}))
    writer = RecordWriter(run)
    header = RunRecord(
        recipe=recipe,
        schedule=schedule,
        seed=seed,
        epochs=epochs,
        steps_per_epoch=STEPS,
        device="cpu",
        hardware="a CPU of 2 cores",
        precision="float32",
        metric=metric or Metric(),
        versions={"torch": "2.13.0", "dynarank": "0.1.0"},
        started=f"2026-03-0{1 + seed}T10:0{list(CHANGES).index(schedule)}:00",
    )
    writer.write(header)
    form, changes = CHANGES[schedule]
    _phase(writer, 0, form, names)
    _spectrum(writer, 0, names, pictures)
    last = epochs if finished else epochs // 2
    for epoch in range(1, last + 1):
        for moment, after in [c for c in changes if epoch - 1 < c[0] <= epoch]:
            _change(writer, moment, form, after, names)
            form = after
        if schedule in ("rotating", "closed-loop"):
            _one_by_one(writer, schedule, epoch, epochs, names)
        _epoch(writer, epoch, epochs, accuracy, math.inf if diverged and epoch > 3 else 1)
        _spectrum(writer, epoch, names, pictures, broken=diverged and epoch > 3)
    if finished:
        _summary(writer, schedule, accuracy)
    writer.close()
    return run


def write_own_run(
    folder: Path,
    schedule: str = "mine",
    *,
    epochs: int = 3,
    steps: int = STEPS,
    finished: bool = True,
    test_loss: float | None = None,
    relative: float = 0.6,
) -> Path:
    """Write a run of a loop of one's own below ``folder``: no seed, no score, losses of steps."""
    run = folder / schedule
    run.mkdir(parents=True)
    writer = RecordWriter(run)
    header = RunRecord(
        recipe="mine",
        schedule=schedule,
        seed=None,
        epochs=epochs,
        steps_per_epoch=steps,
        device="cpu",
        hardware="a CPU of 2 cores",
        precision="float32",
        versions={},
        started="2026-03-01T10:00:00",
    )
    writer.write(header)
    _phase(writer, 0, LOW, ["fc"])
    for step in range(1, epochs * steps + 1):
        loss = 2 * math.exp(-step / (epochs * steps))
        writer.write(StepRecord(epoch=step / steps, step=step, train_loss=loss))
        if step % steps == 0 and test_loss is not None:
            writer.write(_epoch_of(step // steps, step, test_loss))
    if finished:
        writer.write(_end(None, relative))
    writer.close()
    return run


def _epoch_of(epoch: int, step: int, test_loss: float) -> EpochRecord:
    return EpochRecord(
        epoch=epoch, step=step, learning_rate=0.1, train_loss=None, test_loss=test_loss,
        test_score=None, trainable_parameters=1000, relative_flops=0.6, seconds=1.0,
    )  # fmt: skip


def _phase(writer: RecordWriter, epoch: float, form: dict, names: list[str], full: int = 0) -> None:
    trainable = 272_762 if form == FULL else 154_211
    relative = COST[form["form"]]
    writer.write(
        PhaseRecord(
            epoch=epoch,
            step=round(epoch * STEPS),
            forms={form["form"]: len(names) - full} | ({"full-rank": full} if full else {}),
            trainable_parameters=trainable,
            total_parameters=272_762 + (trainable if form["form"] == "adapted" else 0),
            predicted_flops=round(1.9e9 * relative),
            counted_flops=round(1.9e9 * relative),
            relative_flops=relative,
            memory_bytes=round(12.3 * 2**20 * (0.7 + 0.3 * relative)),
        )
    )


def _change(
    writer: RecordWriter, epoch: float, before: dict, after: dict, names: list[str]
) -> None:
    for index, name in enumerate(names):
        writer.write(
            ChangeRecord(
                epoch=epoch,
                step=round(epoch * STEPS),
                path=name,
                before=before,
                after=after,
                error=1e-7 / (1 + index) if after != LOW else 0.12 / (1 + index),
            )
        )
    _phase(writer, epoch, after, names)


def _one_by_one(
    writer: RecordWriter, schedule: str, epoch: int, epochs: int, names: list[str]
) -> None:
    """A window of full-rank layers moves by one place; a closed loop says why it moves."""
    window = max(1, len(names) // epochs)
    last, now = (range((e - 1) * window, min(e * window, len(names))) for e in (epoch - 1, epoch))
    for index, form, before in [
        *((i, LOW, FULL) for i in last if i >= 0),
        *((i, FULL, LOW) for i in now),
    ]:
        at = {"epoch": epoch - 0.5, "step": (epoch - 1) * STEPS + 20, "path": names[index]}
        if schedule == "closed-loop":
            reason = "effective rank fell" if form is FULL else "stable rank has settled"
            readings = {"effective_rank": 6.3 + index, "stable rank": 2.125, "<limit>": 7.0}
            writer.write(DecisionRecord(**at, form=form, reason=reason, readings=readings))
        writer.write(ChangeRecord(**at, before=before, after=form, error=1e-7))
    _phase(writer, epoch - 0.5, LOW, names, full=len(now))


def _epoch(writer: RecordWriter, epoch: int, epochs: int, accuracy: float, factor: float) -> None:
    progress = 1 - math.exp(-4 * epoch / epochs)
    writer.write(
        EpochRecord(
            epoch=epoch,
            step=epoch * STEPS,
            learning_rate=0.1,
            train_loss=2.3 * (1.01 - progress) * factor,
            train_score=min(1, accuracy * progress + 0.02),
            test_loss=2.3 * (1.04 - progress * accuracy) * factor,
            test_score=accuracy * progress,
            trainable_parameters=272_762,
            relative_flops=1.0,
            seconds=1.4,
        )
    )


def _spectrum(
    writer: RecordWriter,
    epoch: float,
    names: list[str],
    pictures: bool = False,
    broken: bool = False,
) -> None:
    layers, weights = {}, {}
    for index, name in enumerate(names):
        depth = (index + 1) / len(names)
        full = 16 * 2 ** round(2 * depth)
        share = (0.9 - 0.35 * depth) * (1 - 0.025 * epoch) + 0.02 * math.sin(7 * index + epoch)
        decay = 2 + epoch / 2 + 3 * depth
        values = tuple(4 * math.exp(-decay * i / full) for i in range(full))
        layers[name] = LayerSpectrum(
            effective_rank=math.nan if broken else full * share,
            stable_rank=full * share / 3,
            spectral_ratio=1 - 0.6 * share,
            rank=full // 2,
            full_rank=full,
            update_rank=full * share / 4 if pictures else None,
            values=(math.nan, *values[1:]) if broken else values if pictures else (),
        )
        weights[name] = tuple(
            tuple(
                abs(math.sin((row + 1) * (column + 2 + index) / 40 + epoch / 6)) * (1 + epoch / 12)
                for column in range(32)
            )
            for row in range(min(full, 32))
        )
    step = round(epoch * STEPS)
    writer.write(SpectrumRecord(epoch=epoch, step=step, layers=layers))
    if pictures and epoch % 2 == 0:
        writer.write(HeatmapRecord(epoch=epoch, step=step, layers=weights))


def _summary(writer: RecordWriter, schedule: str, accuracy: float) -> None:
    start, changes = CHANGES[schedule]
    forms = [start, *(after for _, after in changes)]
    relative = sum(COST[form["form"]] for form in forms) / len(forms)
    peak = 272_762 if FULL in forms else 154_211
    writer.write(_end(accuracy, relative, peak))


def _end(accuracy: float | None, relative: float, peak: int = 154_211) -> SummaryRecord:
    return SummaryRecord(
        test_score=accuracy and accuracy * 0.98,
        best_test_score=accuracy,
        trainable_parameters_peak=peak,
        trainable_parameters_mean=200_000.4,
        training_flops=1e12 * relative,
        relative_flops=relative,
        memory_bytes=round(12.3 * 2**20 * (0.7 + 0.3 * relative)),
        train_seconds=92 * (0.8 + 0.2 * relative),
        wall_seconds=130.0,
    )
