"""A change that cannot be made now is postponed, layer by layer, and tried again."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from small_run import (
    FULL,
    LAST,
    LOW,
    SCHEDULE,
    STEPS,
    forms,
    net,
    poison,
    sgd,
    snapshot,
    train_step,
)  # fmt: skip
from stepping import idle_step, one_step
from torch import nn
from torch.nn.utils import prune

import dynarank as dr
from dynarank import LowRank, RankScheduler, UnfitWeightError
from dynarank.forms import Change, Form, Plan
from dynarank.scheduler.callbacks import Callback, Ranks
from dynarank.schedules import Clock, ClosedLoop, Phases, Readings, low_rank
from dynarank.surgery.sites import Site


def told(ranks: RankScheduler) -> tuple[list[Change], list[str]]:
    """The changes and warnings of one step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        idle_step(ranks)
        changes = ranks.step()
    assert all((w.category, w.filename) == (RuntimeWarning, __file__) for w in caught)
    return changes, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("heal_at", "changes_at", "tries"),
    [(5, 5, [4]), (6, 7, [4, 5]), (7, 7, [4, 5]), (8, 11, [4, 5, 7]), (99, None, [4, 5, 7, 11])],
)
def test_a_change_of_a_nan_weight_is_put_off_and_tried_again(
    heal_at: int, changes_at: int | None, tries: list[int]
) -> None:
    """Retries after 1, 2, 4, 8 steps; the layer is not touched meanwhile, the other changes."""
    model = net()
    optimizer = sgd(model)
    ranks = RankScheduler(model, optimizer, Phases([0, 4], [LOW, FULL]), 20)
    train_step(model, optimizer, 0)
    poison(model, math.nan)
    warned: dict[int, str] = {}
    for step in range(1, 16):
        if step == heal_at:
            poison(model, 0.5)
        before = snapshot(model, optimizer)
        changes, messages = told(ranks)
        warned |= dict.fromkeys([step] * len(messages), "".join(messages))
        expected = ["0"] * (step == 4) + ["2"] * (step == changes_at)
        assert [change.path for change in changes] == expected
        if not expected:
            assert str(snapshot(model, optimizer)) == str(before)  # nan != nan
    assert list(warned) == tries
    for count, step in enumerate(tries):
        assert f"step {step}: " in warned[step] and f"next try in {2**count} steps" in warned[step]
        assert "layer '2'" in warned[step] and "NaN" in warned[step] and "'0'" not in warned[step]
    assert forms(model) == [FULL, LOW if changes_at is None else FULL, FULL]


@pytest.mark.parametrize(("total", "longest"), [(20, 8), (2000, 20), (10**6, 64)])
def test_no_layer_waits_longer_than_a_share_of_the_run(total: int, longest: int) -> None:
    model = net()
    poison(model, math.nan)
    with pytest.warns(RuntimeWarning):
        ranks = RankScheduler(model, sgd(model), low_rank(2), total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        waits = {}
        for _ in range(min(300, total - 1)):
            one_step(ranks)
            waits[ranks.last_step] = ranks.state_dict()["postponed"]["2"]["patience"]
    assert max(waits.values()) == longest
    poison(model, 1.0)
    steps = next(n for n in range(1, longest + 1) if one_step(ranks))
    assert steps <= longest and forms(model)[1] == LOW


def test_each_layer_has_its_own_patience() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), Phases([0, 1], [LOW, FULL]), 40)
    poison(model, math.nan, "2")
    told(ranks)
    poison(model, math.nan, "0")  # which has changed by now
    ranks.schedule = Phases([0], [LAST])
    told(ranks)
    poison(model, 1.0, "0")
    changes, messages = told(ranks)
    assert [change.path for change in changes] == ["0"]
    assert "layer '2'" in messages[0] and "layer '0'" not in messages[0]


def test_one_warning_names_all_layers_that_are_unfit() -> None:
    model = net()
    for path in ("0", "2"):
        poison(model, math.inf, path)
    with pytest.warns(RuntimeWarning) as caught:
        RankScheduler(model, sgd(model), low_rank(2), 9)
    assert len(caught) == 1
    assert all(f"layer '{path}'" in str(caught[0].message) for path in ("0", "2"))
    with pytest.raises(UnfitWeightError, match=r"layer '0'.*layer '2'") as raised:
        dr.factorize(model, 2, layers=["0", "2"])
    assert set(raised.value.layers) == {"0", "2"}


def test_a_change_that_a_later_plan_does_not_want_is_forgotten() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), Phases([0, 1, 2, 3], [LOW, FULL, LOW, LAST]), 20)
    poison(model, math.nan)
    assert told(ranks)[1] and ranks.state_dict()["postponed"]
    changes, messages = told(ranks)  # low-rank is asked for again, which it still is
    assert [change.path for change in changes] == ["0"] and not messages
    assert not ranks.state_dict()["postponed"]
    assert "next try in 1 steps" in told(ranks)[1][0]  # another change


