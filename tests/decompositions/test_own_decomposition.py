"""A decomposition of one's own: a name and a few methods, and every law holds for it.

And the base class's defaults are what the built-in decompositions have closed forms for.
"""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from types import ModuleType

import pytest
import torch
from laws import SHARED, LayerCase, assert_close, forms, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import count_flops, trace
from dynarank.decompositions import Decomposition, Factors, Geometry, get_decomposition, registry
from dynarank.decompositions.grouped import Grouped
from dynarank.forms import Form
from dynarank.surgery.sites import survey

F64 = torch.float64
BUILT_IN = ["svd", "tucker", "cp", "separable"]
WEIGHTS = [(7, 5), (10, 6, 3), (8, 6, 3, 2), (1, 9, 3, 3), (6, 5, 2, 3, 2)]


class Deep(Decomposition):
    """``W = up @ middle @ down``: deep matrix factorization (Arora et al., arXiv 1905.13655)."""

    name = "deep"

    def factor_names(self, dims: int) -> tuple[str, ...]:
        return "down", "middle", "up"

    def limit(self, shape: Sequence[int]) -> int:
        return min(shape[0], math.prod(shape[1:]))

    def shapes(self, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], ...]:
        ones = (1,) * (len(shape) - 2)
        return (rank, *shape[1:]), (rank, rank, *ones), (shape[0], rank, *ones)

    def split(self, weight: Tensor, rank: int) -> Factors:
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        third = values[:rank].pow(1 / 3)
        parts = third[:, None] * right[:rank], torch.diag(third), left[:, :rank] * third
        shapes = self.shapes(weight.shape, rank)
        return tuple(part.reshape(s) for part, s in zip(parts, shapes, strict=True))

    def join(self, factors: Factors) -> Tensor:
        down, middle, up = (factor.flatten(1) for factor in factors)
        return (up @ (middle @ down)).reshape(len(up), *factors[0].shape[1:])

    def stages(self, geometry: Geometry, rank: int) -> tuple[Geometry, ...]:
        pointwise = Geometry.pointwise(len(geometry.stride))
        return geometry, pointwise, pointwise


@pytest.fixture(autouse=True)
def deep() -> Iterator[Deep]:
    decomposition = Deep()
    dr.decompositions.register_decomposition(decomposition)
    yield decomposition
    del registry._LOADED["deep"]


def in_form(case: LayerCase, form: Form) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(case.make()).to(F64), torch.randn(case.shape, dtype=F64)
    dr.apply_plan(model, {"0": fitting(model, form)})
    randomize(model)
    return model, x


def fitting(model: nn.Module, form: Form) -> Form:
    (site,) = survey(model)
    assert not isinstance(form, FullRank)
    limit = site.spec.decomposition(form).limit(site.shape)
    return replace(form, rank=min(3, limit))


over_layers = pytest.mark.parametrize("case", SHARED, ids=str)
over_forms = pytest.mark.parametrize("form", forms("deep")[1:], ids=str)


@over_layers
def test_law_1_split_at_the_limit_loses_nothing(case: LayerCase) -> None:
    (site,) = survey(case.make().to(F64))
    weight = site.effective().detach()
    method = get_decomposition("deep", site.spec.geometry.groups)
    assert_close(method.join(method.split(weight, method.limit(weight.shape))), weight)
    smaller = method.refactor(method.split(weight, method.limit(weight.shape)), 1)
    assert_close(method.join(smaller), method.join(method.split(weight, 1)), 1e-10)


@over_layers
@over_forms
def test_laws_2_and_3_its_function_stays(case: LayerCase, form: Form) -> None:
    model, x = in_form(case, form)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = model(one)
    before.square().sum().backward()
    merged = dr.merge(copy.deepcopy(model))
    assert type(merged[0]) is type(case.make())
    after = merged(two)
    after.square().sum().backward()
    assert one.grad is not None and two.grad is not None
    assert_close(after, before)
    assert_close(two.grad, one.grad)
    adapted = dr.deflate(dr.inflate(model, layers="*"), 1, to="adapted", layers="*")
    assert dr.current_plan(adapted)["0"] == Adapted(1, "deep", alpha=16.0)  # as it last was
    assert_close(adapted(x), before)


