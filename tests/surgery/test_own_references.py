"""Optimizers that keep lists of their own, or wrap others: the changed layers go on training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import dynarank as dr
from dynarank import Adapted, FullRank, LowRank


class Home(Optimizer):
    """Steps on a list of its own, made by ``keep`` from its groups."""

    def __init__(self, parameters: Any, keep: Callable[[Any], Any]) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.kept = keep(self)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        flat = self.kept if isinstance(self.kept[0], Tensor) else [p for g in self.kept for p in g]
        for p in flat:
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)


class SAM(Optimizer):
    """As https://github.com/davda54/sam writes it, without the second pass."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base_optimizer.step()


class Several(Optimizer):
    """Steps several optimizers."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([g for o in optimizers for g in o.param_groups], {})
        self.param_groups = [g for o in optimizers for g in o.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()


class Thin(Optimizer):
    """As torch's PostLocalSGDOptimizer: it skips the constructor, and has the other's state."""

    def __init__(self, optim: Optimizer) -> None:
        self.optim, self.param_groups = optim, optim.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optim.state

    def state_dict(self) -> dict[str, Any]:
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optim.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optim.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optim.zero_grad(set_to_none)


def by_layer(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(layer.parameters())} for layer in model if len([*layer.parameters()])]


def copies(optimizer: Optimizer) -> list[list[Tensor]]:
    return [list(group["params"]) for group in optimizer.param_groups]


def zeros(model: nn.Module) -> dict[int, Tensor]:
    return {i: torch.zeros_like(p) for i, p in enumerate(model.parameters())}


def whole(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


FOLLOW: dict[str, Callable[[nn.Module], Any]] = {
    "alias": lambda m: Home(m.parameters(), lambda o: o.param_groups[0]["params"]),
    "copy": lambda m: Home(m.parameters(), lambda o: list(o.param_groups[0]["params"])),
    "all groups": lambda m: Home(by_layer(m), whole),
    "a list a group": lambda m: Home(by_layer(m), copies),
    "aliases": lambda m: Home(by_layer(m), lambda o: [g["params"] for g in o.param_groups]),
    "sam": lambda m: SAM(m.parameters()),
    "several": lambda m: Several(SGD(m[0].parameters(), 0.1), Adam(m[2].parameters())),
    "thin": lambda m: Thin(AdamW(m.parameters(), 0.01)),
    "thin, twice": lambda m: Thin(Thin(AdamW(m.parameters(), 0.01))),
    "thin, several": lambda m: Thin(Several(SGD(m[0].parameters(), 0.1), Adam(m[2].parameters()))),
    "accelerate": lambda m: Accelerator(cpu=True).prepare(AdamW(m.parameters(), 0.01)),
}  # fmt: skip


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def assert_all_train(model: nn.Module, step: Callable[[], object]) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # an adapter's first factor moves in the second
        step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.parametrize("kind", sorted(FOLLOW))
def test_every_parameter_goes_on_training(kind: str) -> None:
    model, x = mlp(), torch.randn(4, 16)
    optimizer = FOLLOW[kind](model)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    for form in (LowRank(3), FullRank(), Adapted(2), LowRank(2)):
        dr.apply_plan(model, {"0": form, "2": form}, optimizer=optimizer)
        assert_all_train(model, step)


def test_a_wrapper_that_skips_torchs_constructor_is_that_which_it_wraps() -> None:
    """A whole run with it: steps are counted, its state is signed and brings the forms."""
    schedule = dr.schedules.dynamic_rank(3, inflate=2, deflate=4)
    runs: list[tuple[Any, ...]] = []
    for wrap in (Thin, lambda one: one):
        model, x = mlp(), torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
        optimizer: Any = wrap(AdamW(model.parameters(), 0.01))
        with pytest.raises(ValueError, match="nothing"):
            dr.RankScheduler(model, optimizer, schedule, 6, layers="nothing")
        ranks = dr.RankScheduler(model, optimizer, schedule, 6, layers="0")
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            ranks.step()
        assert ranks.last_step == 5
        runs.append((model, optimizer, ranks.state_dict()))
    (model, optimizer, _), (plain, other, _) = runs
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    state = optimizer.state_dict()
    assert state["dynarank"] == other.state_dict()["dynarank"]
    fresh = mlp()
    again = Thin(AdamW(fresh.parameters(), 0.01))
    dr.factorize(fresh, 3, layers="0", optimizer=again)  # type: ignore[arg-type]
    again.load_state_dict(state)
    assert dr.current_plan(fresh) == dr.current_plan(model)


def test_the_state_of_a_wrapped_optimizer_moves() -> None:
    model = mlp()
    optimizer = SAM(model.parameters())
    model(torch.randn(4, 16)).square().mean().backward()
    optimizer.step()
    dr.factorize(model, 3, layers="*", optimizer=optimizer)
    state = optimizer.base_optimizer.state
    assert {id(p) for p in state} == {id(p) for p in model.parameters()}
    assert all(s["momentum_buffer"].shape == p.shape for p, s in state.items())


class Keeps(SGD):
    def __init__(self, parameters: Any, kept: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.kept = kept


REFUSED: dict[str, Callable[[nn.Module], Any]] = {
    "tuple": lambda m: tuple(m.parameters()),
    "some": lambda m: [m[0].weight],
    "another order": lambda m: [*m.parameters()][::-1],
    "set of ids": lambda m: {id(m[0].weight)},
    "index": lambda m: {p: i for i, p in enumerate(m.parameters())},
    "names": lambda m: dict(m.named_parameters()),
    "one": lambda m: m[0].weight,
    "slow copies": lambda m: [p.detach().clone() for p in m.parameters()],
    "velocity": lambda m: {"velocity": zeros(m)},
    "flat master": lambda m: nn.utils.parameters_to_vector(m.parameters()).detach(),
}  # fmt: skip


@pytest.mark.parametrize("moments", ["project", "reset"])
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_follow_is_refused_by_name(kind: str, moments: Any) -> None:
    model = mlp()
    kept = REFUSED[kind](model)
    optimizer, weight = Keeps(model.parameters(), kept), model[0].weight
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"Keeps holds .* in its attribute 'kept'"):
        dr.factorize(model, 3, layers="0", optimizer=optimizer, moments=moments)
    assert model[0].weight is weight and type(model[0]) is nn.Linear
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, held)]


def in_a_group(optimizer: Optimizer) -> None:
    group = optimizer.param_groups[0]
    group["slow"] = [p.detach().clone() for p in group["params"]]


def in_a_global_state(optimizer: Optimizer) -> None:
    optimizer.state["all"] = {"directions": [torch.zeros(sum(p.numel() for p in whole(optimizer)))]}


def in_the_first_state(optimizer: Optimizer) -> None:
    """As home-made quasi-Newton methods do."""
    state = optimizer.state[whole(optimizer)[-1]]
    state["directions"] = [torch.zeros(sum(p.numel() for p in whole(optimizer)))]


@pytest.mark.parametrize("keep", [in_a_group, in_a_global_state, in_the_first_state])
def test_so_is_what_is_hidden_elsewhere(keep: Callable[[Optimizer], None]) -> None:
    model = mlp()
    optimizer = Keeps(model.parameters(), None)
    keep(optimizer)
    with pytest.raises(ValueError, match=r"Keeps holds (values|vectors) .* cannot follow"):
        dr.factorize(model, 3, layers="0", optimizer=optimizer, moments="reset")
    assert type(model[0]) is nn.Linear


FREE: dict[str, Callable[[nn.Module], Any]] = {
    "other layers": lambda m: (m[2].weight, m[2].bias, {id(m[2].weight)}),
    "scalars": lambda m: [torch.zeros(()), torch.ones(1), 3, "lr", None],
    "the model": lambda m: m,
    "other values": lambda m: torch.zeros(5, 5),
}


@pytest.mark.parametrize("kind", sorted(FREE))
def test_what_is_of_other_layers_may_be_kept(kind: str) -> None:
    model = mlp()
    optimizer = Keeps(model.parameters(), FREE[kind](model))
    dr.factorize(model, 3, layers="0", optimizer=optimizer)
    dr.merge(model, optimizer=optimizer)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("changed", ["0", "2", "*"])
def test_lbfgs_goes_on_with_a_new_history(changed: str, search: str | None) -> None:
    model, x, y = mlp(), torch.randn(64, 16), torch.randn(64, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, line_search_fn=search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    first = model[0].weight
    with pytest.raises(ValueError, match="moments='reset'"):
        dr.factorize(model, 4, layers=changed, optimizer=optimizer)
    assert model[0].weight is first and optimizer.state
    for change in (dr.factorize, dr.deflate):
        change(model, 4, layers=changed, optimizer=optimizer, moments="reset")
        assert_all_train(model, lambda: optimizer.step(closure))
        dr.inflate(model, optimizer=optimizer, moments="reset")
        assert_all_train(model, lambda: optimizer.step(closure))
    assert not torch.isnan(closure())
