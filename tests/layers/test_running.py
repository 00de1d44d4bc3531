from __future__ import annotations

import pytest
import torch
from torch import nn

from dynarank.layers.running import undisturbed


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))


def test_buffers_and_random_state_are_as_they_were() -> None:
    model = net()
    model(torch.randn(8, 4))
    before = {n: (b, b.clone(), b._version) for n, b in model.named_buffers()}
    state = torch.get_rng_state()
    with undisturbed(model):
        inside = model(torch.ones(8, 4))
        assert int(model[1].num_batches_tracked) == 2
    assert inside.requires_grad
    assert list(before) == [name for name, _ in model.named_buffers()]
    for name, buffer in model.named_buffers():
        same, value, version = before[name]
        assert buffer is same and torch.equal(buffer, value) and buffer._version == version
    assert torch.equal(torch.get_rng_state(), state)


def test_they_come_back_after_an_error_too() -> None:
    model = net()
    mean, state = model[1].running_mean, torch.get_rng_state()
    with pytest.raises(RuntimeError), undisturbed(model):
        model(torch.randn(8, 4))
        model(torch.randn(8, 5))
    assert model[1].running_mean is mean and not mean.any()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_that_waits_for_its_backward_pass_is_not_disturbed() -> None:
    model = net().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    grads = []
    for between in (False, True):
        torch.set_rng_state(state)
        model.zero_grad()
        loss = model(x).square().sum()
        if between:
            with undisturbed(model):
                model(2 * x).sum()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_draws_inside_are_those_that_would_come() -> None:
    model = net()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with undisturbed(model):
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(torch.rand(3), expected)