@pytest.mark.parametrize("form", [LowRank(3, "deep"), Adapted(3, "deep", alpha=6.0)], ids=str)
@over_layers
def test_law_6_moments_go_through_it(case: LayerCase, form: Form) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(case.make()).to(F64), torch.randn(case.shape, dtype=F64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    (one,) = survey(model)
    (weight,) = one.parameters().values()
    moment = one.spec.to_canonical(optimizer.state[weight]["exp_avg"]).clone()
    dr.apply_plan(model, {"0": fitting(model, form)}, optimizer=optimizer)
    (one,) = survey(model)
    scale = getattr(one.form, "scale", 1.0)
    factors = tuple(f.detach() for f in one.factors())
    pulled = one.spec.decomposition(one.form).pull(factors, scale * moment)  # type: ignore[arg-type]
    for factor, expected in zip(one.factors(), pulled, strict=True):
        state = optimizer.state.get(factor)
        if state:
            assert_close(state["exp_avg"], expected, 1e-9)
            assert (state["exp_avg_sq"] * (1 + 1e-9) >= state["exp_avg"].square()).all()
    dr.inflate(model, optimizer=optimizer, layers="*")
    model(x).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@over_layers
@over_forms
def test_law_7_its_cost_is_exact(case: LayerCase, form: Form) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(case.make()), torch.randn(case.shape).requires_grad_()
    form, use = fitting(model, form), trace(model, x)
    predicted, parameters = use.flops({"0": form}), use.parameters({"0": form})[0]
    dr.apply_plan(model, {"0": form})
    assert count_flops(model, x) == predicted
    assert parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_its_cost_is_counted_once_and_outside_of_other_counters(deep: Deep) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as outer:
        assert deep.join_flops((6, 5), 2) == 2 * (2 * 2 * 5 + 6 * 2 * 5)
        assert deep.pull_flops((6, 5), 2) == 3 * deep.join_flops((6, 5), 2)
    assert outer.get_total_flops() == 0


@pytest.mark.parametrize("form", [LowRank(3, "deep"), Adapted(3, "deep")], ids=str)
def test_it_compiles_into_one_graph(form: Form) -> None:
    model, x = in_form(SHARED[0], form)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x))


def test_it_survives_pickling_and_works_with_every_helper() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Embedding(4, 20), nn.LSTM(20, 20))
    dr.factorize(model, 4, layers=["0", "2", "3.weight_hh_l0"], decomposition="deep")
    assert list(model[0].state_dict()) == ["down", "middle", "up", "bias", "saved_forms"]
    twin = pickle.loads(pickle.dumps(model))
    assert dr.current_plan(twin) == dr.current_plan(model)
    x = torch.randn(3, 20)
    assert torch.equal(twin[0](x), model[0](x))
    assert math.isclose(dr.SpectralMonitor(model).read()["0"].effective_rank, 4, rel_tol=0.5)
    plan = dr.plan_within(
        nn.Sequential(nn.Linear(20, 30)), x, params=0.5, multiple_of=1, decomposition="deep"
    )
    assert plan["0"] == LowRank(plan["0"].rank, "deep")  # type: ignore[union-attr]


# What cannot be registered.


class Nameless(Deep):
    name = ""


