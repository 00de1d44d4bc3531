"""A schedule may answer with budgets: measured once, at the transition, in one transaction."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from small_run import assert_same_bits, snapshot
from stepping import one_step
from torch import Tensor, nn

import dynarank as dr
from dynarank.cost.flops import trace
from dynarank.cost.schedule import cost_schedule
from dynarank.forms import Adapted, Form, FullRank, LowRank, Within
from dynarank.scheduler import pooled
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.schedules import Clock, Phases, RankSchedule, Readings, Schedule, replay

STEPS, LAYERS = 12, ("0", "2")
FULL = FullRank()
CUTS = Phases(
    [0, 3, 7], [FULL, Within(flops=0.75, multiple_of=1), Within(flops=0.5, multiple_of=1)]
)


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    between = nn.BatchNorm1d(32) if norm else nn.Identity()
    layers = [nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), between, nn.Linear(32, 4)]
    return nn.Sequential(*layers).double()


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(40, 24, generator=generator, dtype=torch.float64)


def own_batches() -> list[Tensor]:
    return [batch(1000 + i) for i in range(3)]


class Run:
    """A model in training, with what is saved of it."""

    def __init__(
        self,
        schedule: Schedule = CUTS,
        batches: Callable[[], Sequence[Any]] | None = own_batches,
        *,
        norm: bool = False,
        **options: Any,
    ) -> None:
        self.model = net(norm)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options = {"layers": LAYERS, "batches": batches} | options
        self.ranks = RankScheduler(self.model, self.optimizer, schedule, STEPS, **options)

    def step(self, stop: int, start: int = 0) -> None:
        for step in range(start, stop):
            (self.model(batch(step)) - 1).square().mean().backward()
            self.optimizer.step()
            self.ranks.step()
            self.optimizer.zero_grad()

    def state(self) -> list[Any]:
        holders = (self.ranks, self.model, self.optimizer)
        return copy.deepcopy([holder.state_dict() for holder in holders])

    def load(self, state: list[Any]) -> None:
        for holder, own in zip((self.ranks, self.model, self.optimizer), state, strict=True):
            holder.load_state_dict(own)

    def forms(self) -> dict[str, Form]:
        return {path: form for path, form in dr.current_plan(self.model).items() if path in LAYERS}

    def share(self) -> float:
        """The FLOPs of a step relative to full rank."""
        use = trace(net(), batch(0))
        return use.flops(dr.current_plan(self.model)).training / use.flops({}).training


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = pooled.calibrate

    def counting(*args: Any, **named: Any) -> Any:
        calls.append(1)
        return original(*args, **named)

    monkeypatch.setattr(pooled, "calibrate", counting)
    return calls


@pytest.mark.parametrize("batches", [own_batches, None])
def test_each_budget_is_measured_once_and_met(batches: Any, measured: list[int]) -> None:
    run, shares = Run(batches=batches), list[float]()
    assert not measured  # nothing is measured while the run is checked
    for step in range(STEPS):
        run.step(step + 1, step)
        shares.append(run.share())
    assert len(measured) == 2
    assert shares[:2] == [1.0] * 2
    assert all(0.70 < share <= 0.75 for share in shares[2:6])
    assert all(0.46 < share <= 0.5 for share in shares[6:])
    assert {d.step for d in run.ranks.decisions} == {3, 7}
    assert run.ranks.decisions[-1].reason == "within 0.5 of the FLOPs"
    assert run.forms() == {d.path: d.form for d in run.ranks.decisions}


@pytest.mark.parametrize("kind", ["params", "bytes"])
def test_parameters_and_bytes_are_budgets_too(kind: str) -> None:
    run = Run(Phases([0, 3], [FULL, Within(**{kind: 0.6})]))  # type: ignore[arg-type]
    run.step(4)
    left = sum(p.numel() for p in run.model.parameters())
    assert 0.55 < left / sum(p.numel() for p in net().parameters()) <= 0.6


def test_a_number_of_parameters_of_these_layers_is_met_exactly_from_below() -> None:
    run = Run(Phases([0, 3], [FULL, Within(params=900, of="layers", multiple_of=1)]))
    run.step(4)
    assert isinstance(run.model[0], nn.Linear)
    layers = (run.model[0], run.model[2])
    entries = sum(p.numel() for layer in layers for n, p in layer.named_parameters() if n != "bias")
    assert 900 - 64 < entries <= 900


def test_uniform_ranks_need_no_measurement_but_for_the_cut(measured: list[int]) -> None:
    run = Run(Phases([0], [Within(params=0.5, ranks="uniform")]), None)
    assert not measured and all(isinstance(form, LowRank) for form in run.forms().values())
    kept = [p.numel() for p in run.model.parameters()]
    assert sum(kept) <= 0.5 * sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize("batches", [own_batches, None])
def test_a_run_resumed_at_any_step_is_the_run_uninterrupted(batches: Any) -> None:
    whole, states = Run(batches=batches), list[list[Any]]()
    for step in range(STEPS):
        states.append(whole.state())
        whole.step(step + 1, step)
    for step, state in enumerate(states):
        resumed = Run(batches=batches)
        with torch.no_grad():
            for p in resumed.model.parameters():
                p.add_(1)
        resumed.load(copy.deepcopy(state))
        assert_same_bits(resumed.state(), state)
        resumed.step(STEPS, step)
        assert_same_bits(resumed.state(), whole.state())
        made = Run(batches=batches, state=copy.deepcopy(state[0]))
        made.load(copy.deepcopy(state))
        made.step(STEPS, step)
        assert_same_bits(made.state(), whole.state())


def test_a_state_saved_after_closing_goes_on_with_the_next_batches() -> None:
    run = Run(batches=None)
    run.step(2)
    run.ranks.close()
    other = Run(batches=None)
    other.load(run.state())
    other.step(STEPS, 2)
    assert other.share() <= 0.5


def test_a_budget_below_the_smallest_multiples_is_refused_before_the_first_step() -> None:
    at_least = Within(params=0.3, of="layers", multiple_of=8)
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tiny = Phases([0, 3], [FULL, Within(params=0.03, of="layers", multiple_of=8)])
    with pytest.raises(ValueError, match=r"from step 3, a budget .* smallest ranks"):
        RankScheduler(model, optimizer, tiny, STEPS, layers="*")
    RankScheduler(model, optimizer, Phases([0, 3], [FULL, at_least]), STEPS, layers="*").close()


def test_a_run_with_batches_of_different_sizes_resumes_too() -> None:
    def batch_of(step: int) -> Tensor:
        return batch(step)[: 40 if step % 3 else 7]

    def steps(run: Run, start: int, stop: int) -> None:
        for step in range(start, stop):
            (run.model(batch_of(step)) - 1).square().mean().backward()
            run.optimizer.step()
            run.ranks.step()
            run.optimizer.zero_grad()

    whole = Run(batches=None)
    steps(whole, 0, 6)
    resumed = Run(batches=None)
    resumed.load(whole.state())
    for run in (whole, resumed):
        steps(run, 6, STEPS)
    assert_same_bits(resumed.state(), whole.state())


def test_a_state_is_plain_data_if_batches_are_given() -> None:
    run = Run()
    run.step(5)
    assert json.loads(json.dumps(run.ranks.state_dict())) == run.ranks.state_dict()


def test_a_recorded_run_is_replayed_bit_by_bit() -> None:
    run = Run(Phases([0, 3, 5, 8], [FULL, Within(flops=0.6), FULL, Within(flops=0.5)]))
    run.step(STEPS)
    decisions = [decision.to_data() for decision in run.ranks.decisions]
    again = Run(replay(json.loads(json.dumps(decisions)), FULL))
    again.step(STEPS)
    assert_same_bits(again.model.state_dict(), run.model.state_dict())
    assert_same_bits(again.optimizer.state_dict(), run.optimizer.state_dict())


def test_a_budget_that_returns_is_measured_again(measured: list[int]) -> None:
    half = Within(flops=0.5)
    run = Run(Phases([0, 2, 4, 6], [FULL, half, FULL, half]))
    run.step(STEPS)
    assert len(measured) == 2
    assert run.share() <= 0.5


def test_the_predicted_cost_of_the_run_is_what_it_costs_within_one_percent() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 4))
    inputs = torch.randn(64, 128)
    schedule = Phases([0.0, 0.25, 0.5], [FULL, Within(flops=0.6), Within(flops=0.35)])
    use = trace(model, inputs)
    predicted = cost_schedule(use, schedule, LAYERS, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ranks = RankScheduler(model, optimizer, schedule, 8, layers=LAYERS, batches=lambda: [inputs])
    executed = 0
    for _ in range(8):
        executed += use.flops(dr.current_plan(model)).training
        one_step(ranks)
    assert executed <= predicted.training_flops
    assert executed == pytest.approx(predicted.training_flops, rel=0.01)
    assert [phase.estimated for phase in predicted.phases] == [False, True, True]


def test_batch_norm_is_recalibrated_in_the_same_transaction() -> None:
    run = Run(norm=True)
    run.step(3)
    norm = run.model[3]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    with torch.no_grad():
        inputs = torch.cat([run.model[:3](x) for x in own_batches()])
    torch.testing.assert_close(norm.running_mean, inputs.mean(0))


def test_an_error_in_the_batches_changes_nothing() -> None:
    calls = 0

    def failing() -> list[Tensor]:
        nonlocal calls
        calls += 1
        if calls > 1:  # not when the run is checked
            raise KeyError("no data")
        return own_batches()

    run = Run(batches=failing, norm=True)
    run.step(2)
    run.model(batch(2)).sum().backward()
    run.optimizer.step()
    before = snapshot(run.model, run.optimizer), copy.deepcopy(run.ranks.decisions)
    with pytest.raises(KeyError, match="no data"):
        run.ranks.step()
    assert (snapshot(run.model, run.optimizer), run.ranks.decisions) == before


def test_an_error_while_batch_norm_is_recalibrated_takes_the_cut_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(norm=True)
    run.step(2)
    run.model(batch(2)).sum().backward()
    run.optimizer.step()
    before = snapshot(run.model, run.optimizer)

    def interrupted(*args: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dynarank.scheduler.rank_scheduler.recalibrate_batch_norms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.ranks.step()
    assert snapshot(run.model, run.optimizer)[0] == before[0]


def test_outputs_that_are_not_finite_postpone_the_cut() -> None:
    bad = 2

    def batches() -> list[Tensor]:
        nonlocal bad
        bad -= 1
        return [x * (float("nan") if bad == 0 else 1) for x in own_batches()]

    run = Run(Phases([0, 3], [FULL, Within(flops=0.5)]), batches)
    with pytest.warns(RuntimeWarning, match="layer '0', 0.5 of the FLOPs: .* not finite"):
        run.step(3)
    assert set(run.forms().values()) == {FULL} and not run.ranks.decisions
    state = run.state()
    run.step(4, 3)
    assert run.share() <= 0.5
    other = Run(Phases([0, 3], [FULL, Within(flops=0.5)]))
    other.load(state)
    other.step(4, 3)
    assert other.forms() == run.forms()


REFUSED: dict[str, tuple[Within | dict[str, Any], str]] = {
    "too small": (Within(flops=0.01), r"from step 3, a budget .* below the cost of the smallest"),
    "two of the model": (
        {"0": Within(flops=0.5), "2": Within(flops=0.4)},
        "from step 3, a plan has one budget of the model",
    ),
    "no such decomposition": (Within(flops=0.5, decomposition="qr"), "qr"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_budget_that_cannot_be_met_is_refused_before_the_first_step(name: str) -> None:
    asked, message = REFUSED[name]

    def schedule(clock: Clock, readings: Readings) -> Any:
        if clock.step < 3:
            return dict.fromkeys(readings.layers, FULL)
        return asked if isinstance(asked, dict) else dict.fromkeys(readings.layers, asked)

    with pytest.raises(ValueError, match=message):
        Run(schedule)


def test_without_batches_a_budget_is_refused_after_the_first_step() -> None:
    run = Run(Phases([0, 3], [FULL, Within(flops=0.01)]), None)
    with pytest.raises(ValueError, match="below the cost of the smallest ranks"):
        run.step(1)


def test_a_model_whose_forward_pass_is_not_seen_is_told_to_give_batches() -> None:
    run = Run(batches=None)
    for layer in run.model:
        layer.train()
    x = batch(0)
    for layer in run.model:  # called in parts
        x = layer(x)
    x.sum().backward()
    run.optimizer.step()
    with pytest.raises(ValueError, match=r"was not seen .* batches=lambda: batches"):
        run.ranks.step()


def test_batches_must_be_a_function() -> None:
    with pytest.raises(ValueError, match="batches is a function"):
        Run(batches=own_batches())  # type: ignore[arg-type]


def test_the_hook_keeps_references_for_this_model_only_and_goes_with_close() -> None:
    run = Run(batches=None)
    run.step(2)
    kept = run.ranks.state_dict()["batches"]
    assert [len(one) for one in kept] == [1, 1] and torch.equal(kept[0][0], batch(0))
    copied = copy.deepcopy(run.model)
    copied(batch(5)).sum().backward()
    assert len(run.ranks.state_dict()["batches"]) == 2
    with torch.no_grad():
        run.model(batch(6))  # evaluation
    assert len(run.ranks.state_dict()["batches"]) == 2
    run.ranks.close()
    assert not run.model._forward_pre_hooks


def test_a_copy_of_model_and_scheduler_goes_on_alike() -> None:
    run = Run(batches=None)
    run.step(5)
    other = copy.deepcopy(run)
    for one in (run, other):
        one.step(STEPS, 5)
    assert_same_bits(run.model.state_dict(), other.model.state_dict())


def test_a_scheduler_that_is_gone_leaves_a_hook_that_does_nothing() -> None:
    run = Run(batches=None)
    gone = weakref.ref(run.ranks)
    model = run.model
    del run
    gc.collect()
    assert gone() is None
    model(batch(0)).sum().backward()


def test_batches_given_by_keyword_are_kept_by_keyword() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.body(inputs) * scale

    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ranks = RankScheduler(model, optimizer, CUTS, STEPS, layers=("body.0", "body.2"))
    for step in range(4):
        model(batch(step), scale=2.0).sum().backward()
        optimizer.step()
        ranks.step()
    assert any(isinstance(form, LowRank) for form in dr.current_plan(model).values())


def test_other_layers_count_in_a_budget_of_the_model() -> None:
    def schedule(clock: Clock, readings: Readings) -> dict[str, Any]:
        return (
            {"0": LowRank(2), "2": Within(flops=0.6, multiple_of=1)}
            if clock.step >= 3
            else {
                "0": FULL,
                "2": FULL,
            }
        )

    run = Run(schedule)
    run.step(4)
    assert run.forms()["0"] == LowRank(2)
    assert 0.5 < run.share() <= 0.6


ANSWERS = st.sampled_from(
    [
        FULL,
        LowRank(4),
        Adapted(2),
        Within(flops=0.6),
        Within(params=0.5),
        Within(flops=0.4, of="layers"),
        Within(bytes=0.5, ranks="uniform"),
    ]
)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
    st.lists(ANSWERS, min_size=2, max_size=4), st.integers(1, STEPS - 1), st.booleans()
)
def test_any_list_of_transitions_runs_resumes_and_replays(
    answers: list[Any], at: int, given_batches: bool
) -> None:
    forms = [FULL, *(b for a, b in pairwise([FULL, *answers]) if a != b)]
    schedule: RankSchedule = Phases([2 * i for i in range(len(forms))], forms)
    batches = own_batches if given_batches else None
    whole = Run(schedule, batches)
    whole.step(at)
    resumed = Run(schedule, batches)
    resumed.load(whole.state())
    for run in (whole, resumed):
        run.step(STEPS, at)
    assert_same_bits(resumed.state(), whole.state())
    last = forms[-1]
    if isinstance(last, Within) and last.kind == "flops" and last.of == "model":
        assert whole.share() <= last.amount
    dr.check(whole.model, whole.optimizer, ranks=whole.ranks)
