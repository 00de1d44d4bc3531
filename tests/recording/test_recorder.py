"""The recorder of a loop of one's own: complete, out of the way, and resumed after a crash."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynarank as dr
from dynarank import RankScheduler, Recorder
from dynarank.cost.flops import count_flops
from dynarank.files.ownership import FolderInUseError
from dynarank.recording.step_log import StepLog
from dynarank.records import (
    ChangeRecord,
    DecisionRecord,
    EpochRecord,
    HeatmapRecord,
    Metric,
    PhaseRecord,
    Record,
    Run,
    SpectrumRecord,
    StepRecord,
    read_run,
)
from dynarank.schedules import ClosedLoop, dynamic_rank

EPOCHS, STEPS = 3, 10
TOTAL = EPOCHS * STEPS
SCHEDULE = dynamic_rank(2, inflate=8, deflate=22)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(step))


class Loop:
    """A loop of one's own."""

    def __init__(self, schedule: Any = SCHEDULE, total: int = TOTAL) -> None:
        self.model = net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.ranks = RankScheduler(self.model, self.optimizer, schedule, total)

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "ranks": self.ranks}

    def step(self, step: int, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        loss = (forward or self.model)(batch(step)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.ranks.step()
        self.optimizer.zero_grad()
        return loss

    def train(
        self, recorder: Recorder | None, start: int = 0, stop: int = TOTAL, **how: Any
    ) -> None:
        for step in range(start, stop):
            loss = self.step(step, **how)
            if recorder is not None:
                recorder.log(loss=loss)
                if (step + 1) % STEPS == 0:
                    recorder.epoch(test_loss=loss, test_score=step / TOTAL)


def record(folder: Path, loop: Loop | None = None, **how: Any) -> Run:
    loop = loop or Loop()
    options: dict[str, Any] = {"report": False, **how}
    with Recorder(folder, loop.ranks, **options) as recorder:
        loop.train(recorder)
    return read_run(folder)


def vanish(recorder: Any) -> None:
    """End as a process does that is killed: the lock is gone, nothing is written."""
    recorder._stack.close()


def timeless(run: Run) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    times = {"seconds", "train_seconds", "wall_seconds", "started"}
    read = [r for r in run.records if not isinstance(r, SpectrumRecord | HeatmapRecord)]
    return [r.model_dump(exclude=times) for r in read]


def test_a_run_is_recorded_whole(tmp_path: Path) -> None:
    run = record(tmp_path / "mine", metric="accuracy", seed=3)
    header, summary = run.header, run.summary
    assert (header.recipe, header.schedule, header.seed) == ("mine", "dynamic-rank", 3)
    assert (header.epochs, header.steps_per_epoch, header.metric.name) == (3, 10, "accuracy")
    assert [r.step for r in run.all(StepRecord)] == list(range(1, TOTAL + 1))
    assert [r.epoch for r in run.all(EpochRecord)] == [1.0, 2.0, 3.0]
    assert sorted({r.step for r in run.all(ChangeRecord)}) == [8, 22]
    assert [r.step for r in run.all(PhaseRecord)] == [0, 8, 22]
    assert [r.step for r in run.all(HeatmapRecord)] == [0, 10, 20, 30]
    assert {r.step for r in run.all(SpectrumRecord)} >= {0, 10, 20, 30}
    assert summary is not None
    scores = [r.test_score for r in run.all(EpochRecord)]
    assert (summary.test_score, summary.best_test_score) == (
        scores[-1],
        max(s for s in scores if s),
    )
    assert not run.damage and not run.notes


def test_all_weights_are_read_once_a_step(tmp_path: Path) -> None:
    loop = Loop(total=20)
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder, stop=20)  # its second epoch ends where the run does
    steps = [r.step for r in read_run(tmp_path / "mine").all(HeatmapRecord)]
    assert 20 in steps and len(steps) == len(set(steps))


def test_records_wait_in_memory_for_sinks_only(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder, stop=5)
        assert recorder._output._held is None  # though the length of an epoch is not known yet


def test_costs_are_those_of_the_model(tmp_path: Path) -> None:
    run, loop = record(tmp_path / "mine"), Loop()
    flops: list[int] = []
    for step in range(TOTAL):
        flops.append(count_flops(loop.model, batch(0)).training)
        loop.step(step)
    assert run.summary is not None
    assert run.summary.training_flops == sum(flops)
    full = count_flops(net(), batch(0)).training
    assert run.summary.relative_flops == pytest.approx(sum(flops) / (full * TOTAL))
    for phase in run.all(PhaseRecord):
        assert phase.predicted_flops == phase.counted_flops == flops[phase.step]
        assert phase.memory_bytes


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    alone, watched = Loop(), Loop()
    torch.manual_seed(1)
    alone.train(None)
    drawn = torch.get_rng_state()
    torch.manual_seed(1)
    record(tmp_path / "mine", watched)
    assert torch.equal(torch.get_rng_state(), drawn)
    for one, other in zip(alone.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (
        not vars(watched.model)["_forward_hooks"] and not vars(watched.model)["_forward_pre_hooks"]
    )
    assert not watched.ranks.callbacks


@pytest.mark.parametrize("late", [True, False], ids=["after-ranks", "before-ranks"])
def test_a_log_belongs_to_its_step(late: bool, tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        for step in range(TOTAL):
            if not late:
                recorder.log(loss=float(step))
            loop.step(step)
            if late:
                recorder.log(loss=float(step))
    found = {r.step: r.train_loss for r in read_run(tmp_path / "mine").all(StepRecord)}
    assert found == {step + 1: float(step) for step in range(TOTAL)}


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 13, 20, 22, 29])
def test_after_a_crash_it_goes_on(stop: int, tmp_path: Path) -> None:
    """A checkpoint of step ``stop``; the crash comes three steps later, without a word."""
    expected = timeless(record(tmp_path / "whole", name="mine", steps_per_epoch=STEPS))
    loop = Loop()
    recorder = Recorder(tmp_path / "cut", loop.ranks, name="mine", report=False, steps_per_epoch=10)
    for step in range(min(TOTAL, stop + 3)):
        loop.train(recorder, step, step + 1)
        if step + 1 == stop:
            dr.save(tmp_path / "checkpoint", **loop.parts)
    vanish(recorder)
    again = Loop()
    dr.load(tmp_path / "checkpoint", **again.parts)
    said: list[str] = []
    with Recorder(
        tmp_path / "cut", again.ranks, name="mine", report=False, steps_per_epoch=10,
        say=said.append,
    ) as recorder:  # fmt: skip
        again.train(recorder, stop)
    found = timeless(read_run(tmp_path / "cut"))
    assert said == [f"{tmp_path / 'cut'} goes on after step {stop}"]
    key: Callable[[dict[str, Any]], str] = repr
    assert sorted(found, key=key) == sorted(expected, key=key)


def test_the_recorder_may_be_made_before_the_checkpoint_is_loaded(tmp_path: Path) -> None:
    loop = Loop()
    recorder = Recorder(tmp_path / "mine", loop.ranks, report=False)
    loop.train(recorder, 0, 12)
    dr.save(tmp_path / "checkpoint", **loop.parts)
    recorder.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    again = Loop()
    with Recorder(tmp_path / "mine", again.ranks, report=False, say=lambda told: None) as recorder:
        dr.load(tmp_path / "checkpoint", **again.parts)
        again.train(recorder, 12)
    run = read_run(tmp_path / "mine")
    assert [r.step for r in run.all(EpochRecord)] == [10, 20, 30]
    assert [r.step for r in run.all(StepRecord)] == list(range(1, TOTAL + 1))


def test_a_run_that_had_only_to_be_closed(tmp_path: Path) -> None:
    """Killed after its last step and checkpoint; the loop that goes on has nothing to train."""
    loop = Loop()
    recorder = Recorder(tmp_path / "mine", loop.ranks, report=False)
    loop.train(recorder)
    dr.save(tmp_path / "checkpoint", **loop.parts)
    vanish(recorder)
    for _ in range(2):  # the second time it is finished
        again = Loop()
        dr.load(tmp_path / "checkpoint", **again.parts)
        said: list[str] = []
        with Recorder(tmp_path / "mine", again.ranks, report=False, say=said.append):
            pass
        run = read_run(tmp_path / "mine")
        assert run.summary is not None and len(run.all(EpochRecord)) == EPOCHS
    expected = record(tmp_path / "whole", name="mine")
    key: Callable[[dict[str, Any]], str] = repr
    found = timeless(read_run(tmp_path / "mine"))
    assert sorted(found, key=key) == sorted(timeless(expected), key=key)


@pytest.mark.parametrize("first", [True, False], ids=["log-first", "step-first"])
def test_a_checkpoint_loaded_within_the_loop_cuts_what_came_after(
    first: bool, tmp_path: Path
) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False, say=lambda told: None) as recorder:
        for stop in (17, TOTAL):
            for step in range(loop.ranks.last_step, stop):
                if first:
                    recorder.log(loss=float(step))
                loop.step(step)
                if not first:
                    recorder.log(loss=float(step))
                if stop == 17 and step == 11:
                    dr.save(tmp_path / "checkpoint", **loop.parts)
            if stop == 17:
                dr.load(tmp_path / "checkpoint", **loop.parts)
    run = read_run(tmp_path / "mine")
    found = [(r.step, r.train_loss) for r in run.all(StepRecord)]
    assert found == [(step + 1, float(step)) for step in range(TOTAL)]
    assert [r.step for r in run.all(PhaseRecord)] == [0, 8, 22]


