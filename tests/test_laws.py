"""The laws of the design, over layer x dtype x form; then over random sequences of changes."""

from __future__ import annotations

import gc
import itertools
import weakref

import hypothesis.strategies as st
import pytest
import torch
from covering import coordinates, covering, over, product
from hypothesis import given, settings
from laws import (
    ALL_FORMS,
    CASES,
    DECOMPOSITIONS,
    DTYPES,
    LAYER_AND_DECOMPOSITION,
    LAYERS,
    OPTIMIZERS,
    SHARED,
    WEIGHTS,
    LayerCase,
    any_form,
    assert_close,
    check_moments,
    check_optimizer,
    fitting,
    randomize,
)
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import count_flops, trace
from dynarank.decompositions import get_decomposition
from dynarank.decompositions import registry as decompositions
from dynarank.forms import Form
from dynarank.layers import RankedLayer
from dynarank.layers import registry as layers
from dynarank.surgery.sites import survey

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's


def build(case: LayerCase, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(dtype)
    return model, torch.randn(case.shape, dtype=dtype)


def in_form(case: LayerCase, dtype: torch.dtype, form: Form) -> tuple[nn.Module, Tensor]:
    model, x = build(case, dtype)
    dr.apply_plan(model, {"0": fitting(model, form)})
    randomize(model)
    return model, x


# Law 1: join(split(W, full rank)) == W, and the truncation's error is optimal.


@over({"case, decomposition": LAYER_AND_DECOMPOSITION, "dtype": DTYPES})
def test_split_at_the_limit_loses_nothing(
    case: LayerCase, dtype: torch.dtype, decomposition: str
) -> None:
    (site,) = survey(case.make().to(dtype))
    weight = site.effective().detach()
    method = get_decomposition(decomposition, site.spec.geometry.groups)
    limit = method.limit(weight.shape)
    factors, shapes = method.split(weight, limit), method.shapes(weight.shape, limit)
    assert tuple(tuple(f.shape) for f in factors) == shapes
    assert_close(method.join(factors).to(dtype), weight)


@over({"case": LAYERS, "dtype": DTYPES, "rank": [1, 3]})
def test_svd_truncation_is_optimal(case: LayerCase, dtype: torch.dtype, rank: int) -> None:
    (site,) = survey(case.make().to(dtype))
    weight, groups = site.effective().detach(), site.spec.geometry.groups
    method = get_decomposition("svd", groups)
    rank = min(rank, method.limit(weight.shape))
    error = (method.join(method.split(weight, rank)) - weight.double()).norm().item()
    expected = tail(weight, groups, rank)
    # In fp32 by way of the Gram matrix: never more than 0.2% above the least error.
    slack = 1e-9 if dtype == torch.float64 else 2e-3
    floor = 1e-12 if dtype == torch.float64 else 1e-6 * weight.norm().item()
    assert error == pytest.approx(expected, rel=slack, abs=floor)


def tail(weight: Tensor, groups: int, rank: int) -> float:
    """The Frobenius norm of what the best rank-r approximation of each group leaves."""
    parts = [torch.linalg.svdvals(w.double().flatten(1))[rank:] for w in weight.chunk(groups)]
    return torch.cat(parts).norm().item()


# Law 2: apply(x, factors) == layer(x, join(factors)), in values and in gradients.


@over({"case, form": CASES, "dtype": DTYPES})
def test_a_form_computes_with_its_effective_weight(
    case: LayerCase, dtype: torch.dtype, form: Form
) -> None:
    model, x = in_form(case, dtype, form)
    layer = model[0]
    assert isinstance(layer, RankedLayer) or isinstance(form, FullRank)
    plain, _ = build(case, dtype)
    with torch.no_grad():
        for name, p in plain[0].named_parameters():
            p.copy_(getattr(layer, name))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = model(one), plain(two)
    assert_close(actual, expected)
    seed = torch.randn(expected.shape, dtype=dtype)
    actual.backward(seed)
    expected.backward(seed)
    assert one.grad is not None and two.grad is not None
    assert_close(one.grad, two.grad)


@over({"case, form": [(case, form) for case, form in CASES if case in SHARED]})
def test_gradients_against_finite_differences(case: LayerCase, form: Form) -> None:
    model, x = in_form(case, torch.float64, form)
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values), fast_mode=True)