def test_a_change_not_made_by_the_end_is_tried_once_more_and_said() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), Phases([0, 1], [LOW, FULL]), 10)
    poison(model, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            one_step(ranks)
    said = told(ranks)[1]
    assert len(said) == 1
    assert "step 10: the run ends with changes never made: layer '2'" in said[0]
    assert "it stays LowRank(rank=2" in said[0]


def test_tied_weights_wait_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[2].weight = model[0].weight
    ranks = RankScheduler(model, sgd(model), Phases([0, 1], [LOW, FULL]), 20, layers="*")
    poison(model, math.nan, "2")
    changes, messages = told(ranks)
    assert [change.path for change in changes] == ["3"] and len(messages) == 1
    poison(model, 1.0, "0")
    assert len(told(ranks)[0]) == 1 and model[0].weight is model[2].weight


def spoil_state(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[2].up]["exp_avg"][0, 0] = math.nan


def mend_state(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[model[2].up]["exp_avg"][0, 0] = 0.0


def test_a_layer_with_an_unfit_optimizer_state_holds_back_no_other() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ranks = RankScheduler(model, optimizer, Phases([0, 1], [LOW, FULL]), 20)
    train_step(model, optimizer, 0)
    spoil_state(model, optimizer)
    changes, messages = told(ranks)
    assert [change.path for change in changes] == ["0"]
    assert "layer '2': the optimizer's state" in messages[0]
    mend_state(model, optimizer)
    assert [change.path for change in told(ranks)[0]] == ["2"]


def test_a_decomposition_that_fails_inside_torch_is_put_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    optimizer = sgd(model)
    ranks = RankScheduler(model, optimizer, Phases([0, 1], [LOW, FULL]), 20)
    train_step(model, optimizer, 0)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("linalg.qr: failed to converge")

    with monkeypatch.context() as patched:
        patched.setattr("dynarank.surgery.optimizer_state.carry", fails)
        before = snapshot(model, optimizer)
        changes, messages = told(ranks)
        assert not changes and "layer '0': linalg.qr" in messages[0]
        assert snapshot(model, optimizer) == before
    assert len(told(ranks)[0]) == 2


@pytest.mark.parametrize("kind", [UnfitWeightError, torch.linalg.LinAlgError])
def test_a_calibration_that_fails_puts_off_truncations_only(kind: Callable[[str], Any]) -> None:
    class Fails(Callback):
        broken = True

        def before_change(self, ranks: Ranks, wanted: Sequence[tuple[Site, Form]]) -> None:
            if self.broken and any(isinstance(form, LowRank) for _, form in wanted):
                raise kind("outputs are not finite")

    def schedule(clock: Clock, readings: Readings) -> Plan:
        return {"0": LOW, "2": FULL} if clock.step < 1 else {"0": FULL, "2": LOW}

    model, fails = net(), Fails()
    fails.broken = False
    ranks = RankScheduler(model, sgd(model), schedule, 9, layers=["0", "2"], callbacks=[fails])
    fails.broken = True
    changes, messages = told(ranks)
    assert [change.path for change in changes] == ["0"]
    assert "layer '2': outputs are not finite" in messages[0]
    fails.broken = False
    assert [change.path for change in told(ranks)[0]] == ["2"]


def test_a_calibration_of_a_model_with_a_nan_weight_does_not_end_the_run() -> None:
    model, x = net(), torch.randn(9, 6, dtype=torch.float64)
    aware = dr.ActivationAwareTruncation(lambda: [x])
    schedule = Phases([0, 1], [FULL, LOW])
    ranks = RankScheduler(model, sgd(model), schedule, 9, layers=["0", "2"], callbacks=[aware])
    poison(model, math.nan)
    assert told(ranks)[1]
    poison(model, 1.0)
    assert len(told(ranks)[0]) == 2


def test_a_schedule_that_reads_spectra_of_a_nan_weight_goes_on() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), ClosedLoop(2, spectra_every=1), STEPS)
    poison(model, math.nan)
    for _ in range(STEPS):
        one_step(ranks)


def test_the_schedule_is_told_the_form_a_waiting_layer_still_has() -> None:
    seen: list[Mapping[str, Form]] = []

    def schedule(clock: Clock, readings: Readings) -> Plan:
        seen.append(readings.forms)
        return dict.fromkeys(readings.layers, LOW if clock.step < 1 else FULL)

    model = net()
    ranks = RankScheduler(model, sgd(model), schedule, 9, layers=["0", "2"])
    poison(model, math.nan)
    told(ranks)
    told(ranks)
    assert seen[-1] == {"0": FULL, "2": LOW}


def test_a_callback_hears_only_of_changes_that_were_made() -> None:
    model = net()
    poison(model, math.nan)
    seen: list[list[Change]] = []
    with pytest.warns(RuntimeWarning, match="step 0: no change of form now, next try in 1 steps"):
        ranks = RankScheduler(model, sgd(model), low_rank(2), 9, callbacks=[seen.append])
    assert [[c.path for c in changes] for changes in seen] == [["0"]]
    poison(model, 1.0)
    changes = one_step(ranks)
    assert seen[1:] == [changes] and forms(model) == [LOW, LOW, FULL]