def test_the_best_checkpoint_loaded_at_the_end_changes_no_cost(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder, 0, 12)
        dr.save(tmp_path / "best", **loop.parts)
        loop.train(recorder, 12)
        dr.load(tmp_path / "best", **loop.parts)
        with pytest.warns(UserWarning, match="no optimizer step was done since"):
            recorder.epoch(test_score=1.0)
    run, whole = read_run(tmp_path / "mine"), record(tmp_path / "whole")
    assert run.summary is not None and whole.summary is not None
    assert run.summary.training_flops == whole.summary.training_flops
    assert [r.step for r in run.all(EpochRecord)] == [10, 20, 30]


def test_a_plain_loop_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    for start in (0, 13):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if start:
            dr.load(tmp_path / "checkpoint", **parts)
        recorder = Recorder(
            tmp_path / "mine", **parts, start=start, report=False, say=lambda told: None
        )
        for step in range(start, 20):
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=loss)
            if step == 12:
                dr.save(tmp_path / "checkpoint", **parts)
        vanish(recorder) if not start else recorder.close()
    run = read_run(tmp_path / "mine")
    assert [r.step for r in run.all(StepRecord)] == list(range(1, 21))
    assert run.summary is not None and run.summary.test_score is None


def test_forms_changed_by_hand_are_a_phase(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "mine", model=model, optimizer=optimizer, report=False) as recorder:
        for step in range(20):
            if step == 5:
                dr.apply_plan(model, {"0": dr.LowRank(2)}, optimizer=optimizer)
            if step == 10:
                model[2].requires_grad_(False)
            model(batch(step)).square().mean().backward()
            optimizer.step()
            recorder.log(loss=0.0)
    run = read_run(tmp_path / "mine")
    phases = run.all(PhaseRecord)
    assert run.header.schedule == "by hand"
    assert [p.step for p in phases] == [0, 5, 10]
    assert phases[1].forms == {"low-rank": 1, "full-rank": 2}
    assert [p.predicted_flops for p in phases] == [p.counted_flops for p in phases]
    assert run.summary is not None and run.summary.relative_flops < 1


