"""A run saved at any step and loaded in any order is the run that was never interrupted."""

from __future__ import annotations

import copy
import gc
import io
import json
import warnings
import weakref
from itertools import permutations
from typing import Any

import pytest
import torch
from covering import over
from safetensors.torch import load, save
from small_run import STEPS, assert_same_bits, net, train_step
from torch import nn

import dynarank as dr
from dynarank import FullRank, LowRank, LRRewarmup, RankScheduler
from dynarank.schedules import Phases, dynamic_rank

CHANGES = (4, 8)
SAVED = (1, 3, 4, 5, 7, 8, 9, 11)  # in each phase, and right before and after each change
SCHEDULES = {
    "adapted": dynamic_rank(2, inflate=4, deflate=8),
    "low-rank": dynamic_rank(2, inflate=4, deflate=8, to="low-rank"),
}
Run = dict[str, Any]


def optimizer_of(model: nn.Module, kind: str) -> Any:
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(trained, lr=0.01, amsgrad=True)


def scheduler(run: Run, ending: str, state: Any = None) -> None:
    callbacks = [LRRewarmup(3)]
    run["ranks"] = RankScheduler(
        run["model"], run["optimizer"], SCHEDULES[ending], STEPS, callbacks=callbacks, state=state
    )


def train(run: Run, start: int, stop: int) -> None:
    for step in range(start, stop):
        train_step(run["model"], run["optimizer"], step)
        run["ranks"].step()


def states(run: Run) -> dict[str, Any]:
    made = {name: copy.deepcopy(run[name].state_dict()) for name in ("model", "optimizer", "ranks")}
    made["optimizer"]["state"] = dict(sorted(made["optimizer"]["state"].items()))
    return made


def original(ending: str, kind: str) -> Run:
    model = net()
    run: Run = {"model": model, "optimizer": optimizer_of(model, kind)}
    scheduler(run, ending)
    return run


@pytest.fixture(scope="module")
def whole() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The states of uninterrupted runs after each step, by ending and optimizer."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for ending in SCHEDULES:
        for kind in ("sgd", "adamw"):
            run = original(ending, kind)
            runs[ending, kind] = [states(run)]
            for step in range(STEPS):
                train(run, step, step + 1)
                runs[ending, kind].append(states(run))
    return runs


def other_net() -> nn.Sequential:
    """Its own weights must not matter."""
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-2).add_(0.5)
    return model


def plain(kind: str) -> Run:
    model = other_net()
    return {"model": model, "optimizer": optimizer_of(model, kind)}


def factorized(kind: str) -> Run:
    model = dr.factorize(other_net(), 2, layers=["0", "2"])
    return {"model": model, "optimizer": optimizer_of(model, kind)}


def factorized_with_optimizer(kind: str) -> Run:
    run = plain(kind)
    dr.factorize(run["model"], 2, layers=["0", "2"], optimizer=run["optimizer"])
    return run


