"""A warning where low rank saves hardly anything, unless the user has named the layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import dynarank as dr
from dynarank import LowRank
from dynarank.surgery.saving import saving


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))


def scheduler(model: nn.Module, schedule: object, **more: object) -> dr.RankScheduler:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dr.RankScheduler(model, optimizer, schedule, 10, **more)  # type: ignore[arg-type]


WORDS = r"\(31\) saves 2\.\d% .* less than 5%: .*lower rank, .*layers=.*survey\(model"


def test_the_verb_and_the_scheduler_warn_at_the_users_line() -> None:
    for call in (
        lambda: dr.factorize(net(), 31),
        lambda: dr.RankScheduler(
            model := net(), torch.optim.SGD(model.parameters(), 0.1), dr.schedules.low_rank(31), 9
        ),
    ):
        with pytest.warns(UserWarning, match=WORDS) as caught:
            call()
        assert caught[0].filename == __file__


def test_no_warning_where_enough_is_saved_or_where_the_layers_are_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dr.factorize(net(), 24)
        dr.factorize(net(), 31, layers="0")
        dr.factorize(net(), {"0": 31})
        dr.factorize(dr.factorize(net(), 8), 31)  # the layers were chosen before
        scheduler(net(), dr.schedules.low_rank(31), layers="0")
        scheduler(net(), dr.schedules.lora(4))
        scheduler(net(), dr.schedules.full_rank())


def test_nothing_is_changed_when_the_warning_is_an_error() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            dr.factorize(model, 31)
    assert type(model[0]) is nn.Linear


def test_embeddings_do_not_count() -> None:
    model = nn.Sequential(nn.Embedding(100_000, 64), nn.EmbeddingBag(100_000, 64), *net())
    assert saving(dr.survey(model), {"2": LowRank(16)}) == pytest.approx(1 / 6)