class Keeping(nn.Module):
    """Keeps its output, with the graph: an attention map, or features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kept = net(), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.inner(x)]
        return self.kept[0]


def test_a_model_that_keeps_results_of_autograd(tmp_path: Path) -> None:
    model = Keeping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how: dict[str, Any] = {"model": model, "optimizer": optimizer, "report": False}
    with Recorder(tmp_path / "mine", **how, save_model=True):
        model(batch(0)).square().mean().backward()
        optimizer.step()
    summary = read_run(tmp_path / "mine").summary
    assert summary is not None and summary.model_sha256
    found = dr.estimate(model, batch(0), schedule=SCHEDULE, total_steps=TOTAL)
    assert len(found.phases) == 3 and model.kept[0].grad_fn is not None


def test_a_model_without_layers_that_change_form(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "mine", model=model, optimizer=optimizer, report=False):
        model(batch(0)).square().mean().backward()
        optimizer.step()
    assert read_run(tmp_path / "mine").summary is not None


def test_a_score_that_is_no_share_is_said_once(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, metric="accuracy", report=False) as recorder:
        loop.train(None, 0, 5)
        with pytest.warns(UserWarning, match=r"shown as 9310%: give 0.931"):
            recorder.epoch(test_score=93.1)
        loop.train(None, 5, 9)
        recorder.epoch(test_score=94.0)


def test_scalars_are_read_in_their_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some devices have no fp64, and a loop may use several devices."""
    monkeypatch.setattr(Tensor, "double", None, raising=False)
    log = StepLog()
    log.add(1, {"loss": torch.tensor(0.1), "n": torch.tensor(2**40 + 1)})
    log.add(1, {"loss": torch.tensor(0.3, dtype=torch.float64)})
    ((step, found),) = log.take()
    assert (step, found["n"]) == (1, 2**40 + 1)
    assert found["loss"] == (torch.tensor(0.1).item() + 0.3) / 2


