"""Batches are split among processes so that the average gradient is that of the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
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


class WithBalance(Language):
    """With a small term that is no mean over examples, as of a mixture of experts."""

    def mean(self, output: Tensor, target: Tensor) -> Tensor:
        return super().mean(output, target) + 0.01 * output.mean((0, 2)).square().sum()


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
        share = Shares(made, several(size, rank), size).of(model, batch)
        parts.append(made.loss(model, share.batch)[0] * share.of_loss)
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
@pytest.mark.parametrize("scale", [1.0, 1e-2, 0.0])  # of 0, all tokens have a loss of log 7
def test_a_language_models_own_loss_is_recognized(kind: type[Language], scale: float) -> None:
    """By one batch; later ones are looked at only now and then."""
    model, batch, calls = kind(scale), padded(), list[int]()
    shares = Shares(task(batch), several(2), 2)
    shares.of(model, batch)
    nn.init.normal_(model.table.weight)
    whole, parts = composed(task(batch), model, batch, 2)
    torch.testing.assert_close(parts, whole, rtol=5e-7, atol=0)
    model.register_forward_hook(lambda *_: calls.append(1))
    for seed in range(15):
        part = shares.of(model, padded(seed)).of_loss
        assert part == pytest.approx(0.5 if kind is OfExamples else 7 / 15)
    assert len(calls) == 4 * 4  # at batches 2, 4, 8 and 16


def test_examples_of_unlike_lengths_tell_how_targets_count() -> None:
    """Of 8 examples, two are looked at: those with the fewest and with the most targets."""
    ids = torch.randint(0, 7, (8, 6))
    labels = ids.clone()
    labels[3, 3:] = -100
    batch = {"input_ids": ids, "labels": labels}
    share = Shares(task(batch), several(4, 1), 8).of(OfExamples(), batch)
    assert share.of_loss == 0.25
    labels[4] = -100  # the loss of it alone is no number
    share = Shares(task(batch), several(4, 1), 8).of(Language(), batch)
    assert share.of_loss == pytest.approx(7 / 32)


def test_a_small_term_that_is_no_mean_does_not_hide_how_targets_count() -> None:
    model, batch = WithBalance(1e-2), padded()
    assert Shares(task(batch), several(2), 2).of(model, batch).of_loss == pytest.approx(7 / 15)


def _weighted(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, weight=torch.tensor([5.0, 1.0, 0.2]))


def _ignoring(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=2)


def _summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


@pytest.mark.parametrize("loss", [_weighted, _ignoring, _summed])
def test_a_loss_that_is_no_mean_is_refused_before_the_first_step(
    loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its first value is log 3 for any part of a batch, since the weights are zero."""
    batch = torch.randn(12, 4), torch.tensor([0, 0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 2])
    made, model = task(batch), nn.Linear(4, 3)
    monkeypatch.setattr(made, "_loss", loss)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with pytest.raises(RecipeError, match="no mean over its examples"):
        Shares(made, several(2), 12).of(model, batch)


@pytest.mark.parametrize("size", [2, 4])
def test_a_mean_in_bf16_is_not_refused(size: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        batch = torch.randn(16, 8).bfloat16(), torch.randint(0, 3, (16,))
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).bfloat16()
        shares = Shares(task(batch), several(size), 16)
        for _ in range(8):
            assert shares.of(model, batch).of_loss == 1 / size


class Drawing(nn.Module):
    """It draws numbers in evaluation mode, as a variational autoencoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.3 * torch.randn_like(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_with_random_draws_is_judged_by_its_mean(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = torch.randn(8, 4), torch.randn(8, 4)
    made, model = task(batch, loss="mse"), Drawing()
    state = torch.get_rng_state()
    monkeypatch.setattr(made, "_loss", partial(F.mse_loss, reduction=reduction))
    refused = pytest.raises(RecipeError, match="no mean over its examples")
    with refused if reduction == "sum" else nullcontext():
        Shares(made, several(2), 8).of(model, batch)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("before", "after", "loss"), [(0.3, 0.0, F.cross_entropy), (0.0, 1e-6, _weighted)]
)
def test_draws_are_told_from_rounding_though_losses_are_alike(
    before: float, after: float, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a zero layer, draws change gradients only; what sums in any order round is no draw."""

    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            found = super().forward(input + before * torch.randn_like(input))
            return found + after * torch.randn_like(found)

    batch = torch.randn(12, 4), torch.tensor([0, 0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 2])
    made, model = task(batch), Noisy(4, 3)
    monkeypatch.setattr(made, "_loss", loss)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    refused = pytest.raises(RecipeError, match="no mean over its examples")
    with refused if loss is _weighted else nullcontext():
        Shares(made, several(2), 12).of(model, batch)


def test_batches_of_time_steps_are_no_batches_of_examples() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)  # its first dimension is time

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    batch = torch.randn(6, 3, 4), torch.randn(6, 3, 4)
    with pytest.raises(RecipeError, match="no mean over its examples"):
        Shares(task(batch, loss="mse"), several(2), 6).of(Last(), batch)


def test_a_score_is_averaged_over_its_own_terms() -> None:
    """The mean of examples' means as loss, and the accuracy of all tokens together."""
    batch = padded()
    share = Shares(task(batch, metric="accuracy"), several(2), 2).of(OfExamples(), batch)
    assert share.of_loss == 0.5 and share.of_score == pytest.approx(8 / 18)
    share = Shares(task(batch, metric="loss"), several(2), 2).of(OfExamples(), batch)
    assert share.of_score == share.of_loss == 0.5


def test_a_batch_of_one_example_says_nothing() -> None:
    class NeedsOne(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert len(input)
            return super().forward(input)

    batch = torch.randn(1, 4), torch.randn(1, 4)
    share = Shares(task(batch, loss="mse"), several(2), 2).of(NeedsOne(4, 4), batch)
    assert share.of_loss == 0.0 and share.batch is batch


def test_what_a_network_without_gradients_does_not_tell_is_found_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = torch.randn(6, 4), torch.randn(6, 4)
    made, model = task(batch, loss="mse"), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    monkeypatch.setattr(made, "_loss", partial(F.mse_loss, reduction="sum"))
    nn.init.constant_(model[0].bias, -100.0)
    shares = Shares(made, several(2), 6)
    shares.of(model, batch)
    nn.init.zeros_(model[0].bias)
    with pytest.raises(RecipeError, match="no mean over its examples"):
        shares.of(model, batch)


def test_ways_to_count_that_no_batch_tells_apart_are_not_looked_for_at_all_batches() -> None:
    model, calls = Drawing(), list[int]()
    model.register_forward_hook(lambda *_: calls.append(1))
    made = SimpleNamespace(
        loss=lambda m, b: (m(b).square().mean(), None), metric=SimpleNamespace(name="loss"),
        loss_terms=lambda b: (len(b), len(b) + 1e-3 * float(b[:, 0].abs().sum())),
    )  # fmt: skip
    shares = Shares(cast(Any, made), several(2), 4)
    for _ in range(40):
        shares.of(model, torch.randn(4, 4))
    assert len(calls) <= 1 + 17 * (2 + 3 * 16)  # at batches 1 to 16, and 32


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
