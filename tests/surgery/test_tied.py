"""Weights that several modules share: one weight in every form, at each of its places."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import ALL_FORMS, OPTIMIZERS, assert_close, check_optimizer, forms, randomize
from torch import Tensor, nn

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.cost.flops import count_flops, trace
from dynarank.forms import Form
from dynarank.surgery.sites import survey

WORDS, WIDTH = 14, 10


class Words(nn.Module):
    """An embedding and a head of one weight, as a language model's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(words))))


class Twins(nn.Module):
    """Two linear layers of one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], Tensor]] = {
    "words": (Words, ("embed", "head"), torch.arange(12).reshape(3, 4)),
    "twins": (Twins, ("a", "b"), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))),
}
over_cases = pytest.mark.parametrize("case", CASES)
over_forms = pytest.mark.parametrize("form", ALL_FORMS[1:], ids=str)


def build(case: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, _, x = CASES[case]
    return make().to(dtype), x.to(dtype) if x.is_floating_point() else x


def own(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    named = model.get_submodule(path).named_parameters(recurse=False)
    return {name: p for name, p in named if name != "bias"}


def assert_tied(model: nn.Module, case: str) -> None:
    one, two = (own(model, path) for path in CASES[case][1])
    assert one.keys() == two.keys() and all(two[name] is p for name, p in one.items())
    assert torch.equal(
        *(model.get_submodule(p).weight.double() for p in CASES[case][1])  # type: ignore[operator, union-attr, misc]
    )


@over_cases
@over_forms
@pytest.mark.parametrize("by", [0, 1])
def test_it_changes_everywhere_and_stays_one(case: str, form: Form, by: int) -> None:
    model, x = build(case)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    path = CASES[case][1][by]
    for after in (form, Adapted(2), FullRank(), form):
        model(x).square().mean().backward()
        optimizer.step()
        before = model(x)
        (change,) = dr.apply_plan(model, {path: after}, optimizer=optimizer) or [None]
        assert_tied(model, case)
        check_optimizer(model, optimizer)
        if change is not None and not isinstance(change.after, LowRank):
            assert_close(model(x), before)
        assert dr.current_plan(model)[CASES[case][1][0]] == after
        optimizer.zero_grad()
    before = model(x)
    dr.merge(model, optimizer=optimizer)
    assert_tied(model, case)
    assert_close(model(x), before)
    fresh, _ = build(case)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert list(model.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(model.state_dict())


@over_cases
@over_forms
def test_it_computes_with_its_effective_weight_at_both_places(case: str, form: Form) -> None:
    """And the gradient of the factors is the sum of those of the two uses."""
    model, x = build(case)
    paths = CASES[case][1]
    dr.apply_plan(model, {paths[0]: form})
    randomize(model)
    plain, _ = build(case)
    weight = model.get_submodule(paths[1]).weight.detach()  # type: ignore[union-attr]
    with torch.no_grad():
        rest = {n: p for n, p in model.named_parameters() if n in dict(plain.named_parameters())}
        plain.load_state_dict({**plain.state_dict(), **rest, f"{paths[0]}.weight": weight,
                               f"{paths[1]}.weight": weight})  # fmt: skip
    assert_close(model(x), plain(x))
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    (site,) = (site for site in survey(model) if site.path == paths[0])
    factors = tuple(f.detach().requires_grad_() for f in site.factors())
    joined = site.spec.decomposition(form).join(factors)  # type: ignore[arg-type]
    scale = form.scale if isinstance(form, Adapted) else 1.0
    whole = plain.get_submodule(paths[0]).weight.grad  # type: ignore[union-attr]
    expected = torch.autograd.grad(joined, factors, whole * scale)
    for factor, gradient in zip(site.factors(), expected, strict=True):
        if case == "twins":  # an embedding's padding row trains otherwise: see RankedEmbedding
            assert factor.grad is not None
            assert_close(factor.grad, gradient)


@over_cases
def test_a_plan_may_name_it_twice_if_it_means_one_form(case: str) -> None:
    model, _ = build(case)
    one, two = CASES[case][1]
    assert len(dr.apply_plan(model, {one: LowRank(2), two: LowRank(2)})) == 1
    with pytest.raises(ValueError, match="are one weight with two forms"):
        dr.apply_plan(model, {one: LowRank(3), two: FullRank()})
    assert dr.apply_plan(model, {two: LowRank(2)}) == []


@over_cases
@pytest.mark.parametrize("form", forms("svd"), ids=str)
def test_its_parameters_are_counted_once_and_each_use_costs(case: str, form: Form) -> None:
    model, x = build(case, torch.float32)
    plan = {CASES[case][1][0]: form}
    use = trace(model, x)
    predicted = use.parameters(plan)
    dr.apply_plan(model, plan)
    assert use.flops(plan) == count_flops(model, x)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert predicted == (sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes))


def test_by_default_an_embedding_is_left_and_two_linear_layers_are_not() -> None:
    words, _ = build("words")
    twins, _ = build("twins")
    assert dr.current_plan(dr.factorize(words, 2)) == {"embed": FullRank(), "mix": LowRank(2)}
    assert dr.current_plan(dr.factorize(twins, 2)) == {"a": LowRank(2)}
    assert_tied(twins, "twins")


class Own(nn.Linear):
    """Not handled: this subclass computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def by_object(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def by_memory(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(model[0].weight.detach())


@pytest.mark.parametrize("tie", [by_object, by_memory], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", [Own, nn.Linear])
def test_what_cannot_be_kept_tied_is_refused(
    tie: Callable[[nn.Sequential], None], kind: type[nn.Linear]
) -> None:
    """Tied to a module that is not handled, or by the memory only, not the object."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), kind(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tie(model)
    if tie is by_object and kind is nn.Linear:
        assert len(survey(model)) == 2  # this is the tie that is handled
        return
    with pytest.raises(ValueError, match=r"'0'.*tied to 1\.weight"):
        dr.apply_plan(model, {"0": LowRank(2)})
    with pytest.raises(ValueError, match=r"'0'.*tied to 1\.weight"):
        dr.factorize(model, 2)
    dr.factorize(model, 2, layers="2")
    assert type(model[0]) is nn.Linear and dr.current_plan(model)["2"] == LowRank(2)


def test_a_view_of_another_shape_of_the_same_memory_is_refused() -> None:
    for view in (lambda w: w[:4], lambda w: w.T):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH + 1), nn.Linear(WIDTH + 1, WIDTH))
        model[1].weight = nn.Parameter(view(model[0].weight.detach()))
        with pytest.raises(ValueError, match="tied to"):
            dr.apply_plan(model, {"0": LowRank(2)})
