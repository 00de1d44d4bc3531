"""Predicting bytes: windows, limits, figures, and what a run records of its text."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.train.language_task import LanguageModelTask, make_task, sketch
from dynarank.train.recipes import Recipe, RecipeError, load_recipe
from dynarank.train.text_files import TextData

CONTEXT, BATCH = 8, 4
CPU = torch.device("cpu")


def recipe(**changes: object) -> Recipe:
    small = {
        "batch_size": BATCH,
        "data_options": {"context": CONTEXT, "max_bytes": 20_000},
        "model_options": {"width": 16, "depth": 1, "heads": 2},
    }
    return Recipe.model_validate({**load_recipe("text-gpt").model_dump(), **small, **changes})


def data(train: int = 200, test: int = 50) -> TextData:
    """Bytes that say where they are."""
    places = torch.arange(train).to(torch.uint8)
    return TextData(places, torch.arange(test).to(torch.uint8), 1, "here")


def make(**options: int) -> LanguageModelTask:
    sizes = {name: options.pop(name) for name in ("train", "test") if name in options}
    return LanguageModelTask(recipe(), data(**sizes), context=CONTEXT, seed=0, **options)


class Successor(nn.Module):
    """Knows that each byte is followed by the next one, as far as ``certainty`` goes."""

    def __init__(self, certainty: float) -> None:
        super().__init__()
        self.certainty = nn.Parameter(torch.tensor(certainty))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.certainty * F.one_hot((tokens + 1) % 256, 256)


def test_an_epoch_covers_the_text_once_without_overlap() -> None:
    task = make()
    assert (task.steps_per_epoch, task.train_size) == (24 // BATCH, 24 * CONTEXT)
    for epoch in range(5):
        batches = list(task.epoch(epoch))
        assert [tuple(batch.shape) for batch in batches] == [(BATCH, CONTEXT + 1)] * 6
        inputs = torch.cat([batch[:, :-1] for batch in batches]).flatten().sort().values
        first = int(inputs[0])
        assert 0 <= first < CONTEXT
        assert torch.equal(inputs, torch.arange(first, first + 24 * CONTEXT))


def test_windows_follow_the_text() -> None:
    for batch in make().epoch(3):
        assert batch.dtype == torch.int64 and (batch.diff() == 1).all()


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    task, again = make(), make()
    torch.manual_seed(5)
    for epoch in (4, 0):
        wanted = torch.stack(list(task.epoch(epoch)))
        torch.rand(3)
        assert torch.equal(wanted, torch.stack(list(again.epoch(epoch))))
    assert not torch.equal(torch.stack(list(task.epoch(1))), torch.stack(list(task.epoch(2))))
    other = LanguageModelTask(recipe(), data(), context=CONTEXT, seed=1)
    assert not torch.equal(torch.stack(list(task.epoch(1))), torch.stack(list(other.epoch(1))))


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    list(make().epoch(0))
    assert torch.equal(state, torch.get_rng_state())


def test_limits_spread_evenly() -> None:
    task = make(train_limit=8, test_limit=3)
    assert task.train_size == 8 * CONTEXT and task.steps_per_epoch == 2
    begins = torch.cat(list(task.epoch(0)))[:, 0].sort().values
    assert begins.diff().tolist() == [3 * CONTEXT] * 7
    assert task.test_starts.tolist() == [0, 16, 32]
    assert make().test_starts.tolist() == [0, 8, 16, 24, 32, 40]


def test_figures_of_the_test_part() -> None:
    task, model = make(test_limit=3), Successor(6.0)
    with torch.no_grad():
        found = task.evaluate(model, nullcontext)
        loss, score = task.loss(model, next(iter(task.epoch(0))))
    nats = math.log(math.exp(6) + 255) - 6
    assert found.loss == pytest.approx(nats, rel=1e-5)
    assert list(found.scores) == [task.metric.name, "perplexity"]
    assert found.scores["bits per byte"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert found.scores["perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert loss.item() == pytest.approx(nats, rel=1e-5)
    assert score.item() == pytest.approx(found.scores["bits per byte"], rel=1e-5)
    assert not task.metric.higher_is_better


def test_all_test_windows_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = make(test=1000), Successor(3.0)
    wanted = task.evaluate(model, nullcontext).loss
    monkeypatch.setattr("dynarank.train.language_task._TEST_BATCH", 7)  # with a rest
    assert task.evaluate(model, nullcontext).loss == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 39}, "3 training windows of 8 bytes do not fill one batch of 4"),
        ({"train_limit": 3}, "3 training windows of 8 bytes do not fill one batch of 4"),
        ({"train_limit": 25}, "25 training windows requested, but there are 24"),
        ({"test_limit": 7}, "7 test windows requested, but there are 6"),
        ({"test_limit": 0}, "0 test windows requested"),
        ({"test": 8}, r"the test part has 8 bytes, less than one window of 8 \+ 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_the_default_is_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNARANK_DATA", "/nowhere")  # names data sets, not text
    task = make_task(recipe(), None, seed=0, device=CPU, train_limit=8, test_limit=8)
    facts = task.facts
    assert facts["train_bytes"] + facts["test_bytes"] <= 20_000 and facts["files"] >= 1
    both = bytes(task.data.train.tolist()) + bytes(task.data.test.tolist())
    assert facts["sha256"] == hashlib.sha256(both).hexdigest()


def test_a_sketch_is_the_task_without_data() -> None:
    drawn, task = sketch(recipe()), make()
    assert drawn.sample.shape == task.sample().shape and drawn.sample.is_meta
    shapes = {name: p.shape for name, p in task.model().named_parameters()}
    assert shapes == {name: p.shape for name, p in drawn.model.named_parameters()}


@pytest.mark.parametrize("options", [{"context": 0}, {"contxt": 8}])
def test_options_that_make_no_sense_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=r"recipe 'text-gpt', data_options: .*cont"):
        sketch(recipe(data_options=options))


def test_it_learns() -> None:
    task = make(train=4000)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = task.evaluate(model, nullcontext).loss
    for batch in task.epoch(0):
        loss, _ = task.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.evaluate(model.eval(), nullcontext).loss < before / 2