# Law 3: inflate, deflate to adapted and merge keep the function; low-rank changes it as announced.


@over({"case, form": WEIGHTS, "dtype": DTYPES, "verb": ["inflate", "deflate", "merge"]})
def test_the_function_is_unchanged(
    case: LayerCase, dtype: torch.dtype, form: Form, verb: str
) -> None:
    model, x = in_form(case, dtype, form)
    decomposition = getattr(form, "decomposition", "svd")
    expected = model(x)
    if verb == "inflate":
        dr.inflate(model, layers="*")
    elif verb == "deflate":
        dr.deflate(model, 1, to="adapted", layers="*", decomposition=decomposition)
    else:
        dr.merge(model)
        assert type(model[0]) is type(case.make())
    assert_close(model(x), expected)


@over({"case": LAYERS, "dtype": DTYPES, "before": [FullRank(), LowRank(3), Adapted(3)]})
def test_a_truncation_changes_the_weight_by_its_announced_error(
    case: LayerCase, dtype: torch.dtype, before: Form
) -> None:
    model, _ = in_form(case, dtype, before)
    (site,) = survey(model)
    weight, groups = site.effective().detach().double(), site.spec.geometry.groups
    rank = min(2, get_decomposition("svd", groups).limit(weight.shape))
    (change,) = dr.apply_plan(model, {"0": LowRank(rank)}) or [None]
    actual = (survey(model)[0].effective().detach().double() - weight).norm() / weight.norm()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert change is None or change.error == pytest.approx(actual.item(), abs=tolerance)
    expected = tail(weight, groups, rank) / weight.norm().item()
    assert actual.item() == pytest.approx(expected, abs=tolerance)


# Law 4: applying twice is applying once; untouched things keep their object.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 3, stride=2)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.down(x)).mean((2, 3))
        return self.head(torch.relu(self.mix(x)))


PATHS = ["conv", "down", "mix", "head"]


