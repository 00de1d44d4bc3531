"""Replicas as ``nn.DataParallel`` makes them: tensors as attributes, no parameters of their own."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from every_layer import FORMS, KINDS, Kind, in_form
from laws import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import dynarank as dr


def replicate(network: nn.Module) -> nn.Module:
    """``torch.nn.parallel.replicate`` without devices: one replica, whose tensors are copies."""
    modules = list(network.modules())
    replicas = {m: m._replicate_for_data_parallel() for m in modules}
    copies: dict[Tensor, Tensor] = {}
    for module, replica in replicas.items():
        replica._former_parameters = {}  # type: ignore[assignment]
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
                continue
            copies.setdefault(p, p * 1)  # with a history, as a broadcast has
            setattr(replica, name, copies[p])
            replica._former_parameters[name] = p  # type: ignore[index]
        for name, b in module._buffers.items():
            setattr(replica, name, b)
    return replicas[network]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_replica_computes_as_the_layer(kind: Kind, form: str) -> None:
    model, x = in_form(kind.make(), form), kind.inputs()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            replica = replicate(model)
            y, expected = replica(*x), model(*x)
            assert torch.equal(y, expected)
    results = []
    for one in (model, replicate(model)):
        one(*x).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("execution", ["factored", "joined", "two-branch", "merged"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_execution_and_the_effective_weights(kind: Kind, execution: str) -> None:
    model, x = kind.make(), kind.inputs()
    low_rank = execution in ("factored", "joined")
    form = dr.LowRank(2, execution=execution) if low_rank else dr.Adapted(2, execution=execution)  # type: ignore[arg-type]
    dr.apply_plan(model, dict.fromkeys(dr.current_plan(model), form))
    replica = replicate(model)
    assert torch.equal(replica(*x), model(*x))
    for name in model.layer.forms:
        assert torch.equal(getattr(replica.layer, name), getattr(model.layer, name))


def test_mixed_forms_of_one_module() -> None:
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3, kdim=8, vdim=6)}), None
    dr.apply_plan(model, {"a.q_proj_weight": dr.LowRank(2), "a.out_proj": dr.Adapted(2)})
    x = torch.randn(4, 2, 12), torch.randn(5, 2, 8), torch.randn(5, 2, 6)
    assert torch.equal(replicate(model)["a"](*x)[0], model["a"](*x)[0])


def test_threads_share_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than are remembered, at the same time."""
    monkeypatch.setattr("dynarank.layers.ranked._REMEMBERED", 1)
    interval = sys.getswitchinterval()
    model = dr.factorize(nn.Sequential(nn.Embedding(4, 4)), 1, layers="*")
    errors: list[Exception] = []

    def run(replica: nn.Module) -> None:
        try:
            for i in range(3000):
                replica(torch.zeros(i % 5 + 1, dtype=torch.long))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(replicate(model),)) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_functional_calls_use_what_they_are_given(kind: Kind, form: str) -> None:
    model, x = in_form(kind.make(), form), kind.inputs()
    state = {n: p.detach() * 0.5 for n, p in model.named_parameters()}
    y = functional_call(model, state, x)
    model.load_state_dict(state)
    assert_close(y, model(*x))
