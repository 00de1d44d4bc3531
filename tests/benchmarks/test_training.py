"""The harness of the experiments: runs go on after a kill, arms are tuned, records are kept."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny_experiment import DECAY, FIXED, FULL, Tiny, experiment, record, trial
from torch.utils.flop_counter import FlopCounterMode

import dynarank as dr
from benchmarks.training import progress
from benchmarks.training.__main__ import main
from benchmarks.training.harness import arms
from benchmarks.training.harness.arm import Arm, Setting, schedule_data
from benchmarks.training.harness.arms import on_few
from benchmarks.training.harness.calibration import key
from benchmarks.training.harness.energy import counters, joules
from benchmarks.training.harness.experiment import Experiment, get, names
from benchmarks.training.harness.extras import decay_products
from benchmarks.training.harness.jobs import (
    WAITING,
    Job,
    as_run,
    at_an_end,
    never,
    others,
    ready,
    reported,
    schedule_of,
    setting_of,
    timed,
    timed_on,
)
from benchmarks.training.harness.narrow import flops, width_for
from benchmarks.training.harness.replay import UNKNOWN, OtherRunError, Replay, share
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.trial import Interrupted, Trial
from benchmarks.training.harness.tuning import chosen, found, next_settings
from dynarank.cost import trace
from dynarank.schedules import closed_loop, decay, low_rank
from dynarank.train.gpt import GPT

ROOT = Path(__file__).parents[2]


def finished(one: Trial, folder: Path) -> dict:
    one.run(folder)
    result = one.result("test")
    one.close()
    times = {"cpu_seconds", "full_rank_seconds", "wall_seconds", "joules"}
    points = [{k: v for k, v in p.items() if k not in times} for p in result["points"]]
    return {k: v for k, v in result.items() if k not in times} | {"points": points}


def test_the_pace_of_full_rank_is_timed_beside_a_run_and_changes_nothing(tmp_path: Path) -> None:
    paced, plain = trial(DECAY), trial(DECAY, reported=False)
    assert finished(paced, tmp_path / "a") == finished(plain, tmp_path / "b")
    assert len(paced.seen["paces"]) == 16
    assert paced.result("test")["full_rank_seconds"] > 0
    assert plain.result("test")["full_rank_seconds"] is None


@pytest.mark.parametrize("at", [1, 8, 9, 21, 38])
@pytest.mark.parametrize("arm", [FULL, DECAY, *arms.paper(), *arms.related(dr.Rank(0.25), 2)[-2:]],
                         ids=lambda value: getattr(value, "name", str(value)))  # fmt: skip
def test_a_run_goes_on_where_it_was_left_and_ends_the_same(
    tmp_path: Path, arm: Arm, at: int
) -> None:
    whole = finished(trial(arm), tmp_path / "none")
    left = trial(arm)
    while left.seen["step"] < at:
        left.step()
    with pytest.raises(Interrupted):
        left.run(tmp_path / "state", deadline=-math.inf)
    left.close()
    again = trial(arm)
    assert finished(again, tmp_path / "state") == whole


def test_costs_are_those_of_the_steps_that_ran(tmp_path: Path) -> None:
    one = finished(trial(DECAY), tmp_path / "none")
    assert one["flops"] == pytest.approx(0.7, abs=0.03)
    assert one["end_flops"] < 0.7
    assert one["parameters_peak"] == sum(p.numel() for p in Tiny().network().parameters())
    assert one["parameters_end"] < one["parameters_mean"] < one["parameters_peak"]
    assert 0 < one["memory_end"] < one["memory_peak"]
    assert [c["step"] for c in one["changes"]] == [8, 20]
    assert len(one["points"]) == 4
    full = finished(trial(FULL), tmp_path / "none")
    assert full["flops"] == full["end_flops"] == 1


def test_a_narrower_network_costs_no_more_than_its_share() -> None:
    problem = Tiny()
    width = width_for(problem, 0.5)
    assert flops(problem, width) <= 0.5 * flops(problem) < flops(problem, width + 0.05)
    assert trial(arms.narrow(0.5)[0]).use.flops({}).training == flops(problem, width)


def test_a_shorter_run_costs_its_share_of_the_whole_one(tmp_path: Path) -> None:
    problem = Tiny()
    (arm,) = arms.shorter(0.5)
    one = finished(trial(arm), tmp_path / "none")
    assert (one["steps"], one["flops"], one["end_flops"]) == (20, 0.5, 1.0)
    assert one["points"][-1]["step"] == 20 and len(one["points"]) == 4
    short = trial(arm).problem
    assert problem.steps == 40
    assert short.factor(20) == pytest.approx(problem.factor(40))  # the rate has come down


def test_a_run_that_diverges_is_recorded_without_a_result(tmp_path: Path) -> None:
    one = trial(FULL)
    one.problem.training_loss = lambda *_: one.model[0].weight.sum() * torch.nan  # pyright: ignore
    one.run(tmp_path / "none")
    assert one.result("test")["result"] == {}


def test_norms_and_decay_of_products() -> None:
    kept = trial(FIXED, Setting(start="norm"))
    whole = Tiny().model(0)
    for path in ("0", "2"):
        norm = kept.model.get_submodule(path).weight.norm().detach()
        assert norm == pytest.approx(whole.get_submodule(path).weight.norm().item(), rel=1e-5)


@pytest.mark.parametrize("sgd", [False, True])
def test_the_decay_of_a_product_is_that_of_the_weight(sgd: bool) -> None:
    """One step with no gradient but zero shrinks U D to first order as decay of W would."""
    problem, model = Tiny(), Tiny().model(0)
    dr.factorize(model, dr.Rank(0.25, of="min"), layers=problem.layers)
    kind = torch.optim.SGD if sgd else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-3, weight_decay=0.5)
    decay_products(model, optimizer, problem)
    up, down = model[0].up.detach().clone(), model[0].down.detach().clone()
    head = model[4].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if sgd:  # an exact gradient step; Adam's first step after it is not one
        torch.testing.assert_close(model[0].up, up - 5e-4 * up @ (down @ down.T))
    assert (model[0].up - up).norm() > 0
    torch.testing.assert_close(model[4].weight, head * (1 - 5e-4))  # the rest decays as before


def run(arm: str, value: float | None, setting: Setting, seed: int = 100, part: str = "valid"):
    result = {} if value is None else {"accuracy": value}
    data = {"arm": arm, "part": part, "seed": seed, "setting": asdict(setting), "result": result}
    return {"version": 1, **data, "flops": 0.4, "full_rank_seconds": 1.0}


def test_rates_are_tried_beyond_an_end_and_no_further_than_needed() -> None:
    arm = Arm("a", None, (1.0, 2.0))
    best = {1.0: 1.0, 2.0: 2.0, 4.0: 3.0, 8.0: 2.5}
    runs: list = []
    for tried in ([1.0, 2.0], [4.0], [8.0], []):
        wanted = next_settings(arm, found(arm, runs, "accuracy", True, (100,)), (100,))
        assert [one.rate for one in wanted] == tried
        runs += [run("a", best[rate], Setting(rate)) for rate in tried]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100, 101))) == Setting(4.0)
    assert chosen(arm, found(arm, runs, "accuracy", False, (100,))) == Setting(1.0)


@pytest.mark.parametrize(("tied", "beyond"), [((0.5, 1.0), 0.25), ((1.0, 2.0), 4.0)])
def test_a_rate_at_an_end_that_is_as_good_as_the_best_is_gone_beyond(
    tied: tuple[float, float], beyond: float
) -> None:
    arm = Arm("a", None, (0.5, 1.0, 2.0))
    runs = [run("a", 82.0 if r in tied else 70.0, Setting(r)) for r in arm.rates]
    wanted = next_settings(arm, found(arm, runs, "accuracy", True, (100,)), (100,))
    assert [one.rate for one in wanted] == [beyond]


def test_equal_means_of_other_orders_are_equal() -> None:
    arm, seeds = Arm("a", None, (0.5, 1.0, 2.0, 4.0)), (100, 101, 102)
    values = {0.5: (9, 9, 9), 1.0: (0.1, 0.2, 0.3), 2.0: (0.3, 0.2, 0.1), 4.0: (9, 9, 9)}
    assert (0.1 + 0.2 + 0.3) / 3 != (0.3 + 0.2 + 0.1) / 3
    runs = [
        run("a", v, Setting(r), s)
        for r, vs in values.items()
        for v, s in zip(vs, seeds, strict=True)
    ]
    assert chosen(arm, found(arm, runs, "accuracy", False, seeds)) == Setting(1.0)
    assert chosen(arm, found(arm, runs[::-1], "accuracy", False, seeds)) == Setting(1.0)


def test_without_seeds_to_tune_on_the_rate_is_that_of_the_problem() -> None:
    one = experiment(FIXED, tuning=())
    assert {job.setting.rate for job in ready("tiny", one, [])} == {1.0}
    runs = [run(FIXED.name, 9.0, Setting(2.0))]  # of a seed that was tuned on before
    assert setting_of(FIXED, one, runs) == Setting(1.0)


def test_seeds_that_are_no_longer_tuned_on_do_not_choose() -> None:
    arm = Arm("a", None, (0.5, 1.0, 2.0))
    runs = [run("a", v, Setting(r)) for r, v in ((0.5, 1.0), (1.0, 3.0), (2.0, 2.0))]
    runs += [run("a", 99.0, Setting(2.0), 101)]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100,))) == Setting(1.0)


def test_a_best_rate_at_an_end_is_marked_in_the_table() -> None:
    one = experiment(Arm("full rank", None))
    results = {0.5: 3.0, 1.0: 2.0, 2.0: 1.0, 0.25: 4.0, 0.125: 5.0}
    runs = [run("full rank", v, Setting(r)) for r, v in results.items()]
    last = [run("full rank", v, Setting(r)) for r, v in {**results, 0.125: 3.5}.items()]
    assert at_an_end(one.arms[0], one, runs) and not at_an_end(one.arms[0], one, last)


def test_what_diverged_is_never_chosen() -> None:
    arm = Arm("a", None, (1.0, 2.0))
    runs = [run("a", 1.0, Setting(1.0)), run("a", None, Setting(2.0))]
    runs += [run("a", math.nan, Setting(0.5))]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100, 101))) == Setting(1.0)


def test_starts_and_decays_are_tried_at_the_best_rate() -> None:
    arm = replace(FIXED, starts=("truncated", "norm"), decays=("factors", "product"))
    runs = [run(arm.name, v, Setting(r)) for r, v in ((0.5, 1.0), (1.0, 3.0), (2.0, 2.0))]
    norm, product = Setting(1.0, "norm"), Setting(1.0, decay="product")
    assert next_settings(arm, found(arm, runs, "accuracy", True, (100,)), (100,)) == [norm, product]
    runs += [run(arm.name, 3.5, norm), run(arm.name, 2.9, product)]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100, 101))) == norm


def test_the_coefficient_of_a_penalty_is_tried_at_the_best_rate() -> None:
    (arm,) = arms.orthogonal([replace(DECAY, rates=(1.0,))])
    first, *others = (Setting(coefficient=c) for c in arm.coefficients)
    assert next_settings(arm, found(arm, [], "accuracy", True, (100,)), (100,)) == [first]
    runs = [run(arm.name, 1.0, first)]
    assert next_settings(arm, found(arm, runs, "accuracy", True, (100,)), (100,)) == others
    runs += [run(arm.name, v, s) for v, s in zip((0.0, 2.0, -1.0), others, strict=True)]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100, 101))) == others[1]
    assert len({Job("e", "a", s, 0, "test").key for s in (first, *others)}) == 4


def test_all_tuning_seeds_count() -> None:
    arm = Arm("a", None, (0.5, 1.0, 2.0))
    runs = [run("a", 2.0, Setting(1.0), seed) for seed in (100, 101)]
    runs += [run("a", 9.0, Setting(0.5), 100), run("a", -9.0, Setting(0.5), 101)]
    wanted = next_settings(arm, found(arm, runs, "accuracy", True, (100, 101)), (100, 101))
    assert wanted == [Setting(2.0)]
    runs += [run("a", 1.0, Setting(2.0), seed) for seed in (100, 101)]
    assert chosen(arm, found(arm, runs, "accuracy", True, (100, 101))) == Setting(1.0)


def test_each_arm_is_tuned_by_itself_and_arms_of_a_family_on_the_first() -> None:
    half, most = arms.decays(0.5, 0.65)
    ranks = arms.fixed_ranks(shares=(1 / 4, 1 / 2))
    one = experiment(half, most, *ranks)
    assert [one.tuned(arm).name for arm in one.arms[:4]] == [
        "decay 0.5", "decay 0.65", "fixed 1/4", "fixed 1/4",
    ]  # fmt: skip
    runs = [run("decay 0.5", v, Setting(r)) for r, v in ((0.5, 1.0), (1.0, 3.0), (2.0, 2.0))]
    assert setting_of(half, one, runs) == Setting(1.0)
    assert setting_of(most, one, runs) is None


def test_only_tuning_runs_of_the_wanted_length_count() -> None:
    short = experiment(replace(FULL, rates=(1.0,)), tuning_length=0.25)
    arm = short.arms[0]
    for part, length in (("valid", 0.25), ("test", 1.0)):
        assert replace(arm, length=length) == as_run(arm, short, [], part)
    whole = [run("full rank", 1.0, Setting()) | {"length": 1.0}]
    assert {job.part for job in ready("tiny", short, whole)} == {"valid"}
    quarter = [run("full rank", 1.0, Setting()) | {"length": 0.25}]
    assert {job.part for job in ready("tiny", short, quarter)} == {"test"}


def test_seeds_that_are_reported_are_not_tuned_on() -> None:
    with pytest.raises(ValueError, match="must differ"):
        experiment(FULL, seeds=(0, 1), tuning=(1,))
    for name in names():
        one = get(name)
        assert not set(one.seeds) & set(one.tuning)
        assert len(one.seeds) >= 3
        assert one.arms[0].name == "full rank"


def test_an_experiment_has_full_rank_and_arms_in_order() -> None:
    full, *_ = arms.full_rank()
    with pytest.raises(ValueError, match=r"named 'full rank'.*begin the arms with \*arms.full"):
        Experiment("mine", Tiny, [DECAY])
    with pytest.raises(ValueError, match="two arms are named 'decay'"):
        Experiment("mine", Tiny, [full, DECAY, DECAY])
    for wrong in ([full, *arms.matched([DECAY]), DECAY], [full, *arms.matched([DECAY])]):
        with pytest.raises(ValueError, match="'fixed as decay' spends what 'decay' does; put"):
            Experiment("mine", Tiny, wrong)
    Experiment("mine", Tiny, [full, DECAY, *arms.matched([DECAY])])


def test_why_an_arm_is_never_run() -> None:
    like, led = (Arm(f"fixed as {i}", None, (1.0,), family="fixed", spends="decay") for i in "ab")
    after = Arm("fixed as fixed", None, (1.0,), spends="fixed as a")
    one = experiment(replace(DECAY, rates=(1.0,)), like, led, after)
    runs = [run("decay", None, Setting()), run("decay", None, Setting(), 0, "test")]
    assert never(like, one, runs) is None  # it waits
    runs += [run("decay", None, Setting(), 1, "test")]
    assert never(like, one, runs) == "'decay' diverged on all seeds"
    assert never(led, one, runs) == "'fixed as a' is not, since 'decay' diverged on all seeds"
    assert str(never(after, one, runs)).startswith("'fixed as a' is not, since")
    dear = [{**r, "result": {"accuracy": 1.0}, "flops": 0.98} for r in runs]
    assert never(like, one, dear) == "'decay' costs more than any low rank"
    assert never(one.by_name["decay"], one, runs) is None


def test_an_arm_that_spends_as_much_as_another_waits_for_it() -> None:
    like = arms.matched([DECAY])[0]
    like = replace(like, starts=("truncated",), decays=("factors",), rates=(1.0,))
    ranks = replace(FIXED, rates=(1.0,), family="fixed")
    full = replace(FULL, rates=(1.0,))
    one = experiment(ranks, replace(DECAY, rates=(1.0,)), like, full)
    runs = [run(name, 1.0, Setting()) for name in ("fixed 1/4", "decay", "full rank")]
    runs += [run("full rank", 1.0, Setting(), seed, "test") for seed in (0, 1)]
    assert schedule_of(like, one, runs) is WAITING
    jobs = ready("tiny", one, runs)
    assert Counter(job.arm for job in jobs) == {"fixed 1/4": 2, "decay": 2}
    runs += [run("decay", 1.0, Setting(), seed, "test") for seed in (0, 1)]
    assert schedule_of(like, one, runs) == low_rank(budget=0.4)
    assert Counter(job.arm for job in ready("tiny", one, runs)) == {
        "fixed 1/4": 2, "fixed as decay": 2,
    }  # fmt: skip
    diverged = {**run("decay", None, Setting(), 1, "test"), "flops": 0.01}
    assert schedule_of(like, one, [*runs[:-1], diverged]) == low_rank(budget=0.4)
    assert setting_of(like, one, runs) == Setting()
    old = {**run("fixed as decay", 1.0, Setting(), 0, "test"), "schedule": {"of": "before"}}
    assert old not in reported(one, [*runs, old])  # it spent what the arm spent before


def test_runs_with_a_setting_that_is_no_longer_chosen_do_not_count() -> None:
    one = experiment(replace(FULL, rates=(1.0, 2.0, 4.0)))
    runs = [run("full rank", v, Setting(r)) for r, v in ((1.0, 1.0), (2.0, 3.0), (4.0, 2.0))]
    runs += [run("full rank", 9.0, Setting(2.0), seed, "test") for seed in (0, 1)]
    assert ready("tiny", one, runs) == []
    for recorded in ([*runs, *runs], runs[::-1]):  # in whatever order
        assert [r["seed"] for r in reported(one, recorded)] == [0, 1]
    another = [run("full rank", 9.0, Setting(2.0), 7, "test")]
    assert reported(one, [*runs, *another]) == reported(one, runs)  # of no seed that is wanted
    more = replace(one, tuning=(100, 101))
    assert {job.seed for job in ready("tiny", more, runs)} == {101}
    runs += [run("full rank", v, Setting(r), 101) for r, v in ((1.0, 8.0), (2.0, 3.0), (4.0, 2.0))]
    runs += [run("full rank", 0.0, Setting(0.5), seed) for seed in (100, 101)]
    assert reported(more, runs) == []
    assert {(job.seed, job.setting.rate) for job in ready("tiny", more, runs)} == {
        (0, 1.0), (1, 1.0),
    }  # fmt: skip


def test_an_arm_without_seconds_beside_full_rank_runs_once_more() -> None:
    one = experiment(replace(FULL, rates=(1.0,)))
    tuned = run("full rank", 1.0, Setting())
    old = [run("full rank", 1.0, Setting(), seed, "test") for seed in (0, 1)]
    for each in old:
        del each["full_rank_seconds"]
    (job,) = ready("tiny", one, [tuned, *old])
    assert (job.arm, job.seed, job.part) == ("full rank", 0, "test")
    assert [job.seed for job in ready("tiny", one, [tuned, old[0]])] == [
        1
    ]  # first of all, its seeds
    again = {**old[0], "full_rank_seconds": 1.0}
    assert ready("tiny", one, [tuned, *old, again]) == []
    failed = {**again, "result": {}}
    assert ready("tiny", one, [tuned, *old, failed]) == []  # it is not repeated without end
    assert reported(one, [tuned, *old, again]) == old
    lost = [{**each, "result": {}} for each in old]
    assert ready("tiny", one, [tuned, *lost]) == []


def test_seconds_of_different_machines_are_not_compared() -> None:
    """Of two arms, one is timed on an old machine: both are on the new one, or the other there."""
    pair = (replace(FULL, rates=(1.0,)), replace(DECAY, rates=(1.0,)))
    one = experiment(*pair, seeds=(0,))
    tuned = [run(arm.name, 1.0, Setting()) for arm in pair]
    here = [
        {**run(arm.name, 1.0, Setting(), 0, "test"), "hardware": where}
        for arm, where in zip(pair, ("old", "new"), strict=True)
    ]
    assert [job.arm for job in ready("tiny", one, [*tuned, *here], "new")] == ["full rank"]
    assert [job.arm for job in ready("tiny", one, [*tuned, *here], "old")] == ["decay"]
    assert len(ready("tiny", one, [*tuned, *here], "newer")) == 2
    both = [*here, {**here[0], "hardware": "new"}]
    for where in ("old", "new", "newer"):
        assert ready("tiny", one, [*tuned, *both], where) == []
    assert timed_on([[here[0], both[-1]], [here[1]]]) == "new"
    assert timed(both, "old") == [here[0]]


@pytest.mark.parametrize("part", ["valid", "test"])
def test_runs_of_an_arm_that_was_made_otherwise_do_not_count(part: str) -> None:
    one = experiment(replace(FULL, rates=(1.0,)))
    tuned = [run("full rank", 1.0, Setting())] if part == "test" else []
    runs = [run("full rank", 2.0, Setting(), 0 if part == "test" else 100, part)]
    others = [{**runs[0], name: "else"} for name in FULL.options]
    missing = len(ready("tiny", one, tuned))
    assert len(ready("tiny", one, [*tuned, *others])) == missing
    assert len(ready("tiny", one, [*tuned, *runs])) != missing
    assert one.arms[0].made({**runs[0], **FULL.options}) and one.arms[0].made(runs[0])


def test_arms_are_tuned_again_on_another_schedule_of_the_first_of_their_family() -> None:
    first, second = (replace(a, rates=(1.0,)) for a in arms.fixed_ranks(shares=(1 / 4, 1 / 2)))
    first, second = (replace(a, starts=("norm",), decays=("factors",)) for a in (first, second))
    one = experiment(first, second)
    tuned = {**run(first.name, 1.0, Setting(start="norm")), **first.options}
    assert setting_of(second, one, [tuned]) == setting_of(first, one, [tuned]) is not None
    other = experiment(replace(first, schedule=low_rank(dr.Rank(1 / 16))), second)
    assert setting_of(other.arms[0], other, [tuned]) is None
    assert setting_of(second, other, [tuned]) is None
    assert others(other, [tuned]) == {first.name: [["schedule"]]}
    assert others(one, [tuned, run("full rank", 1.0, Setting(), 0, "test")]) == {}
    half = replace(one, tuning_length=0.5)
    assert others(half, [tuned]) == {first.name: [["length"]]}


def test_an_arm_is_another_with_another_function_of_its_own() -> None:
    def one(problem: Tiny, model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
        return problem.optimizer(model, rate)

    def other(problem: Tiny, model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
        return problem.optimizer(model, 2 * rate)

    arm = replace(FULL, optimizer=one)
    recorded = {**run("full rank", 1.0, Setting()), **arm.options, "source": "other"}
    assert arm.changed(recorded) == ["source"] and "source" not in FULL.options
    assert arm.options["optimizer"] != replace(FULL, optimizer=other).options["optimizer"]


def _append(path: Path, who: int) -> None:
    for i in range(20):
        Store("a", path).append(record(seed=i, who=who, text="x" * 5000))


def test_two_processes_append_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_append, args=(tmp_path, who)) for who in (0, 1)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    runs = Store("a", tmp_path).runs()
    assert Counter((r["who"], r["seed"]) for r in runs) == Counter(
        (who, i) for who in (0, 1) for i in range(20)
    )


def test_a_line_that_was_not_finished_is_left_out_and_cut_off(tmp_path: Path) -> None:
    store = Store("a", tmp_path)
    store.append(record(seed=0))
    with store.path.open("ab") as file:
        file.write(b'{"version":1,"seed":')
    assert [r["seed"] for r in store.runs()] == [0]
    store.append(record(seed=1))
    assert [r["seed"] for r in store.runs()] == [0, 1]


def test_a_run_that_diverged_can_be_read_again(tmp_path: Path) -> None:
    points = [{"train_loss": math.nan, "valid": {"loss": math.inf}, "flops": 0.5}]
    Store("a", tmp_path).append(record(points=points, result={}))
    (run,) = Store("a", tmp_path).runs()
    assert run["points"] == [{"train_loss": None, "valid": {"loss": None}, "flops": 0.5}]


def test_a_last_line_that_lacks_its_end_alone_counts(tmp_path: Path) -> None:
    store = Store("a", tmp_path)
    for seed in (0, 1):
        store.append(record(seed=seed))
    store.path.write_bytes(store.path.read_bytes()[:-1])  # as some editors save it
    assert [r["seed"] for r in store.runs()] == [0, 1]
    store.append(record(seed=2))
    assert [r["seed"] for r in store.runs()] == [0, 1, 2]


DAMAGED = ['{"version":1,', "", "[1]", "{}", '"x"', '{"version":1}'] + [
    json.dumps({"version": 1, **record(), **other})
    for other in (
        {"seed": None}, {"seed": "0"}, {"seed": True}, {"part": "train"}, {"experiment": "b"},
        {"setting": {"speed": 1}},
        {"setting": {"rate": 1.0}}, {"setting": {**asdict(Setting()), "speed": 1}},
        {"setting": {**asdict(Setting()), "rate": "1"}},
        {"setting": {**asdict(Setting()), "rate": 0}},
        {"setting": {**asdict(Setting()), "start": 1}},
        {"result": {"accuracy": "50"}}, {"result": {"loss": math.nan}},
        {"result": {"accuracy": True}}, {"result": {"accuracy": None}}, {"result": {"loss": 1.0}},
        {"result": {"accuracy": 10**400}}, {"full_rank_seconds": "1"}, {"full_rank_seconds": 0},
        {"flops": math.inf}, {"flops": None}, {"flops": -1}, {"flops": 0}, {"steps": 0},
        {"cpu_seconds": -1.0}, {"rate": True}, {"points": {}}, {"changes": None},
    )
] + [
    json.dumps({"version": 1, **record(points=[{"flops": 1.5}])}).replace(*figures)
    for figures in (("1.5", "1e999"), ("50.0", "1e999"), ("50.0", "-1e999"))
]  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGED)
def test_damaged_records_are_refused_by_file_and_line(tmp_path: Path, damaged: str) -> None:
    good = json.dumps({"version": 1, **record()})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{damaged}\n{good}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, is no record .* take that line out"):
        Store("a", tmp_path).runs("accuracy")


@pytest.mark.parametrize("name", [name for name in record() if name != "schedule"])
def test_a_record_that_lacks_something_is_refused(tmp_path: Path, name: str) -> None:
    lacking = {key: value for key, value in record().items() if key != name}
    (tmp_path / "a.jsonl").write_text(json.dumps({"version": 1, **lacking}) + "\n")
    with pytest.raises(ValueError, match=rf"line 1, is no record .*{name}"):
        Store("a", tmp_path).runs()


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"version":2}\n')
    with pytest.raises(ValueError, match="line 1: a record of version 2, this code reads 1"):
        Store("a", tmp_path).runs()


def test_energy_where_the_system_tells_it(tmp_path: Path) -> None:
    assert counters(tmp_path) is None
    assert joules(None, None) is None
    packages = [tmp_path / f"intel-rapl:{i}" for i in range(2)]
    for package in packages:
        package.mkdir()
        (package / "energy_uj").write_text("1500000\n")
        (package / "max_energy_range_uj").write_text("1999999\n")
    before = counters(tmp_path)
    (packages[0] / "energy_uj").write_text("1750000\n")
    (packages[1] / "energy_uj").write_text("500000\n")  # it began again
    assert joules(before, counters(tmp_path)) == 1.25


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers", "-1"], ["--minutes", "nan"]])
def test_what_would_run_nothing_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "run", "mlp_table", *words])
    with pytest.raises(SystemExit):
        main()
    assert (
        f"argument {words[0]}: '{words[1]}' is not a finite number above 0"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_however_it_is_stopped_workers_end_records_are_whole_and_the_rest_is_run_once(
    tmp_path: Path,
) -> None:
    command = [
        sys.executable, "-m", "benchmarks.training", "run", "mlp_table", "--results", str(tmp_path),
        "--scratch", str(tmp_path / "scratch"), "--minutes", "2",
    ]  # fmt: skip
    store = Store("mlp_table", tmp_path)
    for more, number in ((1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGKILL)):
        records = len(store.runs()) + more  # then it works, and knows what to do with a signal
        running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        until = time.monotonic() + 120
        while len(store.runs()) < records and time.monotonic() < until:
            time.sleep(0.05)
        if number == signal.SIGKILL:
            os.killpg(running.pid, number)
            running.wait(60)
        else:
            os.kill(running.pid, number)  # not its workers
            assert running.wait(60) == 128 + number
            with pytest.raises(ProcessLookupError):
                os.killpg(running.pid, 0)
        assert len(store.runs()) >= records
    keys = Counter(
        (r["arm"], r["seed"], r["part"], tuple(r["setting"].values())) for r in store.runs()
    )
    assert max(keys.values()) == 1


def test_the_flops_of_calibrations_are_counted_on_a_replay(tmp_path: Path) -> None:
    """One cut, before which 32 batches of 8 rows pass through the full-rank network."""
    arm = Arm("one cut", decay(total=0.7, cuts=[0.2]))
    run = trial(arm)
    run.run(tmp_path / "run")
    record = {"arm": arm.name, "seed": 0, "setting": asdict(Setting()), **run.result("test")}
    record["schedule"] = schedule_data(arm.schedule)
    few = on_few([arm], 4)[0]
    assert few.kind == arm.kind and few.made({**few.options, "arm": "one cut, 4 batches"})
    counted = [
        share(experiment(one), Tiny(), {**record, "arm": one.name}) * flops(Tiny()) * 40
        for one in (arm, few)
    ]
    forward = 2 * 8 * (16 * 32 + 32 * 32 + 32 * 2)
    moments = 2 * 8 * (16 * 16 + 32 * 32)  # of the shorter sides of the scheduled layers
    assert counted[0] - counted[1] == pytest.approx((32 - 4) * (forward + moments), rel=1e-3)
    assert counted[1] > 4 * (forward + moments)  # the change computes products too


def test_a_pass_of_a_replay_counts_what_the_trace_of_the_network_counts() -> None:
    """Attention too, which torch's counter leaves out on a CPU."""
    model, x = GPT(vocabulary=11, width=16, depth=2, heads=2, context=8), torch.zeros(3, 8).long()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        model(x)
    assert counter.get_total_flops() == trace(model, x).flops({}).forward