def test_a_run_that_begins_again_moves_the_unfinished_one_aside(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(KeyboardInterrupt), Recorder(tmp_path / "mine", loop.ranks) as recorder:
        loop.train(recorder, 0, 5)
        raise KeyboardInterrupt
    run = read_run(tmp_path / "mine")
    assert run.summary is None and len(run.all(StepRecord)) == 5
    with pytest.warns(UserWarning, match="its records are now in records.jsonl.aside"):
        record(tmp_path / "mine")
    assert (tmp_path / "mine" / "records.jsonl.aside").exists()


def finish(tmp_path: Path) -> None:
    record(tmp_path / "mine")
    record(tmp_path / "mine")


def other_schedule(tmp_path: Path) -> None:
    record(tmp_path / "mine")
    record(tmp_path / "mine", Loop(dynamic_rank(3)))


def of_train(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"recipe": {}}')
    record(tmp_path / "mine")


def no_settings(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "records.jsonl").write_text("{}")
    record(tmp_path / "mine")


def in_use(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "mine", Loop().ranks, report=False)
    try:
        record(tmp_path / "mine")
    finally:
        vanish(first)


def log_late(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder)
    recorder.log(loss=1.0)


def two(tmp_path: Path) -> None:
    loop = Loop()
    first = Recorder(tmp_path / "mine", loop.ranks, report=False)
    try:
        Recorder(tmp_path / "other", loop.ranks)
    finally:
        vanish(first)


def made(**how: Any) -> Callable[[Path], object]:
    return lambda tmp_path: Recorder(tmp_path / "mine", **how)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "finished": (finish, "holds a finished run of 30 steps"),
    "another schedule": (other_schedule, "holds another run .*identity"),
    "of train": (of_train, "holds a run of `dynarank train`"),
    "no settings": (no_settings, "without config.json"),
    "in use": (in_use, r"is in use by process .* that is this process: close\(\)"),
    "log after close": (log_late, r"log\(\) after close\(\)"),
    "two recorders": (two, "has a recorder already"),
    "start": (made(ranks=Loop().ranks, start=3), "leave start=3 out"),
    "nothing to count": (made(), "give ranks, or model= and optimizer="),
    "both": (made(ranks=Loop().ranks, model=net()), "leave model and optimizer out"),
    "metric": (made(ranks=Loop().ranks, metric="bleu"), "unknown metric 'bleu'"),
    "sink": (made(ranks=Loop().ranks, sinks=["wandbb"]), "unknown logging backend 'wandbb'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str, tmp_path: Path) -> None:
    call, message = REFUSED[name]
    with pytest.raises((ValueError, FolderInUseError), match=message):
        call(tmp_path)


@pytest.mark.parametrize("wrong", ["a", True, torch.ones(2), [1.0]])
def test_a_loss_is_a_number(wrong: Any, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "mine", Loop().ranks, report=False)
    with pytest.raises(TypeError, match="loss is a number or a tensor of one"):
        recorder.log(loss=wrong)
    vanish(recorder)


def test_an_epoch_counts_once(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder)
        with pytest.warns(UserWarning, match="no optimizer step was done since"):
            recorder.epoch(test_score=1.0)
    assert len(read_run(tmp_path / "mine").all(EpochRecord)) == EPOCHS


def test_without_epochs_the_whole_run_is_one(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        for step in range(TOTAL):
            recorder.log(loss=loop.step(step))
    run = read_run(tmp_path / "mine")
    (epoch,) = run.all(EpochRecord)
    assert (epoch.step, epoch.epoch, epoch.test_score) == (TOTAL, 1.0, None)
    assert run.summary is not None and run.summary.test_score is None
    assert run.header.steps_per_epoch == TOTAL


def test_without_a_step_there_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no optimizer step was recorded"):
        Recorder(tmp_path / "mine", Loop().ranks).close()


def test_a_loss_that_is_not_finite_is_recorded_and_said(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        for step in range(STEPS):
            loop.step(step)
            recorder.log(loss=math.nan)
        with pytest.warns(RuntimeWarning, match="the loss of step 1 is nan"):
            recorder.epoch()
    (epoch,) = read_run(tmp_path / "mine").all(EpochRecord)
    assert epoch.train_loss is not None and math.isnan(epoch.train_loss)


def test_the_parts_of_a_batch_are_one_step(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        for step in range(TOTAL):
            for part in range(4):
                loss = loop.model(batch(4 * step + part)).square().mean()
                (loss / 4).backward()
                recorder.log(loss=float(part), rate=part)
            loop.optimizer.step()
            loop.ranks.step()
            loop.optimizer.zero_grad()
    steps = read_run(tmp_path / "mine").all(StepRecord)
    assert [r.step for r in steps] == list(range(1, TOTAL + 1))
    assert {(r.train_loss, r.values["rate"]) for r in steps} == {(1.5, 3.0)}


def test_a_step_that_counts_differently_is_said_once(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        with pytest.warns(UserWarning, match=r"log\(step=320\) at optimizer step 10") as caught:
            for step in range(TOTAL):
                loss = loop.step(step)
                recorder.log(step=step if step < 9 else 320 + step - 9, loss=loss)
    assert len(caught) == 1
    assert len(read_run(tmp_path / "mine").all(StepRecord)) == TOTAL


def test_a_plain_model_is_recorded_too(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    with Recorder(tmp_path / "mine", model=model, optimizer=optimizer, report=False) as recorder:
        for step in range(TOTAL):
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
            if (step + 1) % STEPS == 0:
                recorder.epoch(test_loss=loss)
    run = read_run(tmp_path / "mine")
    assert (run.header.epochs, run.header.steps_per_epoch) == (EPOCHS, STEPS)
    assert [r.relative_flops for r in run.all(PhaseRecord)] == [1.0]
    assert [r.step for r in run.all(StepRecord)] == list(range(1, TOTAL + 1))
    assert run.summary is not None and run.summary.relative_flops == 1.0


def test_two_optimizers_of_a_pair_of_models(tmp_path: Path) -> None:
    """As in a GAN: the other model trains in the same loop."""
    loop, other = Loop(), net()
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        for step in range(TOTAL):
            other(batch(step)).square().mean().backward()
            second.step()
            recorder.log(loss=loop.step(step))
    assert len(read_run(tmp_path / "mine").all(StepRecord)) == TOTAL


def test_evaluation_in_the_middle_is_not_training(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.model.eval()
        with torch.no_grad():
            loop.model(torch.randn(64, 16))
        loop.model.train()
        loop.train(recorder)
    first = read_run(tmp_path / "mine").all(PhaseRecord)[0]
    assert first.predicted_flops == read_first(tmp_path / "plain").predicted_flops


def read_first(folder: Path) -> PhaseRecord:
    return record(folder).all(PhaseRecord)[0]


def test_a_model_compiled_in_place(tmp_path: Path) -> None:
    loop, expected = Loop(), record(tmp_path / "eager")
    loop.model.compile(backend="eager")
    run = record(tmp_path / "compiled", loop)
    flops = [[p.predicted_flops for p in one.all(PhaseRecord)] for one in (run, expected)]
    assert flops[0] == flops[1]


def test_a_batch_that_is_never_seen_is_asked_for(tmp_path: Path) -> None:
    loop = Loop()
    compiled = torch.compile(loop.model, backend="eager")
    with pytest.raises(ValueError, match=r"give Recorder\(\.\.\., batch=\.\.\.\)"):
        with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
            loop.train(recorder, forward=compiled)
    loop = Loop()
    compiled = torch.compile(loop.model, backend="eager")
    with Recorder(tmp_path / "with", loop.ranks, report=False, batch=batch(0)) as recorder:
        loop.train(recorder, forward=compiled)
    assert len(read_run(tmp_path / "with").all(PhaseRecord)) == 3


def test_copies_are_not_watched(tmp_path: Path) -> None:
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder, 0, 5)
        model, ranks = copy.deepcopy((loop.model, loop.ranks))
        model(batch(0)).sum().backward()
        ranks.step()
        pickle.loads(pickle.dumps(loop.model))(batch(0))
        loop.train(recorder, 5)
    assert len(read_run(tmp_path / "mine").all(StepRecord)) == TOTAL


def test_decisions_and_readings_of_a_schedule_that_looks(tmp_path: Path) -> None:
    loop = Loop(ClosedLoop(), total=200)
    with Recorder(tmp_path / "mine", loop.ranks, report=False) as recorder:
        loop.train(recorder, 0, 200)
    run = read_run(tmp_path / "mine")
    assert [(d.step, d.path) for d in run.all(DecisionRecord)] == [
        (d.step, d.path) for d in loop.ranks.decisions
    ]


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("known", [True, False])
def test_sinks_get_what_the_file_gets(known: bool, tmp_path: Path) -> None:
    sink = Kept()
    run = record(
        tmp_path / "mine", sinks=[sink], steps_per_epoch=STEPS if known else None,
        metric=Metric(name="bleu", percent=False),
    )  # fmt: skip
    assert sink.closed and sink.records == run.records


def test_a_full_disk_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynarank.records import RecordWriter

    write, full = RecordWriter.write, [True]

    def fails(self: RecordWriter, record: Any) -> None:
        if full[0]:
            raise OSError(28, "No space left on device")
        write(self, record)

    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, report=False, steps_per_epoch=10) as recorder:
        loop.train(recorder, 0, 10)
        monkeypatch.setattr(RecordWriter, "write", fails)
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            loop.train(recorder, 10, 20)
        full[0] = False
        loop.train(recorder, 20)
    assert len(read_run(tmp_path / "mine").all(StepRecord)) == TOTAL


def test_the_report_and_the_weights_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    loop = Loop()
    with Recorder(tmp_path / "mine", loop.ranks, say=said.append, save_model=True) as recorder:
        loop.train(recorder)
    assert said == [f"report: {tmp_path / 'mine' / 'report.html'}"]
    assert (tmp_path / "mine" / "report.html").stat().st_size > 10_000
    from safetensors.torch import load_file

    plain = net()
    plain.load_state_dict(load_file(tmp_path / "mine" / "model.safetensors"))
    merged = dr.merge(copy.deepcopy(loop.model))
    assert torch.allclose(plain(batch(0)), merged(batch(0)))


def test_spectra_can_be_left_out(tmp_path: Path) -> None:
    run = record(tmp_path / "mine", spectra=0)
    assert not run.all(SpectrumRecord) and not run.all(HeatmapRecord)
