"""What a budget is of, what else counts in it, and how exactly it is met."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank import FullRank, LowRank
from dynarank.allocation import within_budget
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Plan
from dynarank.surgery.site import Site


def network(width: int = 64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(48, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 4))
    return model, torch.randn(16, 48)


def size(model: nn.Module) -> int:
    """The size of the parameters in bytes."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inflated", [False, True])
def test_a_budget_of_bytes_is_one_of_the_parameters_as_stored(
    dtype: torch.dtype, inflated: bool
) -> None:
    model = network()[0].to(dtype)
    full = size(model)
    if inflated:
        dr.inflate(dr.factorize(model, 0.5, layers="*"))
        for p in model.parameters():
            torch.nn.init.normal_(p)
    plan = dr.plan_within(model, bytes=0.5)
    assert plan == dr.plan_within(model, params=0.5) == dr.plan_within(model, bytes=full // 2)
    dr.apply_plan(model, plan)
    assert 0.49 * full < size(model) <= 0.5 * full


def test_bytes_count_each_parameter_in_its_own_dtype() -> None:
    model = network()[0]
    model[4].double()  # twice the bytes for the same parameters
    full = size(model)
    plan = dr.plan_within(model, bytes=0.5, ranks="uniform")
    assert plan != dr.plan_within(model, params=0.5, ranks="uniform")
    dr.apply_plan(model, plan)
    assert 0.49 * full < size(model) <= 0.5 * full


def test_a_budget_of_the_layers_leaves_the_others_out() -> None:
    model, x = network()
    layers = ["0", "2"]
    use = trace(model, x)
    full = sum(use.layers[path].flops(FullRank()).training for path in layers)
    for amount in (0.5, full // 2):
        plan = dr.plan_within(model, x, flops=amount, of="layers", layers=layers)
        spent = sum(use.layers[path].flops(form).training for path, form in plan.items())
        assert list(plan) == layers and 0.49 * full < spent <= 0.5 * full
    assert dr.plan_within(model, params=1.0, of="layers") == dict.fromkeys("024", FullRank())


def test_planned_forms_of_other_layers_count() -> None:
    """The budget is of the whole model as it will be, against the whole model full-rank."""
    model, x = network()
    full, planned = count_flops(model, x).training, {"4": LowRank(8)}
    plan = dr.plan_within(model, x, flops=0.5, planned=planned)
    assert plan.keys() == {"0", "2"}
    dr.apply_plan(model, {**plan, **planned})
    assert 0.48 * full < count_flops(model, x).training <= 0.5 * full
    assert dr.plan_within(model, x, flops=0.5, layers=["0", "2"]) == plan, "the form it has"


@pytest.mark.parametrize("kind", ["flops", "params", "bytes"])
def test_a_share_is_one_of_full_rank_whatever_the_forms_are_now(kind: str) -> None:
    model, x = network()
    plan = dr.plan_within(model, x, layers="4", ranks="uniform", **{kind: 0.7})  # type: ignore[arg-type]
    dr.factorize(model, 4, layers=["0", "2"])
    planned: Plan = {"0": FullRank(), "2": FullRank()}
    given = {kind: 0.7, "layers": "4", "ranks": "uniform", "planned": planned}
    assert dr.plan_within(model, x, **given) == plan  # type: ignore[arg-type]


def test_a_trace_takes_the_place_of_the_sample() -> None:
    model, x = network()
    use = trace(copy.deepcopy(model), x)
    assert dr.plan_within(model, use=use, flops=0.5) == dr.plan_within(model, x, flops=0.5)
    with pytest.raises(ValueError, match="the trace has no layer '0'"):
        dr.plan_within(model, use=trace(nn.Linear(4, 4), torch.ones(1, 4)), flops=0.5)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_uniform_ranks_are_equal_shares_and_need_no_spectra(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(site: Site) -> torch.Tensor:
        raise AssertionError("no weight is read")

    monkeypatch.setattr(Site, "effective", fail)
    model, _ = network()
    plan = dr.plan_within(model, params=share, of="layers", ranks="uniform")
    sites = {site.path: site for site in dr.survey(model) if site.path in plan}
    spent = {path: site.entries(plan[path]) for path, site in sites.items()}
    full = {path: site.entries(FullRank()) for path, site in sites.items()}
    room = share * sum(full.values()) - sum(spent.values())
    steps = [site.entries(LowRank(4)) for site in sites.values()]  # at most
    assert 0 <= room < max(steps)
    for path, step in zip(sites, steps, strict=True):
        assert abs(spent[path] / full[path] - share) <= 2 * step / full[path]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_narrow_layers_have_ranks_to_choose_from(width: int) -> None:
    """With multiples of 8 alone, every budget below .5 to .9 was refused."""
    model = network(width)[0]
    model[6] = nn.Identity()
    full = sum(p.numel() for p in model.parameters())
    for share in (0.3, 0.5, 0.7):
        cut = copy.deepcopy(model)
        dr.apply_plan(cut, dr.plan_within(model, params=share, layers="*"))
        assert (share - 0.05) * full < sum(p.numel() for p in cut.parameters()) <= share * full


def test_the_best_decomposition_is_chosen_for_each_weight() -> None:
    """A separable kernel, one of low Tucker rank, and a matrix; each exactly in its own form."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 64),
    )  # fmt: skip
    x = torch.randn(4, 16, 8, 8)
    for path, form in (("0", LowRank(6, "separable")), ("2", LowRank(12, "tucker"))):
        dr.inflate(dr.factorize(model, form.rank, layers=path, decomposition=form.decomposition))
    full = count_flops(copy.deepcopy(model), x).training
    lost: list[float] = []
    for name in ("best", "svd"):
        cut = copy.deepcopy(model)
        plan = dr.plan_within(cut, x, flops=0.25, layers="*", decomposition=name)
        if name == "best":
            chosen = {path: getattr(form, "decomposition", "") for path, form in plan.items()}
            assert chosen == {"0": "separable", "2": "tucker", "4": "svd"}
        changes = dr.apply_plan(cut, plan)
        assert count_flops(cut, x).training <= 0.25 * full
        lost.append(sum(change.error**2 for change in changes))
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize("decomposition", ["svd", "best", "tucker"])
def test_each_weight_is_decomposed_once_for_all_multiples(
    decomposition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.Flatten()]
    model = nn.Sequential(*convolutions, nn.Linear(192, 50))
    asked: list[object] = []
    for name in ("spectrum", "_kept_by_split"):

        def counted(site: Site, *rest: object, own: Callable[..., object]) -> object:
            asked.append((site.path, [one for one in rest if isinstance(one, LowRank)]))
            return own(site, *rest)

        own = getattr(within_budget, name)
        monkeypatch.setattr(within_budget, name, partial(counted, own=own))
    steps: set[int] = set()
    ranks = within_budget._ranks  # pyright: ignore[reportPrivateUsage]

    def watched(site: Site, step: int, name: str) -> list[LowRank]:
        steps.add(step)
        return ranks(site, step, name)

    monkeypatch.setattr(within_budget, "_ranks", watched)
    layers = ["0", "2"] if decomposition == "tucker" else "*"
    tries = 0
    for share in (0.4, 0.5, 0.6, 0.7):
        del asked[:]
        steps.clear()
        dr.plan_within(
            model, params=share, of="layers", multiple_of=None, layers=layers,
            decomposition=decomposition,
        )  # fmt: skip
        assert asked
        assert len(asked) == len(set(map(str, asked)))
        tries = max(tries, len(steps))
    assert tries > 1


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"bytes": 0.5, "params": 0.5}, "got 2"),
        ({"params": 0.5, "of": "module"}, '"model" or of its "layers", got \'module\''),
        ({"params": 0.5, "ranks": "even"}, '"energy" or "uniform", got \'even\''),
        ({"params": 0.5, "planned": {"9": FullRank()}}, "no layer '9'"),
    ],
)
def test_errors_name_what_was_asked(named: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dr.plan_within(network()[0], **named)  # type: ignore[arg-type]
