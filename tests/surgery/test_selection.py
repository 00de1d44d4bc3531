"""Every pattern means a weight, and every rank of a map is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank import LowRank
from dynarank.factors.initialization import initialize_factors
from dynarank.factors.learning_rates import FactorLearningRates


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 32)
        self.bag, self.block = nn.EmbeddingBag(8, 32), nn.Sequential(nn.Linear(32, 32))
        self.norm = nn.LayerNorm(32)


def scheduler(model: nn.Module, layers: Any) -> dr.RankScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dr.RankScheduler(model, optimizer, dr.schedules.low_rank(4), 10, layers=layers)


USERS: dict[str, Callable[[nn.Module, Any], object]] = {
    "factorize": lambda m, layers: dr.factorize(m, 4, layers=layers),
    "inflate": lambda m, layers: dr.inflate(m, layers=layers),
    "deflate": lambda m, layers: dr.deflate(m, 4, layers=layers),
    "rank-map": lambda m, layers: dr.factorize(m, dict.fromkeys(layers, 4)),
    "deflate-map": lambda m, layers: dr.deflate(m, dict.fromkeys(layers, 4)),
    "map-and-layers": lambda m, layers: dr.factorize(m, dict.fromkeys(layers, 4), layers="fc1"),
    "scheduler": scheduler,
    "survey": lambda m, layers: dr.survey(m, 4, layers=layers),
    "plan_within": lambda m, layers: dr.plan_within(m, params=0.9, layers=layers),
    "spectra": lambda m, layers: dr.rules.spectra(m, layers=layers),
    "calibrate": lambda m, layers: dr.calibrate(m, [torch.ones(1, 32)], layers=layers),
    "initialize": lambda m, layers: initialize_factors(m, 4, layers=layers),
    "monitor": lambda m, layers: dr.SpectralMonitor(m, layers=layers),
    "regularizer": lambda m, layers: dr.regularizers.FrobeniusDecay(m, 0.1, layers=layers),
    "rates": lambda m, layers: FactorLearningRates(
        m, torch.optim.SGD(m.parameters(), lr=0.1), 2.0, layers=layers
    ),
}


@pytest.mark.parametrize("user", sorted(USERS))
@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("fc_2", r"'fc_2' matches no layer that can change form; nearest: 'fc2'"),
        ("*.fc2", r"'\*.fc2' matches no layer that can change form; nearest: 'fc2'"),
        ("fc1.weight", r"'fc1.weight' matches no layer that can change form; nearest: 'fc1'"),
        ("bag", r"'bag' matches no layer .*only 'bag' \(EmbeddingBag layers are not handled\)"),
        ("norm", r"'norm' matches no layer that can change form"),
        ("block", r"'block' matches no layer .*inside it give 'block.\*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named(user: str, pattern: str, words: str) -> None:
    model = Net()
    before = dr.current_plan(model)
    with pytest.raises(ValueError, match=words):
        USERS[user](model, ["fc1", pattern])
    assert dr.current_plan(model) == before


def test_a_rank_that_would_never_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank 4 of 'fc1' would never be used"):
        dr.factorize(Net(), {"fc*": 8, "fc1": 4})
    assert dr.current_plan(dr.factorize(Net(), {"fc1": 4, "fc*": 8}))["fc2"] == LowRank(8)


def test_patterns_are_strings() -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"glob patterns of paths \(str\), got Linear"):
        dr.factorize(model, 4, layers=[model.fc1])  # type: ignore[list-item]


def test_a_shared_or_tied_weight_is_found_by_any_of_its_paths() -> None:
    model = Net()
    model.add_module("again", model.fc1)
    model.block[0].weight = model.fc2.weight
    plan = dr.current_plan(dr.factorize(model, {"again": 4, "block.0": 8}))
    assert plan == {"fc1": LowRank(4), "fc2": LowRank(8)}


def test_a_class_of_layers_is_refused_with_the_filter_it_means() -> None:
    with pytest.raises(TypeError, match=r"got the class Linear.*isinstance\(module, Linear\)"):
        dr.factorize(Net(), 4, layers=nn.Linear)  # pyright: ignore[reportArgumentType]
