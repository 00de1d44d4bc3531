"""Law 10: an optimizer that would go on with old parameters is found in its next step."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dynarank as dr
from dynarank.surgery import left_behind, optimizer_steps


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def backward(model: nn.Module) -> None:
    model(torch.randn(4, 16)).square().mean().backward()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "factorize": lambda m: dr.factorize(m, 4, layers="*"),
    "adapt": lambda m: dr.deflate(m, 4, layers="*"),
    "one layer": lambda m: dr.factorize(m, 4, layers="0"),
    "and inflate": lambda m: dr.inflate(dr.factorize(m, 4, layers="*")),
    "and merge": lambda m: dr.merge(dr.factorize(m, 4, layers="*")),
    "scheduler": lambda m: dr.RankScheduler(m, (), dr.schedules.low_rank(4), 9, layers="*"),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_a_live_optimizer_that_was_not_passed_does_not_step(change: str) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    CHANGES[change](model)
    backward(model)
    bias = model[0].bias.detach().clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Adam holds old parameters of '0'.*optimizer="):
            optimizer.step()
    assert torch.equal(model[0].bias, bias)


def test_neither_does_one_of_a_layer_that_was_frozen_then() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.factorize(model, 4, layers="0")
    backward(model)
    optimizer.step()
    model[0].requires_grad_(True)
    backward(model)
    with pytest.raises(RuntimeError, match="old parameters of '0'"):
        optimizer.step()


def test_a_closure_is_found_one_step_later() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 16)).square().mean()
        loss.backward()
        return loss

    dr.factorize(model, 4, layers="*")
    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="LBFGS holds old parameters"):
        optimizer.step(closure)


def test_neither_does_one_of_two_of_which_the_other_was_passed() -> None:
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    dr.factorize(model, 4, layers="*", optimizer=first)
    backward(model)
    first.step()
    with pytest.warns(RuntimeWarning, match=r"of '0', '2'.* are in another optimizer"):
        second.step()
    second.step()  # said once


WELL: dict[str, Callable[[], list[torch.optim.Optimizer]]] = {}


def well(
    make: Callable[[], list[torch.optim.Optimizer]],
) -> Callable[[], list[torch.optim.Optimizer]]:
    WELL[make.__name__] = make
    return make


@well
def made_after_the_change() -> list[torch.optim.Optimizer]:
    model = mlp()
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.factorize(model, 4, layers="*")
    new = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    return [new] if old.param_groups else []


@well
def given_the_new_parameters_as_a_group() -> list[torch.optim.Optimizer]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.factorize(model, 4, layers="*")
    factors = [p for name, p in model.named_parameters() if "bias" not in name]
    optimizer.add_param_group({"params": factors})
    backward(model)
    return [optimizer]


@well
def of_another_model_too_which_alone_trains() -> list[torch.optim.Optimizer]:
    model, other = mlp(), mlp()
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    dr.factorize(model, 4, layers="*")
    backward(other)
    return [optimizer]


@well
def of_a_frozen_layer() -> list[torch.optim.Optimizer]:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.factorize(model, 4, layers="0")
    backward(model)
    return [optimizer]


@well
def of_a_model_whose_copy_changed() -> list[torch.optim.Optimizer]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(dr.factorize(copy.deepcopy(model), 4, layers="*"))
    backward(model)
    return [optimizer]


@well
def passed() -> list[torch.optim.Optimizer]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dr.factorize(model, 4, layers="*", optimizer=optimizer)
    backward(model)
    return [optimizer]


@pytest.mark.parametrize("case", sorted(WELL))
def test_all_others_step(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in WELL[case]():
            optimizer.step()


def test_old_parameters_are_garbage_and_then_nothing_is_watched() -> None:
    left_behind._REPLACED.clear()  # what other tests still hold  # pyright: ignore[reportPrivateUsage]
    passed()[0].step()
    gc.collect()
    passed()[0].step()
    watched = optimizer_steps._WATCHERS  # pyright: ignore[reportPrivateUsage]
    assert left_behind._check not in watched  # pyright: ignore[reportPrivateUsage]


def test_an_optimizer_whose_constructor_raised_is_none() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="Invalid learning rate") as kept:
        torch.optim.Adam(model.parameters(), lr=-1.0)
    dr.factorize(model, 4, layers="*")
    backward(model)
    with pytest.raises(RuntimeError, match="old parameters"):
        optimizer.step()
    assert kept.tb  # whose frames hold it


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the collector's functions that look through every object, as they are called."""
    calls: list[str] = []

    def counts(own: Callable[..., list[object]]) -> Callable[..., list[object]]:
        def count(*given: object) -> list[object]:
            calls.append(own.__name__)
            return own(*given)

        return count

    for own in (gc.get_objects, gc.get_referrers):
        monkeypatch.setattr(gc, own.__name__, counts(own))
    return calls


def test_the_check_after_a_change_looks_through_all_objects_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = dr.schedules.dynamic_rank(rank=2)
    ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=3, layers="*")
    held = [[p] for p in model.parameters()]
    optimizer.step()
    assert ranks.step()
    calls = counted(monkeypatch)
    optimizer.step()
    with pytest.raises(RuntimeError, match="still holds parameters"):
        ranks.step()
    assert held and len(calls) <= 4


def test_another_model_in_training_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dr.factorize(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), 2, layers="*")
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, other)]
    schedule = dr.schedules.dynamic_rank(rank=2)
    ranks = dr.RankScheduler(model, optimizers[0], schedule, total_steps=3)
    calls = counted(monkeypatch)
    for _ in range(2):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            one(torch.ones(2, 8)).sum().backward()
            optimizer.step()
        ranks.step()
    assert calls.count("get_objects") == 1


def test_a_change_looks_through_all_objects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        model = DistributedDataParallel(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = dr.schedules.dynamic_rank(rank=2, inflate=1, deflate=2)
        ranks = dr.RankScheduler(model, optimizer, schedule, total_steps=3)
        calls = counted(monkeypatch)
        for step in (1, 2):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
            assert ranks.step()
            assert calls.count("get_objects") == step
        dr.merge(model, optimizer=optimizer)
        assert calls.count("get_objects") == 3
    finally:
        dist.destroy_process_group()
