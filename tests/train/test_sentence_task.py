"""Judging sentences: batches, losses and scores of both kinds."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.train import sentence_task
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.sentence_task import (
    ACCURACY,
    F1,
    MATTHEWS,
    PEARSON,
    SPEARMAN,
    ClassificationTask,
    Examples,
    RegressionTask,
)


def recipe(**changes: object) -> Recipe:
    return load_recipe("glue-sst2").model_copy(update={"batch_size": 8, **changes})


def examples(count: int) -> Examples:
    """Number i has the token i, the segment i and the class i mod 2."""
    tokens = torch.arange(count)[:, None].expand(-1, 3)
    return Examples((tokens, tokens.clone()), torch.arange(count) % 2)


class Parity(nn.Module):
    """Gets the class of token i right, but for every fifth."""

    def __init__(self) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(2.0))

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        assert torch.equal(tokens, segments)
        number = tokens[:, 0]
        found = torch.where(number % 5 == 0, 1 - number % 2, number % 2)
        return self.certainty * F.one_hot(found, 2)


def classify(count: int = 30, *, seed: int = 0, **changes: object) -> ClassificationTask:
    many = examples(count)
    return ClassificationTask(recipe(**changes), many, many, Parity, [MATTHEWS, F1], seed=seed)


def orders(task: ClassificationTask, epoch: int) -> list[list[int]]:
    return [batch.inputs[0][:, 0].tolist() for batch in task.epoch(epoch)]


def test_an_epoch_is_a_shuffled_pass() -> None:
    task = classify()
    batches = orders(task, 0)
    assert [len(batch) for batch in batches] == [8, 8, 8] and task.steps_per_epoch == 3
    assert len({number for batch in batches for number in batch}) == 24
    for batch in task.epoch(1):
        assert torch.equal(batch.labels, batch.inputs[0][:, 0] % 2)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    state = torch.get_rng_state()
    one, two = classify(), classify()
    assert orders(one, 3) == orders(two, 3) and orders(one, 3) != orders(one, 4)
    assert orders(one, 3) != orders(classify(seed=1), 3)
    assert torch.equal(state, torch.get_rng_state())
    once = classify(shuffle="once")
    assert orders(once, 3) == orders(once, 4)


@pytest.mark.parametrize("batch", [7, 256])
def test_figures_of_a_classification(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_task, "_TEST_BATCH", batch)
    task = classify(label_smoothing=0.1)
    with torch.no_grad():
        found = task.evaluate(Parity(), nullcontext)
    # 3 even and 3 odd numbers of 30 are wrong: a confusion of 12, 3, 3, 12.
    assert found.scores == {"Matthews correlation": pytest.approx(0.6), "F1": pytest.approx(0.8)}
    logits, labels = Parity()(*examples(30).inputs), examples(30).labels
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    first = next(iter(task.epoch(0)))
    loss, score = task.loss(Parity(), first)
    wanted = F.cross_entropy(Parity()(*first.inputs), first.labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(wanted.item()) and loss.requires_grad
    assert score is None  # a mean of correlations is no correlation


def test_accuracy_is_given_in_training_where_it_is_the_metric() -> None:
    many = examples(32)
    task = ClassificationTask(recipe(), many, many, Parity, [ACCURACY, F1], seed=0)
    scores = [task.loss(Parity(), batch)[1] for batch in task.epoch(0)]
    assert all(score is not None and not score.requires_grad for score in scores)
    assert sum(s.item() for s in scores if s is not None) / 4 == pytest.approx(25 / 32)


def test_figures_of_a_regression() -> None:
    labels = torch.linspace(0, 1, 30)
    many = Examples((labels[:, None],), labels)
    task = RegressionTask(recipe(), many, many, nn.Identity, [SPEARMAN, PEARSON], seed=0)

    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    found = task.evaluate(Cube(), nullcontext)
    assert list(found.scores) == ["Spearman correlation", "Pearson correlation"]
    assert found.scores["Spearman correlation"] == pytest.approx(1)
    assert 0.9 < found.scores["Pearson correlation"] < 0.95
    assert found.loss == pytest.approx(((labels**3 - labels) ** 2).mean().item(), rel=1e-5)
    assert task.loss(Cube(), next(iter(task.epoch(0))))[1] is None


def test_a_metric_that_is_not_finite_does_not_hide() -> None:
    labels = torch.linspace(0, 1, 8)
    many = Examples((torch.full((8, 1), torch.nan),), labels)
    task = RegressionTask(recipe(), many, many, nn.Identity, [SPEARMAN], seed=0)
    score = task.evaluate(nn.Identity(), nullcontext).scores["Spearman correlation"]
    assert score != score


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(RecipeError, match="7 training examples do not fill one batch of 8; raise"):
        classify(7)


def test_sample_and_device() -> None:
    task = classify()
    assert [part.shape for part in task.sample()] == [(8, 3), (8, 3)]
    assert isinstance(task.model(), Parity)
    moved = examples(4).to(torch.device("meta"))
    assert moved.labels.is_meta and all(part.is_meta for part in moved.inputs)
