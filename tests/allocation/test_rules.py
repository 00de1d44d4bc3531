"""Automatic ranks: rules for one weight, and the best plan within a budget."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank import FullRank, LowRank, rules
from dynarank.cost.flops import count_flops, trace
from dynarank.cost.timing import layer_timer
from dynarank.forms import Form


def network(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 16, 48), nn.ReLU(), nn.Linear(48, 10),
    )  # fmt: skip
    with torch.no_grad():  # spectra that fall, each in its own way
        for i, p in enumerate(p for p in model.parameters() if p.ndim > 1):
            u, s, v = torch.linalg.svd(p.flatten(1), full_matrices=False)
            p.copy_((u * s * torch.arange(1.0, len(s) + 1).pow(-i) @ v).reshape(p.shape))
    return model, torch.randn(4, 3, 6, 6)


def step(shape: tuple[int, ...]) -> int:
    """The multiple of ranks of a weight: 8, or less so that it has eight ranks to choose from."""
    n, m = shape[0], math.prod(shape[1:])
    return next((s for s in (8, 4, 2) if n * m // (n + m) // s >= 8), 1)


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_of_parameters_is_kept_to_and_used_up(budget: float, calibrated: bool) -> None:
    model, x = network()
    full = sum(p.numel() for p in model.parameters())
    known = dr.calibrate(model, [x]) if calibrated else None
    plan = dr.plan_within(model, params=budget, calibration=known)
    dr.apply_plan(model, plan, calibration=known)
    spent = sum(p.numel() for p in model.parameters())
    assert spent <= budget * full
    room = budget * full - spent
    for path, form in plan.items():
        if isinstance(form, LowRank):
            site = next(s for s in dr.survey(model) if s.path == path)
            assert int(form.rank) % step(site.spec.unit_shape) == 0
            now = sum(math.prod(shape) for shape in site.spec.factor_shapes(form))
            assert room < math.prod(site.shape) - now, "it could have stayed full-rank"
    if budget == 1.0:
        assert set(plan.values()) == {FullRank()}


def test_a_budget_of_flops_is_exact() -> None:
    model, x = network()
    full = count_flops(copy.deepcopy(model), x).training
    plan = dr.plan_within(model, x, flops=0.7)
    assert dr.plan_within(model, x, flops=int(0.7 * full)) == plan
    predicted = trace(model, x).flops(plan).training
    dr.apply_plan(model, plan)
    assert count_flops(model, x).training == predicted <= 0.7 * full
    assert {type(form) for form in plan.values()} == {FullRank, LowRank}


def test_a_plan_is_as_good_as_the_best_of_all_plans() -> None:
    """Every combination of ranks of two layers; equal here, and never above."""
    model, _ = network()
    paths, values = ("5", "7"), rules.spectra(model, layers=["5", "7"])
    plan = dr.plan_within(model, params=0.5, layers=["5", "7"])

    def kept(form: Form, path: str) -> float:
        energy = values[path].square().sum(0)
        if isinstance(form, FullRank):
            return 1.0
        return (energy[: int(form.rank)].sum() / energy.sum()).item()

    full = sum(p.numel() for p in model.parameters())
    rest = full - sum(math.prod(s.shape) for s in dr.survey(model) if s.path in paths)
    sizes = {s.path: s.shape for s in dr.survey(model)}

    def cost(form: Form, path: str) -> int:
        n, m = sizes[path]
        return n * m if isinstance(form, FullRank) else int(form.rank) * (n + m)

    forms: dict[str, list[Form]] = {
        p: [FullRank(), *map(LowRank, range(step(sizes[p]), min(sizes[p]) + 1, step(sizes[p])))]
        for p in paths
    }
    best = max(
        sum(kept(f, p) for f, p in zip(every, paths, strict=True))
        for every in itertools.product(*(forms[p] for p in paths))
        if rest + sum(cost(f, p) for f, p in zip(every, paths, strict=True)) <= 0.5 * full
    )
    assert sum(kept(plan[p], p) for p in paths) == pytest.approx(best, rel=1e-5)


def test_a_calibration_moves_rank_to_where_the_outputs_need_it() -> None:
    """Two equal weights; the inputs of one have two directions, those of the other all."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)])
    model[1].load_state_dict(model[0].state_dict())
    narrow = torch.randn(64, 2) @ torch.randn(2, 32)
    known = dr.calibrate(
        model, [(narrow, torch.randn(64, 32))], forward=lambda m, b: (m[0](b[0]), m[1](b[1]))
    )
    ranks = dr.plan_within(model, params=0.6, layers="*", calibration=known, multiple_of=2)
    assert ranks["0"] == LowRank(2) and int(getattr(ranks["1"], "rank", 32)) > 8
    ranks = dr.plan_within(model, params=0.6, layers="*", multiple_of=2)
    assert abs(int(ranks["0"].rank) - int(ranks["1"].rank)) <= 2  # type: ignore[union-attr]