def test_patience_is_part_of_the_state() -> None:
    model = net()
    ranks = RankScheduler(model, sgd(model), SCHEDULE, STEPS)
    poison(model, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            one_step(ranks)
    state = json.loads(json.dumps(ranks.state_dict()))
    assert state["postponed"].keys() == {"2"}
    assert (state["postponed"]["2"]["patience"], state["postponed"]["2"]["retry_at"]) == (2, 7)
    other = net()
    again = RankScheduler(other, sgd(other), SCHEDULE, STEPS)
    again.load_state_dict(state)
    assert again.state_dict() == ranks.state_dict()


def pruned(layer: nn.Module) -> Callable[[], object]:
    prune.l1_unstructured(layer, "weight", 0.5)
    return lambda: prune.remove(layer, "weight")


def hooked(layer: Any) -> Callable[[], object]:
    return layer.weight.register_hook(lambda grad: grad).remove


def with_forward(layer: Any) -> Callable[[], object]:
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return lambda: delattr(layer, "forward")


STUCK = [pruned, hooked, with_forward]


@pytest.mark.parametrize("get_in_the_way", STUCK)
@pytest.mark.parametrize("moments", ["project", "calibrated"])
def test_what_gets_in_the_way_of_a_layer_in_the_middle_of_a_run_holds_back_no_other(
    get_in_the_way: Callable[[nn.Module], Callable[[], object]], moments: Any
) -> None:
    model = net()
    optimizer = sgd(model)
    schedule = Phases([0, 20], [FULL, LOW])
    ranks = RankScheduler(model, optimizer, schedule, 24, layers=["0", "2"], moments=moments)
    one_step(ranks)
    undo = get_in_the_way(model[2])
    changed: dict[str, int] = {}
    warned: list[int] = []
    for step in range(2, 25):
        train_step(model, optimizer, step)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            changed |= {change.path: ranks.last_step for change in ranks.step()}
        warned += [step for one in caught if "no change of form now, next try" in str(one.message)]
        assert all("layer '2': its" in str(one.message) for one in caught)
        saved = ranks.state_dict()
        assert saved["forms"].keys() == {"0", "2"} and ("2" in saved["postponed"]) == (
            step in (20, 21, 22)
        )
        if step == 22:
            undo()
    assert warned == [20, 21] and changed == {"0": 20, "2": 23} and forms(model)[:2] == [LOW, LOW]


def test_a_schedule_that_names_a_stuck_layer_first_waits_for_it() -> None:
    model = net()
    optimizer = sgd(model)
    late = lambda clock, readings: {"0": LOW, "2": LOW} if clock.step > 2 else {}  # noqa: E731
    ranks = RankScheduler(model, optimizer, late, 6, layers=["0", "2"])
    undo = pruned(model[2])
    for step in range(1, 4):
        train_step(model, optimizer, step)
        assert "layer '2': its weight is computed from" in "".join(told(ranks)[1]) or step < 3
    undo()
    assert [change.path for change in told(ranks)[0]] == ["2"]


def test_layers_of_one_budget_wait_together_for_a_stuck_one() -> None:
    model = net()
    optimizer, batches = sgd(model), [torch.randn(5, 6, dtype=torch.float64)]
    budget = dr.Within(params=0.6, of="layers")
    schedule = Phases([0, 3], [FULL, budget])
    how: dict[str, Any] = {"layers": ["0", "2"], "batches": lambda: batches}
    ranks = RankScheduler(model, optimizer, schedule, 12, **how)
    undo = pruned(model[2])
    for step in range(1, 5):
        train_step(model, optimizer, step)
        messages = "".join(told(ranks)[1])
        assert ("its layer '2': its weight is computed from" in messages) == (step in (3, 4))
    undo()
    changes = [change.path for _ in range(3) for change in told(ranks)[0]]
    assert changes == ["0", "2"]


def test_a_run_with_a_stuck_layer_resumes_bit_by_bit() -> None:
    model = net()
    optimizer = sgd(model)
    schedule = Phases([0, 3], [FULL, LOW])
    ranks = RankScheduler(model, optimizer, schedule, 12, layers=["0", "2"])
    undo = pruned(model[2])
    for step in range(1, 5):
        train_step(model, optimizer, step)
        told(ranks)
    undo()
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ranks.state_dict()))
    again = net()
    other = sgd(again)
    resumed = RankScheduler(again, other, schedule, 12, state=states[2])
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for step in range(5, 9):
        for one in ((model, optimizer), (again, other)):
            train_step(*one, step)
        assert ranks.step() == resumed.step()
    values = dict(again.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert forms(model)[:2] == [LOW, LOW]