class Misnamed(Deep):
    name = "misnamed"

    def factor_names(self, dims: int) -> tuple[str, ...]:
        return "a", "b", "c"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Deep(), "a decomposition 'deep' already"),
        (get_decomposition("cp"), "a decomposition 'cp' already"),
        (Nameless(), "needs a name"),
        (Misnamed(), "from 'down'"),
        (Deep, r"such as Mine\(\)"),
        ("svd", "an instance of a subclass"),
    ],
)
def test_what_cannot_be_registered(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dr.decompositions.register_decomposition(given)  # type: ignore[arg-type]


def test_a_method_that_is_missing_is_named() -> None:
    class Half(Decomposition):
        name = "half"

    with pytest.raises(TypeError, match=r"join.*limit.*shapes.*split.*stages"):
        Half()  # type: ignore[abstract]


@pytest.mark.slow
def test_the_built_in_ones_are_loaded_when_asked_for() -> None:
    code = """
import sys, dynarank as dr
from torch import nn
dr.factorize(nn.Sequential(nn.Linear(64, 64)), 8)
late = "decompositions.tucker", "decompositions.cp", "decompositions.separable"
late += "layers.attention", "layers.conv", "layers.recurrent.modules", "layers.embedding"
print([name for name in late if f"dynarank.{name}" in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The defaults are what the built-in ones have closed forms for.


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64)


over_built_in = pytest.mark.parametrize("name", BUILT_IN)
over_weights = pytest.mark.parametrize("shape", WEIGHTS, ids=str)


def some_factors(method: Decomposition, shape: tuple[int, ...], rank: int) -> Factors:
    shapes = method.shapes(shape, rank)
    return tuple(normal(*s, seed=i) / math.sqrt(s[1]) for i, s in enumerate(shapes))


@over_built_in
@over_weights
@pytest.mark.parametrize("rank", [1, 4])
def test_default_flops_are_the_closed_forms(name: str, shape: tuple[int, ...], rank: int) -> None:
    method = get_decomposition(name)
    assert Decomposition.join_flops(method, shape, rank) == method.join_flops(shape, rank)
    assert Decomposition.pull_flops(method, shape, rank) == method.pull_flops(shape, rank)
    wide, grouped = (2 * shape[0], *shape[1:]), Grouped(method, 2)
    assert Decomposition.join_flops(grouped, wide, rank) == grouped.join_flops(wide, rank)


@over_built_in
@over_weights
def test_default_derivatives_are_the_closed_forms(name: str, shape: tuple[int, ...]) -> None:
    method = get_decomposition(name)
    factors = some_factors(method, shape, 2)
    gradient = normal(*shape, seed=9)
    pulled = method.pull(factors, gradient)
    for default, own in zip(Decomposition.pull(method, factors, gradient), pulled, strict=True):
        assert_close(default, own)
    assert_close(Decomposition.lift(method, factors, pulled), method.lift(factors, pulled), 1e-9)
    squares = tuple(p.square() for p in pulled)
    if name in ("svd", "cp"):  # an entry of W depends on an entry of a factor by one product
        default = Decomposition.lift_squares(method, factors, squares)
        assert_close(default, method.lift_squares(factors, squares))
        for energy, own in zip(
            Decomposition.energies(method, factors), method.energies(factors), strict=True
        ):
            assert_close(energy.expand_as(own), own)


@over_built_in
@over_weights
@pytest.mark.slow
def test_default_energies_are_exact_on_average_over_signs(
    name: str, shape: tuple[int, ...]
) -> None:
    """``||dW/df_e||^2`` by the Jacobian, with each entry of the factors of either sign."""
    method = get_decomposition(name)
    factors = some_factors(method, shape, 2)
    places = tuple(range(len(factors)))
    jacobian = torch.func.jacrev(lambda *f: method.join(f), places)
    totals = [torch.zeros_like(f) for f in factors]
    draws = 1 if name in ("svd", "cp") else 300
    for draw in range(draws):
        signs = [normal(*f.shape, seed=1000 + len(factors) * draw + i).sign() for i, f in
                 enumerate(factors)]  # fmt: skip
        flipped = [f * s for f, s in zip(factors, signs, strict=True)]
        for total, part in zip(totals, jacobian(*flipped), strict=True):
            total += part.flatten(0, len(shape) - 1).square().sum(0) / draws
    for energy, total in zip(Decomposition.energies(method, factors), totals, strict=True):
        assert_close(energy.expand_as(total), total, 1e-12 if draws == 1 else 0.15)


@over_built_in
@over_weights
def test_factors_can_be_balanced(name: str, shape: tuple[int, ...]) -> None:
    method = get_decomposition(name)
    rank = min(2, method.limit(shape))
    uneven = tuple(f * 10**i for i, f in enumerate(some_factors(method, shape, rank)))
    even = method.balanced(uneven)
    assert_close(method.join(even), method.join(uneven), 1e-10)
    norms = torch.stack([f.norm() for f in even])
    assert_close(norms, norms[:1].expand_as(norms), 1e-10)


def test_threads_that_load_a_decomposition_get_the_same_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, load = Barrier(4), registry.import_module

    def slow(name: str) -> ModuleType:
        together.wait(10)
        return load(name)

    monkeypatch.setattr(registry, "_LOADED", {})
    monkeypatch.setattr(registry, "import_module", slow)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(get_decomposition, ["tucker"] * 4))
    assert len(found) == 1
