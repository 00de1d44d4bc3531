"""The related methods end to end, on a small network."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import assert_close
from small_run import STEPS, Running, assert_same_bits, forms, net, sgd, train_step
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank, RankScheduler
from dynarank.scheduler.lr_rewarmup import LRRewarmup
from dynarank.schedules import (
    Cuttlefish,
    Growing,
    Pufferfish,
    RankSchedule,
    lora,
    published,
    relora,
)

FULL = FullRank()
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01),
}
over_optimizers = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
# Each with what its page says the scheduler is to be given.
PRESETS: dict[str, tuple[RankSchedule, dict[str, Any]]] = {
    "lora": (lora(2, alpha=2.0), {}),
    "relora": (relora(2, warm_start=2, every=3, alpha=2.0, rewarmup=2), {"moments": "prune"}),
    "pufferfish": (Pufferfish(2, switch=4, first=1, last=0), {"moments": "reset", "rewarmup": 3}),
    "cuttlefish": (Cuttlefish(2, window=2, recent=2, threshold=9.0), {"moments": "reset"}),
    "growing": (Growing(6, first=1, buffer=2, spectra_every=2, warmup=1, stop=9), {}),
    "published": (published(2, inflate=4, deflate=8), {"moments": "reset"}),
}


def running(name: str, kind: str = "sgd") -> Running:
    schedule, options = PRESETS[name]
    model = net()
    optimizer = OPTIMIZERS[kind](model)
    rewarmup = options.get("rewarmup", schedule.rewarmup or 0)
    moments = options.get("moments", "project")
    ranks = RankScheduler(
        model, optimizer, schedule, STEPS, moments=moments, callbacks=[LRRewarmup(rewarmup)]
    )
    return Running(model, optimizer, ranks)


def probe() -> Tensor:
    torch.manual_seed(99)
    return torch.randn(7, 6, dtype=torch.float64)


@over_optimizers
@pytest.mark.parametrize("name", PRESETS)
def test_it_trains_to_the_end(name: str, kind: str) -> None:
    run, x = running(name, kind), probe()
    before = (run.model(x) - 1).square().mean().item()
    run.steps(0, STEPS)
    after = (run.model(x) - 1).square().mean().item()
    assert after < before
    dr.merge(run.model, optimizer=run.optimizer)
    assert [type(module) for module in run.model] == [type(module) for module in net()]


@over_optimizers
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.slow
def test_it_resumes_at_every_step_bit_by_bit(name: str, kind: str) -> None:
    whole, states = running(name, kind), list[Any]()
    for step in range(STEPS):
        states.append(whole.state())
        whole.steps(step, step + 1)
    for step, state in enumerate(states):
        json.dumps(state[0])
        resumed = running(name, kind)
        with torch.no_grad():
            for p in resumed.model.parameters():
                p.add_(1)
        resumed.load(state)
        resumed.steps(step, STEPS)
        assert_same_bits(resumed.state(), whole.state())


# ReLoRA: merge, restart, partial reset, re-warm-up.


@over_optimizers
def test_a_restart_merges_what_was_learned_and_starts_again(kind: str) -> None:
    """By hand: full at steps 0 and 1, adapters from steps 2, 5, 8 and 11 on."""
    run, x = running("relora", kind), probe()
    seen: list[object] = []
    for step in range(STEPS):
        seen.append(getattr(forms(run.model)[0], "restart", "full"))
        train_step(run.model, run.optimizer, step)
        y, bases = run.model(x), [p.detach().clone() for p in of(run.model, "base")]
        learned = [up.detach().clone() for up in of(run.model, "up")]
        changes = run.ranks.step()
        assert_close(run.model(x), y)
        if changes and seen[-1] != "full" and step + 1 < STEPS:
            assert all(up.any() for up in learned)
            assert not any(up.any() for up in of(run.model, "up"))
            pairs = zip(of(run.model, "base"), bases, strict=True)
            assert all(not torch.equal(new, old) for new, old in pairs)
    assert seen == ["full", "full", 0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def of(model: nn.Module, name: str) -> list[Tensor]:
    return [p for path, p in model.named_parameters() if path.endswith(name)]


def test_the_rate_comes_back_over_two_steps_after_each_restart() -> None:
    model, rewarmup = net(), LRRewarmup(2)
    optimizer, schedule = sgd(model), PRESETS["relora"][0]
    ranks = RankScheduler(model, optimizer, schedule, STEPS, callbacks=[rewarmup])
    factors: list[float] = []
    for step in range(STEPS):
        factors.append(rewarmup.factor)
        Running(model, optimizer, ranks).steps(step, step + 1)
    assert factors == [1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.5, 1, 1, 0.5]


def test_a_restart_keeps_a_tenth_of_the_adapters_moments() -> None:
    run = running("relora", "adamw")
    run.steps(0, 4)
    train_step(run.model, run.optimizer, 4)
    full = [run.optimizer.state[p]["exp_avg"] for p in of(run.model, "up")]
    assert all(moment.all() for moment in full)
    run.ranks.step()
    kept = [run.optimizer.state[p]["exp_avg"] for p in of(run.model, "up")]
    assert [int((m != 0).sum()) for m in kept] == [
        m.numel() - -(-9 * m.numel() // 10) for m in kept
    ]


# The others.


def test_lora_trains_no_base() -> None:
    run = running("lora")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.steps(0, STEPS)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) == name.endswith("base")
    assert forms(run.model) == [Adapted(2, alpha=2.0)] * 2 + [FULL]  # the output layer


def test_pufferfish_keeps_the_first_layer_and_forgets_the_moments() -> None:
    """Layers 0 and 2 get cheaper at rank 2 and are under the schedule; the first stays full."""
    run = running("pufferfish")
    run.steps(0, 3)
    train_step(run.model, run.optimizer, 3)
    run.ranks.step()
    assert forms(run.model) == [FULL, LowRank(2), FULL]
    assert not any(run.optimizer.state.get(p) for p in of(run.model, "up"))


def test_cuttlefish_finds_epoch_and_ranks() -> None:
    """Readings at steps 0, 2, 4 (all settled, by so high a threshold) and 6, where it switches."""
    schedule, _ = PRESETS["cuttlefish"]
    assert schedule.stateful
    run = running("cuttlefish")
    start = stable_ranks(run.model)
    for step in range(6):
        assert set(forms(run.model)) == {FULL}
        train_step(run.model, run.optimizer, step)
        now = stable_ranks(run.model)
        run.ranks.step()
    sizes = [(8, 6), (6, 8)]
    expected: list[Any] = []
    for (n, m), before, after in zip(sizes, start, now, strict=False):
        rank = min(-(-int(after) * min(n, m) // int(before)), min(n, m))
        expected.append(LowRank(rank) if rank * (n + m) < n * m else FULL)
    assert forms(run.model) == [*expected, FULL]  # the output layer
    assert [d.step for d in run.ranks.decisions] == [6, 6]


def stable_ranks(model: nn.Module) -> list[float]:
    spectra = [torch.linalg.svdvals(model[i].weight.detach()) for i in (0, 2, 4)]
    return [float((s.square().sum() / s[0].square()).item()) for s in spectra]


def test_growing_ranks_follow_the_singular_values() -> None:
    """Looked at from step 2 on, every second step until step 8; cut at step 9."""
    run = running("growing")
    modes = [1, 1]
    assert forms(run.model)[:2] == [LowRank(3), LowRank(3)]
    for step in range(1, STEPS):
        train_step(run.model, run.optimizer, step)
        weights = [run.model[i].weight.detach() for i in (0, 2)]
        run.ranks.step()
        for i, weight in enumerate(weights if step in (2, 4, 6, 8) else []):
            s = torch.linalg.svdvals(weight)
            choices = list(range(modes[i], min(modes[i] + 2, 6 - 2)))
            shares = [1 - (s * (torch.arange(6) >= m)).var() / s.var() for m in choices]
            enough = [m for m, share in zip(choices, shares, strict=True) if share > 0.9]
            modes[i] = [*enough, *choices[-1:], modes[i]][0]
        rank = 0 if step >= 9 else 2
        assert forms(run.model)[:2] == [LowRank(m + rank) for m in modes]
    assert max(modes) > 1


def test_as_published_runs_in_two_branches() -> None:
    run = running("published")
    run.steps(0, STEPS)
    assert set(forms(run.model)) == {Adapted(2, alpha=16.0, execution="two-branch"), FULL}
