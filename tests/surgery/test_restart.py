"""An adapter followed by another: merged into the base, redrawn, its optimizer state pruned."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from covering import over
from laws import (
    DTYPES,
    LAYER_AND_DECOMPOSITION,
    LayerCase,
    assert_close,
    check_moments,
    check_optimizer,
    fitting,
    randomize,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank
from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import same_weight
from dynarank.surgery.edit import LOSSLESS
from dynarank.surgery.moments import prune
from dynarank.surgery.sites import Site, survey

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's
F64 = torch.float64
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: SGD(p, lr=1e-2, momentum=0.9),
    "adam": lambda p: Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-3),
}
over_optimizers = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))


def only(model: nn.Module) -> Site:
    (site,) = survey(model)
    return site


def adapted(case: LayerCase, decomposition: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The layer with an adapter that has learned something, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).to(dtype)
    dr.apply_plan(model, {"0": fitting(model, Adapted(3, decomposition))})
    randomize(model)
    return model, torch.randn(case.shape, dtype=dtype)


def restarted(model: nn.Module, number: int) -> Adapted:
    form = only(model).form
    assert isinstance(form, Adapted)
    return Adapted(form.rank, form.decomposition, form.alpha, restart=number)


@over({"case, decomposition": LAYER_AND_DECOMPOSITION, "dtype": DTYPES})
def test_a_restart_keeps_the_function(
    case: LayerCase, decomposition: str, dtype: torch.dtype
) -> None:
    """base' == base + scale * join(factors), the new adapter's join is zero, and it can learn."""
    model, x = adapted(case, decomposition, dtype)
    expected, weight = model(x), only(model).effective().detach()
    (change,) = dr.apply_plan(model, {"0": restarted(model, 1)})
    assert change.error <= LOSSLESS[dtype]
    assert_close(model(x), expected)
    base = next(p for n, p in only(model).parameters().items() if only(model).spec.is_base(n))
    assert_close(only(model).spec.to_canonical(base.detach()), weight)
    assert not base.requires_grad
    *first, last = only(model).factors()
    assert not last.any() and all(f.any() for f in first)
    model(x).square().sum().backward()
    assert last.grad is not None and last.grad.any()


def test_each_number_draws_its_own_adapter_and_always_the_same() -> None:
    def down(number: int, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 6))
        dr.apply_plan(model, {"0": Adapted(2)})
        dr.apply_plan(model, {"0": Adapted(2, restart=number)})
        return model[0].down.detach()

    assert torch.equal(down(3), down(3))
    drawn = [down(number) for number in range(4)] + [down(1, seed=1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_restart_is_of_the_plan_and_applied_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    dr.apply_plan(model, {"0": Adapted(2)})
    form = Adapted(2, restart=2)
    assert [c.after for c in dr.apply_plan(model, {"0": form})] == [form]
    nn.init.ones_(model[0].up)
    held = list(model.parameters())
    assert dr.apply_plan(model, {"0": form}) == []
    assert all(p is q for p, q in zip(model.parameters(), held, strict=True))
    assert model[0].up.all()
    assert not same_weight(form, Adapted(2))
    # How it multiplies may change without a restart.
    dr.apply_plan(model, {"0": Adapted(2, execution="two-branch", restart=2)})
    assert model[0].up.all()


def test_the_number_is_plain_data_and_shown_where_there_is_one() -> None:
    form = Adapted(2, restart=5)
    assert form_from_data(json.loads(json.dumps(form_to_data(form)))) == form
    assert "restart=5" in repr(form) and "restart" not in repr(Adapted(2))
    old = {"form": "adapted", "rank": 2, "decomposition": "svd", "alpha": 16.0}
    assert form_from_data(old) == Adapted(2)


@pytest.mark.parametrize("number", [-1, True, 1.5, "1"])
def test_a_number_of_another_kind_is_refused(number: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Adapted(2, restart=number)


# The optimizer.


def trained(kind: str, steps: int = 5) -> tuple[nn.Module, Optimizer, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    dr.apply_plan(model, {"0": Adapted(3), "2": Adapted(2)})
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(16, 10, dtype=F64)
    for _ in range(steps):
        step(model, optimizer, x)
    return model, optimizer, x


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


NEXT = {"0": Adapted(3, restart=1), "2": Adapted(2, restart=1)}


@over_optimizers
@pytest.mark.parametrize("moments", ["project", "reset", "prune"])
def test_the_optimizer_holds_the_new_adapter(kind: str, moments: Any) -> None:
    model, optimizer, x = trained(kind)
    before = {id(p) for p in model.parameters()}
    dr.apply_plan(model, NEXT, optimizer=optimizer, moments=moments)
    check_optimizer(model, optimizer)
    check_moments([p for p in model.parameters() if id(p) not in before], optimizer)
    step(model, optimizer, x)


@over_optimizers
def test_pruning_keeps_the_largest_tenth_and_the_step(kind: str) -> None:
    """Of `down`, 3 x 10: three entries; of the others as many as a tenth of them allows."""
    model, optimizer, _ = trained(kind)
    old = {n: copy_of(optimizer.state[p]) for n, p in model.named_parameters() if p.requires_grad}
    dr.apply_plan(model, NEXT, optimizer=optimizer, moments="prune")
    key = "momentum_buffer" if kind == "sgd" else "exp_avg"
    kept = {"0.down": 3, "0.up": 2, "2.down": 1, "2.up": 0}  # of 30, 24, 16 and 8 entries
    for name, count in kept.items():
        state, before = optimizer.state[model.get_parameter(name)], old[name]
        assert int((state[key] != 0).sum()) == count
        largest = before[key].abs().flatten().topk(count).indices
        assert set(largest.tolist()) == set(state[key].flatten().nonzero().flatten().tolist())
        assert_close(state[key].flatten()[largest], before[key].flatten()[largest])
        assert state.get("step") == before.get("step")
        for second in {"exp_avg_sq", "max_exp_avg_sq"} & state.keys():
            assert torch.equal(state[second] != 0, state[key] != 0)
    bias = optimizer.state[model.get_parameter("0.bias")]
    assert torch.equal(bias[key], old["0.bias"][key])  # what is not restarted stays


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def test_an_average_of_squares_below_the_square_of_the_average_is_raised() -> None:
    """v >= m^2 where m is kept: 4 stays 4, 0.01 becomes 9, what is dropped is zero in both."""
    mean, square = torch.tensor([1.0, 3.0, -2.0, 0.5]), torch.tensor([7.0, 0.01, 4.0, 9.0])
    state = prune({"step": torch.tensor(5.0), "exp_avg": mean, "exp_avg_sq": square}, 0.5)
    assert state["exp_avg"].tolist() == [0.0, 3.0, -2.0, 0.0]
    assert state["exp_avg_sq"].tolist() == [0.0, 9.0, 4.0, 0.0]
    assert state["step"] == 5
    assert mean.tolist() == [1.0, 3.0, -2.0, 0.5]


def test_there_is_nothing_to_prune_without_a_first_moment() -> None:
    assert [prune({}), prune({"momentum_buffer": None})] == [{}, {"momentum_buffer": None}]
    state = prune({"momentum_buffer": torch.ones(1)})
    assert state["momentum_buffer"].tolist() == [0.0]


@pytest.mark.parametrize("after", [FullRank(), LowRank(2), Adapted(2), Adapted(3, alpha=1.0)])
def test_elsewhere_pruning_is_projection(after: Any) -> None:
    states: list[list[Any]] = []
    for moments in ("prune", "project"):
        model, optimizer, _ = trained("adam")
        dr.apply_plan(model, {"0": after}, optimizer=optimizer, moments=moments)  # type: ignore[arg-type]
        states.append([sorted(map(str, s.items())) for s in optimizer.state.values()])
    assert states[0] == states[1]


def test_without_the_step_counter_set_back_the_first_steps_are_larger_than_adams() -> None:
    """m = .1 g, v = .001 g^2, corrections near 1: a step of 3.2 lr. ReLoRA warms up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8, bias=False)).double()
    dr.apply_plan(model, {"0": Adapted(3)})
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(16, 10, dtype=F64)
    for _ in range(5):
        step(model, optimizer, x)
    for state in optimizer.state.values():
        state["step"].fill_(20_000)
    dr.apply_plan(model, {"0": Adapted(3, restart=1)}, optimizer=optimizer, moments="prune")
    dropped = optimizer.state[model[0].up]["exp_avg"] == 0
    step(model, optimizer, x)
    moved = model[0].up.detach()[dropped].abs() / 1e-3
    assert moved.median().item() == pytest.approx(0.1 / 0.001**0.5, rel=1e-2)
