"""Callbacks: the order they are called in, what an exception leaves, and their state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from small_run import FULL, LOW, SCHEDULE, STEPS, forms, net, sgd, train_step
from stepping import one_step

import dynarank as dr
from dynarank import LRRewarmup, RankScheduler
from dynarank.forms import Change, Form
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.schedules import Phases, low_rank
from dynarank.surgery.sites import Site


class Told(Callback):
    """Writes down what it is told, with the step, and raises where it is to."""

    def __init__(self, name: str, log: list[Any], raises: str = "") -> None:
        self.name, self.log, self.raises = name, log, raises

    def _hear(self, what: str, ranks: Ranks) -> None:
        self.log.append((ranks.last_step, self.name, what))
        if what == self.raises:
            raise RuntimeError(f"{self.name} {what}")

    def on_start(self, ranks: Ranks) -> None:
        self._hear("start", ranks)

    def after_step(self, ranks: Ranks) -> None:
        self._hear("step", ranks)

    def before_change(self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]) -> None:
        self._hear("before", ranks)

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        self._hear("after", ranks)

    def close(self) -> None:
        self.log.append((self.name, "close"))


def test_they_are_called_in_the_order_of_the_list() -> None:
    log: list[Any] = []
    model = net()
    callbacks = [Told("a", log), lambda changes: log.append(len(changes)), Told("b", log)]
    ranks = RankScheduler(model, sgd(model), Phases([0, 2], [LOW, FULL]), 9, callbacks=callbacks)
    first = [(0, "a", "before"), (0, "b", "before"), (0, "a", "after"), 2, (0, "b", "after")]
    assert log == [(0, "a", "start"), (0, "b", "start"), *first]
    log.clear()
    for _ in range(3):
        one_step(ranks)
    steps = [[(step, "a", "step"), (step, "b", "step")] for step in (1, 2, 3)]
    change = [(2, "a", "before"), (2, "b", "before"), (2, "a", "after"), 2, (2, "b", "after")]
    assert log == [*steps[0], *steps[1], *change, *steps[2]]
    log.clear()
    ranks.close()
    assert log == [("b", "close"), ("a", "close")]  # the last first


def about_to_change() -> tuple[Any, RankScheduler, Told, list[Any]]:
    """A net that inflates at the next step, and the first of its two callbacks."""
    log: list[Any] = []
    model = net()
    one, two = Told("a", log), Told("b", log)
    ranks = RankScheduler(model, sgd(model), Phases([0, 1], [LOW, FULL]), 9, callbacks=[one, two])
    log.clear()
    return model, ranks, one, log


def test_an_exception_before_a_change_leaves_the_model_and_is_asked_again() -> None:
    model, ranks, one, log = about_to_change()
    one.raises = "before"
    with pytest.raises(RuntimeError, match="a before"):
        one_step(ranks)
    assert forms(model) == [LOW, LOW, FULL] and ("b", "before") not in [x[1:] for x in log]
    one.raises = ""
    assert len(one_step(ranks)) == 2 and forms(model) == [FULL] * 3


def test_an_exception_after_a_change_leaves_it_made() -> None:
    model, ranks, one, log = about_to_change()
    one.raises = "after"
    with pytest.raises(RuntimeError, match="a after"):
        one_step(ranks)
    assert forms(model) == [FULL] * 3 and (1, "b", "after") not in log
    one.raises = ""
    assert one_step(ranks) == []  # not made again


@pytest.mark.parametrize("raises", ["start", "before", "after"])
def test_an_exception_at_the_start_closes_all(raises: str) -> None:
    log: list[Any] = []
    model, rewarmup = net(), LRRewarmup(3)
    optimizer = sgd(model)
    with pytest.raises(RuntimeError, match=f"b {raises}"):
        RankScheduler(
            model, optimizer, SCHEDULE, STEPS, callbacks=[rewarmup, Told("b", log, raises)]
        )
    assert log[-1] == ("b", "close")
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_nothing_is_told_of_what_is_refused_before_anything_changes() -> None:
    log: list[Any] = []
    model = net()
    with pytest.raises(ValueError, match="above the limit"):
        RankScheduler(
            model, sgd(model), low_rank(99), STEPS, layers="*", callbacks=[Told("a", log)]
        )
    assert log == []


def test_a_change_that_is_put_off_is_not_told_after() -> None:
    log: list[Any] = []
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    only, told = {"layers": "2"}, [Told("a", log)]
    with pytest.warns(RuntimeWarning, match="no change of form now"):
        ranks = RankScheduler(model, sgd(model), low_rank(2), 9, callbacks=told, **only)
    with torch.no_grad():
        model[2].weight[0, 0] = 1.0
    one_step(ranks)
    assert [what for *_, what in log] == ["start", "before", "step", "before", "after"]


def test_nothing_is_told_of_a_plan_that_the_model_is_at_already() -> None:
    log: list[Any] = []
    model = net()
    RankScheduler(model, sgd(model), Phases([0], [FULL]), 9, callbacks=[Told("a", log)])
    assert log == [(0, "a", "start")]


@pytest.mark.parametrize("value", [3, None, "print", LRRewarmup])
def test_what_is_no_callback_is_refused(value: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match="callbacks are Callback objects, or functions"):
        RankScheduler(model, sgd(model), SCHEDULE, STEPS, callbacks=[value])


def test_one_callback_calibrates_a_change() -> None:
    model, x = net(), torch.randn(9, 6, dtype=torch.float64)
    two = [dr.ActivationAwareTruncation(lambda: [x]) for _ in range(2)]
    with pytest.raises(ValueError, match="2 callbacks calibrate one change"):
        RankScheduler(model, sgd(model), SCHEDULE, STEPS, callbacks=two)
    assert forms(model) == [FULL] * 3


# State.


class Counting(Callback):
    """Remembers how many layers have changed."""

    count = 0

    def after_change(self, ranks: Ranks, changes: list[Change]) -> None:
        self.count += len(changes)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def test_states_are_saved_and_loaded_each_its_own() -> None:
    def made() -> tuple[RankScheduler, list[Any]]:
        model = net()
        callbacks = [Counting(), LRRewarmup(3), Counting(), print]
        callbacks[-1] = lambda changes: None
        return RankScheduler(model, sgd(model), SCHEDULE, STEPS, callbacks=callbacks), callbacks

    first, saved = made()
    for step in range(5):
        train_step(first.model, first.optimizer[0], step)
        first.step()
    saved[2].count = 7
    state = json.loads(json.dumps(first.state_dict()))
    assert state["callbacks"] == {
        "Counting": {"count": 4}, "LRRewarmup": {"done": 1}, "Counting-2": {"count": 7},
    }  # fmt: skip
    second, loaded = made()
    second.load_state_dict(state)
    assert [loaded[0].count, loaded[1].factor, loaded[2].count] == [4, saved[1].factor, 7]


def test_a_saved_callback_that_is_not_there_is_refused_before_anything_changes() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), SCHEDULE, STEPS, callbacks=[LRRewarmup(3)])
    for _ in range(4):
        one_step(ranks)
    other = net()
    again = RankScheduler(other, sgd(other), SCHEDULE, STEPS)
    with pytest.raises(ValueError, match="had the callbacks LRRewarmup, this one has not"):
        again.load_state_dict(ranks.state_dict())
    assert again.last_step == 0 and forms(other)[0] == LOW
    without = {**ranks.state_dict(), "callbacks": {}}
    with pytest.raises(ValueError, match="this run has the callbacks LRRewarmup, the saved one"):
        ranks.load_state_dict(without)
    again.load_state_dict(without)
    assert again.last_step == 4 and forms(other)[0] == FULL


def test_closing_takes_the_hooks_off_and_may_come_twice() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    ranks = RankScheduler(
        model, optimizer, SCHEDULE, STEPS, moments="calibrated", callbacks=[LRRewarmup(2)]
    )
    for step in range(2):
        train_step(model, optimizer, step)
        ranks.step()
    assert optimizer._optimizer_step_pre_hooks
    ranks.close()
    ranks.close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
