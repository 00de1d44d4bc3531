"""Batches are split among processes so that the average gradient is that of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.distributed.processes import Processes
from dynarank.train.own_parts import TensorPart
from dynarank.train.own_task import OwnTask
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError
from dynarank.train.sentence_task import Examples
from dynarank.train.shares import Shares, count_examples, rows_of


def several(size: int, rank: int = 0) -> Processes:
    return cast(Processes, SimpleNamespace(size=size, rank=rank))


class Language(nn.Module):
    """Its own loss leaves out the first token, and targets of -100."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)
        nn.init.normal_(self.table.weight, std=scale)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.table(input_ids)
        return {"loss": self.mean(output[:, :-1].transpose(1, 2), labels[:, 1:]), "logits": output}

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)


class OfExamples(Language):
    """The mean of the examples' means."""

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(output, target, reduction="none")
        return (losses.sum(1) / (target != -100).sum(1)).mean()


class OfFirstTokens(Language):
    """A mean over targets of its own choice."""

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[:, :, :3], target[:, :3])


def padded(seed: int = 0, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(0, 7, (4, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4], labels[3, 4:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def task(fields: Any, **options: Any) -> Any:
    count = len(next(iter(fields.values() if isinstance(fields, dict) else fields)))
    recipe = Recipe(data="a.py:data", model="mlp", epochs=1, learning_rate=0.1, **options)
    part = TensorPart(fields, count)
    return OwnTask(recipe, part, part, seed=0, device=torch.device("cpu"))


def composed(made: Any, model: nn.Module, batch: Any, size: int) -> tuple[Any, Any]:
    """The loss of a batch, and the sum of what the processes have of it."""
    parts: list[Tensor] = []
    for rank in range(size):
        share, part = Shares(made, several(size, rank), size).of(model, batch)
        parts.append(made.loss(model, share)[0] * part)
    return made.loss(model, batch)[0], torch.stack(parts).sum()


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 2), (7, 3), (1, 2)])
def test_losses_of_uneven_shares_add_up(count: int, size: int) -> None:
    batch = torch.randn(count, 4), torch.randint(0, 3, (count,))
    whole, parts = composed(task(batch), nn.Linear(4, 3), batch, size)
    torch.testing.assert_close(parts, whole)


def test_ignored_targets_do_not_count() -> None:
    batch = torch.randn(6, 4), torch.tensor([0, 1, 2, -100, -100, 1])
    whole, parts = composed(task(batch), nn.Linear(4, 3), batch, 2)
    torch.testing.assert_close(parts, whole)


def test_where_a_whole_share_is_ignored_nothing_is_lost() -> None:
    batch = torch.randn(4, 4), torch.tensor([0, 1, -100, -100])
    whole, parts = composed(task(batch), nn.Linear(4, 3), batch, 2)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("kind", [Language, OfExamples])
@pytest.mark.parametrize("scale", [1.0, 1e-2])  # then all tokens have a loss of nearly log 7
def test_a_language_models_own_loss_is_recognized(kind: type[Language], scale: float) -> None:
    batch = padded()
    whole, parts = composed(task(batch), kind(scale), batch, 2)
    torch.testing.assert_close(parts, whole, rtol=5e-7, atol=0)


def test_a_loss_known_by_one_batch_is_not_sought_again() -> None:
    """Every search passes all of a batch and all shares through the model."""
    model, calls = Language(1e-2), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    shares = Shares(task(padded()), several(2), 2)
    for seed in range(16):
        shares.of(model, padded(seed))
    assert len(calls) == 5 * 4  # at batches 1, 2, 4, 8 and 16


def test_a_wrong_count_is_found_when_losses_differ() -> None:
    model, batch = OfFirstTokens(1e-4), padded(length=12)
    shares = Shares(task(batch), several(2), 2)
    shares.of(model, batch)  # all losses are log 7: this batch cannot tell
    nn.init.normal_(model.table.weight)
    with pytest.raises(RecipeError, match="no mean over its examples"):
        for _ in range(16):
            shares.of(model, batch)


def test_a_loss_that_is_no_mean_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(6, 4), torch.randn(6, 4)
    made = task(batch, loss="mse")
    monkeypatch.setattr(made, "_loss", partial(F.mse_loss, reduction="sum"))
    with pytest.raises(RecipeError, match="no mean over its examples"):
        Shares(made, several(2), 6).of(nn.Linear(4, 4), batch)


def test_a_batch_of_fewer_than_processes_is_refused_by_name() -> None:
    batch = torch.randn(2, 4), torch.randn(2, 4)
    with pytest.raises(RecipeError, match="a batch of 2 cannot be split among 3 processes"):
        Shares(task(batch), several(3), 2)


@dataclass
class Own:
    x: Tensor
    names: list[str]
    scale: float


def test_rows_of_any_container() -> None:
    x = torch.arange(4)
    own = rows_of([Own(x, list("abcd"), 2.0), {"y": x, "of all": torch.ones(3)}], slice(0, 2))
    assert own[0].x.tolist() == [0, 1] and own[0].names == ["a", "b"] and own[0].scale == 2.0
    assert own[1]["y"].tolist() == [0, 1] and len(own[1]["of all"]) == 3
    examples = rows_of(Examples((x,), x), slice(1, 4))
    assert examples.labels.tolist() == [1, 2, 3] and count_examples(examples) == 3


def test_a_batch_without_tensors_is_refused() -> None:
    with pytest.raises(RecipeError, match="holds no tensor"):
        count_examples({"text": ["a", "b"]})