def test_the_flops_of_decaying_products_are_counted_on_a_replay(tmp_path: Path) -> None:
    """U^T U, V V^T and a product with each, for every scheduled layer and in every step."""
    counted: list[float] = []
    for name in ("factors", "product"):
        setting = Setting(decay=name)
        run = trial(FIXED, setting)
        run.run(tmp_path / name)
        record = {"arm": FIXED.name, "seed": 0, "setting": asdict(setting), **run.result("test")}
        record["schedule"] = schedule_data(FIXED.schedule)
        counted.append(share(experiment(FIXED), Tiny(), record) * flops(Tiny()) * 40)
    layers = [run.model.get_submodule(path) for path in ("0", "2")]
    step = sum(4 * len(one.down) ** 2 * sum(one.weight.shape) for one in layers)
    assert counted[1] - counted[0] == pytest.approx(40 * step, rel=1e-3)
    assert key(record) != key({**record, "setting": asdict(Setting())})


def test_a_schedule_that_decides_by_what_it_sees_is_replayed_with_training(tmp_path: Path) -> None:
    arm = Arm("closed loop", closed_loop(dr.Rank(0.5, of="min")))
    run = trial(arm)
    run.run(tmp_path / "run")
    steps: list[list[int]] = []
    for trained in (False, True):
        one = Replay(experiment(arm), Tiny(), arm, Setting(), 0, arm.schedule)
        steps.append(one.replay(trained))
        one.close()
    assert steps[0] != steps[1] == [change["step"] for change in run.seen["changes"]]
    record = {"arm": arm.name, "seed": 0, "setting": asdict(Setting()), **run.result("test")}
    record |= {"schedule": schedule_data(arm.schedule), "hardware": "another CPU"}
    assert share(experiment(arm), Tiny(), record) > 0
    record["changes"] = record["changes"][:-1]
    with pytest.raises(OtherRunError, match=r"closed loop: .* of seed 0 at .*another CPU"):
        share(experiment(arm), Tiny(), record)


def test_what_is_left_is_estimated_by_steps_not_by_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tuning runs of a tenth of the steps, at 6 seconds; two whole runs are left."""
    tuned = experiment(FULL, tuning_length=0.1)
    monkeypatch.setattr(progress, "get", lambda _: tuned)
    for rate, accuracy in ((0.5, 40.0), (2.0, 40.0), (1.0, 50.0)):
        setting = {**asdict(Setting()), "rate": rate}
        run = record(part="valid", seed=100, length=0.1, setting=setting, cpu_seconds=6.0)
        run["result"] = {"accuracy": accuracy}
        Store("a", tmp_path).append(run)
    progress.status(["a"], tmp_path)
    assert capsys.readouterr().out.split()[-2:] == ["2.0", "min"]
    for seed in (0, 1):
        Store("a", tmp_path).append(record(seed=seed, setting=setting, cpu_seconds=60.0))
    progress.status(["a"], tmp_path)  # one of the two is repeated beside full rank
    assert capsys.readouterr().out.split()[-2:] == ["1.0", "min"]
    Store("a", tmp_path).append(record(setting=setting, cpu_seconds=60.0, full_rank_seconds=60.0))
    progress.status(["a"], tmp_path)
    assert capsys.readouterr().out.split()[-1] == "done"