def test_seconds_come_from_a_table_or_are_measured() -> None:
    model, x = network()

    def table(path: str, form: Form) -> float:
        if isinstance(form, FullRank):
            return 1.0
        return 0.1 + int(form.rank) / 40 if path == "5" else 2.0  # factors are slow elsewhere

    plan = dr.plan_within(model, seconds=2.6, timings=table)
    assert {p for p, f in plan.items() if isinstance(f, LowRank)} == {"5"}
    assert plan["5"] == LowRank(20)
    timer = layer_timer(trace(model, x), "cpu")
    assert timer("5", FullRank()) > 0 and timer("2", LowRank(8)) > 0
    assert timer("5", LowRank(8)) == timer("5", LowRank(8))  # measured once
    generous = dr.plan_within(model, x, seconds=1e3)
    assert set(generous.values()) == {FullRank()}


def test_rules() -> None:
    model, _ = network()
    assert set(rules.spectra(model)) == {"0", "2", "5"}  # all but the output layer
    start = rules.spectra(model, layers="*")
    assert {p: tuple(v.shape) for p, v in start.items()} == {
        "0": (1, 27), "2": (2, 16), "5": (1, 48), "7": (1, 10),
    }  # fmt: skip
    assert rules.uniform(start, 0.5) == {"0": 13, "2": 8, "5": 24, "7": 5}
    assert rules.stable_rank_rule(start, start) == {"0": 27, "2": 16, "5": 48, "7": 10}
    ranks = rules.energy_threshold(start, 0.9, multiple_of=2)
    for path, rank in ranks.items():
        energy = start[path].square().sum(0)
        assert energy[:rank].sum() >= 0.9 * energy.sum()
        assert rank <= 2 or energy[: rank - 2].sum() < 0.9 * energy.sum()
    assert rules.energy_threshold(start, 1.0) == {"0": 27, "2": 16, "5": 48, "7": 10}
    dr.factorize(model, ranks)
    assert model[5].form == LowRank(ranks["5"])


def test_the_stable_rank_is_scaled_by_that_at_the_start() -> None:
    """Sum s^2 / s1^2: 4 at the start, 1 + 3/4 now; 1.75 of 4 is what is left of 4 directions."""
    now, start = torch.tensor([[1.0, 0.5, 0.5, 0.5]]), torch.ones(1, 4)
    assert rules.stable_rank_rule({"fc": now}, {"fc": start}) == {"fc": 2}
    assert rules.stable_rank_rule({"fc": start}, {"fc": now}) == {"fc": 4}
    with pytest.raises(ValueError, match="no spectrum at the start"):
        rules.stable_rank_rule({"fc": now}, {})


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "one budget.*got 0"),
        ({"params": 0.5, "flops": 0.5}, "got 2"),
        (
            {"params": 0.01},
            r"budget of 0\.01 of .* is below .* the smallest ranks, 0\.\d+ \(",
        ),
        ({"params": 1.5}, "is a share of the full-rank"),
        ({"params": -3}, "positive"),
        ({"flops": 0.5}, "needs a sample"),
        ({"params": 0.5, "layers": "nothing"}, "matches no layer"),
    ],
)
def test_errors_say_what_to_do(named: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dr.plan_within(network()[0], **named)  # type: ignore[arg-type]
