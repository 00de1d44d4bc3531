"""What a load truncates is kept until the layer trains."""

from __future__ import annotations

import gc

import pytest
import torch
from small_run import net, train_step
from torch import nn

import dynarank as dr
from dynarank.surgery import exact_weights
from dynarank.surgery.sites import survey


def loaded() -> tuple[nn.Sequential, nn.Sequential]:
    plain, model = net(), dr.factorize(net(), 2)
    with torch.no_grad():
        plain[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="were truncated"):
        model.load_state_dict(dict(plain.state_dict()))
    return plain, model


def test_the_exact_weight_is_kept_until_the_layer_trains() -> None:
    plain, model = loaded()
    site, _, unchanged = survey(model)
    kept = exact_weights.kept(site)
    assert kept is not None and torch.equal(kept, plain[0].weight)
    assert kept.data_ptr() != plain[0].weight.data_ptr()
    assert exact_weights.kept(unchanged) is None
    other = net()
    train_step(other, torch.optim.SGD(other.parameters()), 0)
    assert exact_weights.kept(site) is kept
    train_step(model, torch.optim.SGD(model.parameters()), 0)
    assert exact_weights.kept(site) is None


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    _, model = loaded()
    assert len(exact_weights._KEPT) == 2
    del model
    gc.collect()
    assert len(exact_weights._KEPT) == 0


def test_the_next_load_counts() -> None:
    _, model = loaded()
    model.load_state_dict(dr.factorize(net(), 2).state_dict())
    assert all(exact_weights.kept(site) is None for site in survey(model))