def net(dtype: torch.dtype = torch.float32) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().to(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_a_plan_applied_twice_is_applied_once(form: Form) -> None:
    model, _ = net()
    plan = dict.fromkeys(PATHS, form)
    dr.apply_plan(model, plan)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    assert dr.apply_plan(model, plan) == []
    after = dict(model.named_parameters())
    assert {name: id(p) for name, p in after.items()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


@pytest.mark.parametrize("form", ALL_FORMS[1:], ids=str)
def test_what_is_not_named_is_not_touched(form: Form) -> None:
    model, x = net()
    model.eval()
    calls: list[int] = []
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight.requires_grad_(False)
    modules = {path: module for path, module in model.named_modules()}
    kept = {n: p for n, p in model.named_parameters() if n != "conv.weight"}
    dr.apply_plan(model, {"conv": form})
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in kept.items())
    assert dict(model.named_modules()) == modules
    assert all(not module.training for module in model.modules())
    assert not model.head.weight.requires_grad
    model(x)
    assert calls == [1]


@pytest.mark.parametrize("form", ALL_FORMS[1:], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_memory_format_stay(form: Form, dtype: torch.dtype) -> None:
    model, _ = net(dtype)
    model.to(memory_format=torch.channels_last)
    dr.apply_plan(model, {"down": form})
    assert {p.dtype for p in model.parameters()} == {dtype}
    dr.inflate(model)
    assert model.down.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.down.weight.is_contiguous()


def test_a_full_rank_layer_has_the_keys_of_its_plain_one() -> None:
    model, _ = net()
    keys = list(model.state_dict())
    dr.inflate(dr.factorize(model, 2, layers="*"))
    assert list(model.state_dict()) == keys
    Net().load_state_dict(model.state_dict())


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("held", [True, False], ids=["held", "not-held"])
def test_a_frozen_layer_stays_frozen(form: Form, held: bool) -> None:
    """In every form and back, whether the optimizer holds it or not."""
    model, x = net()
    model.mix.weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if held or p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for plan in (LowRank(2), form, Adapted(3), FullRank()):
        dr.apply_plan(model, {"mix": plan}, optimizer=optimizer)
        step(model, x, optimizer)
        frozen = {n for n, p in model.mix.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, _ in model.mix.named_parameters()} - {"bias"}
    assert any(p is model.mix.weight for p in optimizer.param_groups[0]["params"]) == held


# Law 7: predicted parameters and FLOPs are exact, for every form of every layer.


@over({"case, form": CASES, "first": [True, False]})
def test_cost_is_exact(case: LayerCase, form: Form, first: bool) -> None:
    """An inner layer's input needs a gradient, a first layer's does not."""
    model, x = build(case, torch.float32)
    form = fitting(model, form)
    x.requires_grad_(not first)
    use = trace(model, x)
    predicted = use.flops({"0": form})
    parameters = use.parameters({"0": form})
    dr.apply_plan(model, {"0": form})
    assert count_flops(model, x) == predicted
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert parameters == (sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("now", ALL_FORMS, ids=str)
def test_cost_does_not_depend_on_the_form_it_was_traced_in(now: Form, form: Form) -> None:
    model, x = net()
    dr.apply_plan(model, dict.fromkeys(PATHS, now))
    predicted = trace(model, x).flops(dict.fromkeys(PATHS, form))
    dr.apply_plan(model, dict.fromkeys(PATHS, form))
    assert count_flops(model, x) == predicted


# All laws at once, over random sequences of changes, with an optimizer.

any_plan = st.dictionaries(st.sampled_from(PATHS), any_form, min_size=1)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    plans=st.lists(any_plan, min_size=1, max_size=5),
    kind=st.sampled_from(sorted(OPTIMIZERS)),
    moments=st.sampled_from(["project", "reset", "prune"]),
    train_between=st.booleans(),
)
def test_any_sequence_of_changes(
    plans: list[dict[str, Form]], kind: str, moments: str, train_between: bool
) -> None:
    model, x = net(torch.float64)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "lr": 0.02},
    ]
    optimizer = OPTIMIZERS[kind](groups)
    del groups  # it holds the first parameters
    options = [
        {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    for plan in plans:
        if train_between:
            step(model, x, optimizer)
        model.eval()
        before, shapes = model(x), {s.path: s.shape for s in survey(model)}
        old = [weakref.ref(p) for p in model.parameters()]
        changes = dr.apply_plan(model, plan, optimizer=optimizer, moments=moments)  # type: ignore[arg-type]
        if not any(isinstance(change.after, LowRank) for change in changes):
            assert_close(model(x), before)
        assert all(dr.current_plan(model)[path] == form for path, form in plan.items())
        assert {s.path: s.shape for s in survey(model)} == shapes
        check_optimizer(model, optimizer)
        known = [ref() for ref in old]
        made = [p for p in model.parameters() if not any(p is one for one in known)]
        check_moments(made, optimizer)
        del known
        assert dr.apply_plan(model, plan, optimizer=optimizer) == []
        alive = {id(p) for p in model.parameters()}
        del before
        gc.collect()
        assert all(ref() is None or id(ref()) in alive for ref in old)
        model.train()
    after = [
        {k: group[k] for k in one}
        for group, one in zip(optimizer.param_groups, options, strict=True)
    ]
    assert after == options
    step(model, x, optimizer)


# The table has every decomposition; what runs by default leaves no pair of its values out.


def test_every_decomposition_and_layer_has_a_row() -> None:
    """Or tests of its own, where its inputs are more than one tensor of numbers."""
    assert list(decompositions._BUILT_IN) == DECOMPOSITIONS
    rows = {type(case.make()).__name__ for case in LAYERS}
    elsewhere = {"Embedding", "MultiheadAttention", "NonDynamicallyQuantizableLinear"}
    recurrent = {kind + cell for kind in ("LSTM", "GRU", "RNN") for cell in ("", "Cell")}
    known = {name.rpartition(".")[2] for name in layers._BUILT_IN}
    assert known == rows | elsewhere | recurrent


AXES = {
    name: mark.args[0]
    for name, law in globals().copy().items()
    for mark in getattr(law, "pytestmark", [])
    if name.startswith("test_") and mark.name == "product"
}


@pytest.mark.parametrize("law", AXES)
def test_every_pair_of_a_laws_values_is_covered(law: str) -> None:
    """Of every layer with every decomposition, dtype and form, and so on, by each law."""
    names, rows = product(AXES[law])
    few = covering(names, rows)
    assert len(few) < len(rows)
    whole, kept = ([coordinates(names, row) for row in some] for some in (rows, few))
    for a, b in itertools.combinations(whole[-1], 2):
        assert {(row.get(a), row.get(b)) for row in kept} == {
            (row.get(a), row.get(b)) for row in whole
        }
