"""The recipes of text: what each says, and a scaled-down run of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training import Silent

from dynarank.cost.flops import trace
from dynarank.forms import LowRank
from dynarank.records import EpochRecord, PhaseRecord, RunRecord, read_run
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.loop import Machine
from dynarank.train.recipes import Recipe, load_recipe, recipe_names
from dynarank.train.run import run_schedule
from dynarank.train.tasks import make_task, sketch

NAMES = ["glue-cola", "glue-mrpc", "glue-rte", "glue-sst2", "glue-stsb", "imdb-lstm", "text-gpt"]
PARTS = {"bert": "blocks.", "gpt": "blocks.", "bilstm": "lstm."}
CPU = Machine(torch.device("cpu"))


def test_they_are_all_there() -> None:
    assert set(NAMES) <= set(recipe_names())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_ranked_gets_cheaper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any data; with two words a sequence, which is all that differs from the recipe."""
    monkeypatch.delenv("DYNARANK_DATA", raising=False)
    recipe = load_recipe(name)
    drawn = sketch(recipe)
    layers = [site.path for site in select(survey(drawn.model), recipe.layers)]
    assert len(layers) == (4 if recipe.model == "bilstm" else 16)
    assert all(layer.startswith(PARTS[recipe.model]) for layer in layers)
    sample = drawn.sample if isinstance(drawn.sample, tuple) else (drawn.sample,)
    use = trace(drawn.model, tuple(part[:, :2] for part in sample))
    for layer in layers:
        one = use.layers[layer]
        low, full = (one.parameters(form)[0] for form in (LowRank(recipe.rank), one.form))
        assert low < 0.55 * full, layer


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_change_come_from_the_learning_rate(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.optimizer == "adamw" and recipe.warmup > 0
    assert recipe.inflate is None and recipe.deflate is None
    assert {"full-rank", "low-rank", "dynamic-rank"} <= set(recipe.schedules)


def small() -> Recipe:
    changes = {
        "batch_size": 8,
        "data_options": {"context": 16, "max_bytes": 30_000},
        "model_options": {"width": 32, "depth": 1, "heads": 2},
        "rank": 4,
        "learning_rate": 1e-2,
    }
    return Recipe.model_validate({**load_recipe("text-gpt").model_dump(), **changes})


@pytest.mark.parametrize("schedule", ["full-rank", "dynamic-rank", "dynamic-rank-low"])
def test_a_whole_run(schedule: str, tmp_path: Path) -> None:
    recipe = small()
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("".join(f"line {number}: it rains again.\n" for number in range(300)))
    limits = {"train_limit": 160, "test_limit": 20}
    task = make_task(recipe, str(text), seed=0, device=CPU.device, **limits)
    run_schedule(recipe, schedule, task, folder, Silent(), seed=0, epochs=2, machine=CPU)
    run = read_run(folder)
    phases, epochs = run.all(PhaseRecord), run.all(EpochRecord)
    assert len(phases) == (1 if schedule == "full-rank" else 3)
    assert all(phase.predicted_flops == phase.counted_flops for phase in phases)
    assert run.summary is not None and run.summary.best_test_score == min(
        epoch.test_score for epoch in epochs
    )
    assert run.summary.test_score < 3 and "perplexity" in epochs[-1].scores  # 8 is chance
    assert epochs[-1].train_score is not None and epochs[-1].train_score < 4
    assert run.all(RunRecord)[0].metric.name == "bits per byte"
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["sha256"] == task.facts["sha256"]  # type: ignore[attr-defined]