def in_this_process(saved: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(saved)


def through_files(saved: dict[str, Any]) -> dict[str, Any]:
    """As ``torch.save``, JSON and safetensors give it back; the last one has no metadata."""
    file = io.BytesIO()
    torch.save(saved["optimizer"], file)
    file.seek(0)
    return {
        "model": load(save({n: v.contiguous() for n, v in saved["model"].items()})),
        "optimizer": torch.load(file, weights_only=True),
        "ranks": json.loads(json.dumps(saved["ranks"])),
    }


PASSED = {"process": in_this_process, "files": through_files}
BUILDS = {"plain": plain, "factorized": factorized, "passed": factorized_with_optimizer}
# C: the constructor, S: the constructor with state=, the others are loads.
ORDERS = [
    *(f"plain: C {' '.join(order)}" for order in permutations("MOR")),
    "plain: S M O", "plain: S O M",
    "factorized: M O C R", "factorized: M C O R", "factorized: M C R O", "factorized: M O S",
    "factorized: M S O",
    *(f"passed: {order}" for order in ("M O C R", "O M C R", "M C O R", "M C R O", "O C M R")),
    *(f"passed: {order}" for order in ("M O S", "O M S", "O S M")),
]  # fmt: skip


# An optimizer made after ``factorize``, and a file that does not say what is full-rank: nothing has
# brought the optimizer to the forms of its state yet, and torch refuses it.
REFUSED = ("factorized: M O C R", "factorized: M O S")


def resumed(order: str, ending: str, kind: str, saved: dict[str, Any]) -> Run:
    build, steps = order.split(": ")
    run = BUILDS[build](kind)
    names = {"M": "model", "O": "optimizer", "R": "ranks"}
    for letter in steps.split():
        if letter in names:
            run[names[letter]].load_state_dict(saved[names[letter]])
        else:
            scheduler(run, ending, saved["ranks"] if letter == "S" else None)
    return run


@over({"order": ORDERS, "passed": PASSED, "kind": ["sgd", "adamw"], "ending": SCHEDULES})
def test_every_order_goes_on_as_the_run_uninterrupted(
    order: str, passed: str, kind: str, ending: str, whole: dict[Any, Any]
) -> None:
    for step in SAVED:
        saved = whole[ending, kind][step]
        if order in REFUSED and passed == "files" and "0.weight" in saved["model"]:
            with pytest.raises(ValueError, match="match the size"), pytest.warns(UserWarning):
                resumed(order, ending, kind, PASSED[passed](saved))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a file does not say what is full-rank
            run = resumed(order, ending, kind, PASSED[passed](saved))
        now = states(run)
        assert_same_bits(now, saved)
        train(run, step, STEPS)
        assert_same_bits(states(run), whole[ending, kind][-1])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("order", ["M O C R", "M C O R", "M C R O", "M O S", "M S O"])
def test_a_plain_model_takes_a_full_rank_state_before_the_scheduler_is_made(
    order: str, kind: str, whole: dict[Any, Any]
) -> None:
    """The first plan, which the constructor applies, would truncate what was loaded."""
    for step in (4, 5, 7):
        saved = whole["adapted", kind][step]
        run = resumed(f"plain: {order}", "adapted", kind, through_files(saved))
        assert_same_bits(states(run), saved)
        train(run, step, STEPS)
        assert_same_bits(states(run), whole["adapted", kind][-1])


# Where a run goes on.


def test_a_state_given_to_the_constructor_is_checked_as_one_that_is_loaded() -> None:
    run = original("adapted", "adamw")
    train(run, 0, 6)
    state = run["ranks"].state_dict()
    fresh = plain("adamw")
    before = states_of(fresh)
    with pytest.raises(ValueError, match="'last_step' cannot be loaded"):
        scheduler(fresh, "adapted", {**state, "last_step": -1})
    with pytest.raises(ValueError, match="the state of a rank scheduler is a dict"):
        scheduler(fresh, "adapted", [])
    with pytest.raises(ValueError, match="followed the schedule"):
        scheduler(fresh, "low-rank", state)
    assert_same_bits(states_of(fresh), before)
    assert not fresh["optimizer"]._optimizer_load_state_dict_pre_hooks


def states_of(run: Run) -> list[Any]:
    return [copy.deepcopy(run[name].state_dict()) for name in ("model", "optimizer")]


def test_the_layers_are_those_of_the_state_if_none_are_named() -> None:
    """A layer that had no factors yet in the saved run is scheduled all the same."""
    schedule = Phases([0, 4], [LowRank(2), FullRank()])

    def made(model: nn.Module, **options: Any) -> RankScheduler:
        return RankScheduler(model, optimizer_of(model, "sgd"), schedule, STEPS, **options)

    saved = made(net(), layers=["0", "2"]).state_dict()
    assert made(other_net(), state=saved, layers=["0", "2"]).layers == ("0", "2")
    assert made(other_net(), state=saved).layers == ("0", "2")
    assert made(dr.factorize(other_net(), 2, layers="0"), state=saved).layers == ("0", "2")
    later = made(dr.factorize(other_net(), 2, layers="0"))
    later.load_state_dict(saved)
    assert later.layers == ("0", "2")


def test_adapters_are_drawn_from_the_seed_of_the_saved_run() -> None:
    whole: Run = {"model": net(), "optimizer": None}
    whole["optimizer"] = optimizer_of(whole["model"], "adamw")
    torch.manual_seed(7)
    scheduler(whole, "adapted")
    train(whole, 0, 6)
    saved = copy.deepcopy(states(whole))
    train(whole, 6, STEPS)
    torch.manual_seed(99)
    run = plain("adamw")
    torch.manual_seed(99)
    scheduler(run, "adapted")
    for name in ("ranks", "model", "optimizer"):
        run[name].load_state_dict(saved[name])
    assert run["ranks"].state_dict()["seed"] == 7
    train(run, 6, STEPS)
    assert_same_bits(states(run), states(whole))


def test_a_model_loaded_from_another_phase_is_brought_to_the_plan_at_the_next_step() -> None:
    early, late = original("adapted", "sgd"), original("adapted", "sgd")
    train(early, 0, 2)
    train(late, 0, 6)
    late["model"].load_state_dict(early["model"].state_dict())
    assert isinstance(late["model"][0].form, LowRank)
    train(late, 6, 7)
    assert late["model"][0].form == FullRank()
    early["optimizer"].load_state_dict(copy.deepcopy(late["optimizer"].state_dict()))
    assert early["model"][0].form == FullRank()
    train(early, 2, 3)
    assert isinstance(early["model"][0].form, LowRank)


def test_after_the_first_step_nothing_of_before_the_constructor_is_kept() -> None:
    run = plain("adamw")
    before = weakref.ref(run["model"][0].weight)
    scheduler(run, "adapted")
    gc.collect()
    assert before() is not None
    train_step(run["model"], run["optimizer"], 0)
    gc.collect()
    assert before() is None


def test_closing_a_scheduler_drops_what_is_kept() -> None:
    run = plain("adamw")
    before = weakref.ref(run["model"][0].weight)
    scheduler(run, "adapted")
    run["ranks"].close()
    gc.collect()
    assert before() is None


def test_what_the_constructor_replaced_returns_as_the_model_is_by_then() -> None:
    """Frozen and converted after the constructor, and with its momentum."""
    saved = original("adapted", "sgd")
    train(saved, 0, 6)
    run = plain("sgd")
    for name in ("model", "optimizer"):
        run[name].load_state_dict(copy.deepcopy(saved[name].state_dict()))
    scheduler(run, "adapted")
    run["model"].float()
    run["model"][2].requires_grad_(False)
    run["ranks"].load_state_dict(saved["ranks"].state_dict())
    weight, frozen = run["model"][0].weight, run["model"][2].weight
    assert torch.equal(weight, saved["model"][0].weight.float())
    assert not frozen.requires_grad and weight.requires_grad
    assert run["optimizer"].state[weight]["momentum_buffer"].shape == weight.shape


def test_a_truncated_bias_returns_too() -> None:
    saved = original("adapted", "sgd")
    train(saved, 0, 6)
    run = plain("sgd")
    for name in ("model", "optimizer"):
        run[name].load_state_dict(copy.deepcopy(saved[name].state_dict()))
    x = torch.randn(16, 6, dtype=torch.float64) + 3
    calibrated = dr.ActivationAwareTruncation(lambda: [x])
    moved = RankScheduler(
        run["model"], run["optimizer"], SCHEDULES["adapted"], STEPS,
        callbacks=[LRRewarmup(3), calibrated],
    )  # fmt: skip
    assert not torch.equal(run["model"][0].bias, saved["model"][0].bias)
    moved.load_state_dict(saved["ranks"].state_dict())
    assert_same_bits(run["model"].state_dict(), saved["model"].state_dict())
