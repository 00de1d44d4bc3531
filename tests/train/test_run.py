"""The loop, recipes and run folders, end to end on small runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training import Silent, images

from dynarank import Rank
from dynarank.cost.flops import trace
from dynarank.cost.schedule import cost_schedule
from dynarank.recording.rank_metrics import evenly
from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    HeatmapRecord,
    PhaseRecord,
    Run,
    SpectrumRecord,
    read_run,
)
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.data import ImageData, limit, load_digits_data
from dynarank.train.images import ImageTask
from dynarank.train.loop import DivergedError, Machine, Trainer
from dynarank.train.models import MODELS
from dynarank.train.recipes import Recipe, RecipeError, load_recipe, recipe_names
from dynarank.train.run import run_schedule
from dynarank.train.tasks import sketch

CPU = Machine(torch.device("cpu"))
SCHEDULES = ["full-rank", "low-rank", "dynamic-rank", "dynamic-rank-low"]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return limit(load_digits_data(), 320)


def run(folder: Path, schedule: str, data: ImageData, **options: Any) -> Run:
    recipe = options.pop("recipe", None) or load_recipe("digits")
    settings = {"seed": 0, "epochs": 5, "machine": CPU} | options
    task = ImageTask(recipe, data, seed=settings["seed"])
    run_schedule(recipe, schedule, task, folder, Silent(), **settings)
    return read_run(folder)


def trainer(recipe: Recipe, schedule: str, data: ImageData, *, seed: int, epochs: int) -> Trainer:
    task = ImageTask(recipe, data, seed=seed)
    return Trainer(recipe, schedule, task, seed=seed, epochs=epochs, machine=CPU)


@pytest.fixture(scope="module")
def runs(digits: ImageData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: run(folder / name, name, digits) for name in SCHEDULES}


def test_the_records_tell_the_whole_run(runs: dict[str, Run]) -> None:
    for name, one in runs.items():
        assert one.header.schedule == name and one.header.steps_per_epoch == 5
        assert [record.epoch for record in one.all(EpochRecord)] == [1, 2, 3, 4, 5]
        assert len(one.all(SpectrumRecord)) == 6
        assert one.summary is not None and one.summary.test_score > 0.5
        assert one.config["train_size"] == 320
        losses = [record.train_loss for record in one.all(EpochRecord)]
        assert losses[-1] < losses[0]


def test_spectra_and_pictures_are_kept(runs: dict[str, Run]) -> None:
    for one in runs.values():
        spectra, pictures = one.all(SpectrumRecord), one.all(HeatmapRecord)
        assert [picture.epoch for picture in pictures] == [0, 1, 2, 3, 4, 5]
        assert all(set(picture.layers) == {"conv1", "conv2", "conv3"} for picture in pictures)
        assert all(len(rows) == len(rows[0]) == 32 for rows in pictures[0].layers.values())
        for layer in spectra[-1].layers.values():
            assert layer.update_rank is not None and layer.update_rank > 1
            assert 0 < len(layer.values) <= 64 and list(layer.values) == sorted(layer.values)[::-1]
        assert {layer.update_rank for layer in spectra[0].layers.values()} == {0.0}


def test_long_runs_of_deep_models_picture_few_moments_and_layers() -> None:
    assert evenly(range(151), 10) == [0, 17, 33, 50, 67, 83, 100, 117, 133, 150]
    paths = [str(i) for i in range(24)]
    assert len(evenly(paths, 12)) == 12 and evenly(paths, 12)[-1] == "23"


def test_phases_and_changes_fall_where_the_recipe_puts_them(runs: dict[str, Run]) -> None:
    """Inflate at 11/30 and deflate at 24/30 of 25 steps: 9 and 20."""
    assert [p.step for p in runs["full-rank"].all(PhaseRecord)] == [0]
    assert [p.step for p in runs["dynamic-rank"].all(PhaseRecord)] == [0, 9, 20]
    changes = runs["dynamic-rank-low"].all(ChangeRecord)
    assert {(c.step, c.before["form"], c.after["form"]) for c in changes} == {
        (9, "low-rank", "full-rank"),
        (20, "full-rank", "low-rank"),
    }
    assert not runs["low-rank"].all(ChangeRecord)


def test_executed_flops_are_the_predicted_ones(runs: dict[str, Run]) -> None:
    for one in runs.values():
        for phase in one.all(PhaseRecord):
            assert phase.counted_flops == phase.predicted_flops
            assert phase.memory_bytes and phase.memory_bytes > 4 * phase.total_parameters


def test_the_summary_adds_up(runs: dict[str, Run]) -> None:
    full, low, dynamic = (runs[name] for name in SCHEDULES[:3])
    phases = dynamic.all(PhaseRecord)
    steps = [9, 11, 5]
    total = sum(p.predicted_flops * n for p, n in zip(phases, steps, strict=True))
    reference = full.all(PhaseRecord)[0].predicted_flops * 25
    assert dynamic.summary is not None and low.summary is not None and full.summary is not None
    assert dynamic.summary.relative_flops == pytest.approx(total / reference)
    mean = sum(p.trainable_parameters * n for p, n in zip(phases, steps, strict=True)) / 25
    assert dynamic.summary.trainable_parameters_mean == pytest.approx(mean)
    assert full.summary.relative_flops == 1 > dynamic.summary.relative_flops
    assert low.summary.relative_flops < dynamic.summary.relative_flops
    assert low.summary.trainable_parameters_peak < full.summary.trainable_parameters_peak


def test_the_saved_weights_are_those_of_the_plain_model(
    runs: dict[str, Run], digits: ImageData
) -> None:
    for one in runs.values():
        model = MODELS["digits-net"](10)
        model.load_state_dict(load_file(one.folder / "model.safetensors"))
        model.eval()
        with torch.no_grad():
            hits = model(digits.test_images).argmax(1) == digits.test_labels
        assert one.summary is not None
        assert hits.float().mean().item() == pytest.approx(one.summary.test_score, abs=1e-3)


def test_a_run_repeats_bit_by_bit(digits: ImageData, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.rand(3)  # whatever ran before must not matter
        run(tmp_path / name, "dynamic-rank", digits, epochs=2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    run(tmp_path / "c", "dynamic-rank", digits, epochs=2, seed=1)
    other = load_file(tmp_path / "c" / "model.safetensors")
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_schedules_share_initial_weights_and_batches(digits: ImageData) -> None:
    recipe = load_recipe("digits")
    full, low = (
        trainer(recipe, name, digits, seed=3, epochs=2) for name in ("full-rank", "low-rank")
    )
    assert torch.equal(full.model.head.weight, low.model.head.weight)  # type: ignore[union-attr]
    for one, two in zip(full.task.epoch(1), low.task.epoch(1), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_learning_rate_and_decay_reach_the_optimizer(digits: ImageData) -> None:
    recipe = load_recipe("digits")
    one = trainer(recipe, "low-rank", digits, seed=0, epochs=30)
    decaying, rest = one.optimizer.param_groups
    assert decaying["weight_decay"] == recipe.weight_decay and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decaying["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    rates = [one.train_epoch(epoch).learning_rate for epoch in range(30)]
    drops = [i for i in range(1, 30) if rates[i] != rates[i - 1]]
    assert drops == [20, 26]
    assert rates[-1] == pytest.approx(recipe.learning_rate * recipe.decay_factor**2)


def test_a_run_that_is_refused_leaves_nothing_behind(digits: ImageData, tmp_path: Path) -> None:
    recipe = load_recipe("digits").with_settings({"rank": 1000})
    with pytest.raises(ValueError, match="rank 1000 is above the limit"):
        run(tmp_path / "x", "low-rank", digits, recipe=recipe)
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_advice(
    digits: ImageData, tmp_path: Path
) -> None:
    recipe = load_recipe("digits").model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match="try a lower learning rate"):
        run(tmp_path, "full-rank", digits, recipe=recipe)
    assert read_run(tmp_path).summary is None


@pytest.mark.parametrize("schedule", ["low-rank", "dynamic-rank"])
def test_bf16_autocast(schedule: str, digits: ImageData, tmp_path: Path) -> None:
    one = run(tmp_path, schedule, digits, machine=Machine(torch.device("cpu"), "bf16"))
    assert one.summary is not None and one.summary.test_score > 0.5
    saved = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}


# The recipes.

HALF = Rank(0.5, of="out")


def test_the_first_experiment_is_the_papers() -> None:
    recipe = load_recipe("cifar10-resnet20")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (150, 128, 0.1)
    assert (recipe.momentum, recipe.label_smoothing, recipe.decay_at) == (0.9, 0.1, (100, 130))
    assert (recipe.inflate, recipe.deflate, recipe.rank, recipe.alpha) == (55, 120, HALF, 16)
    assert recipe.augment and recipe.shuffle == "epoch" and recipe.weight_decay == 1e-4


def test_its_parameters_are_exact() -> None:
    recipe = load_recipe("cifar10-resnet20")
    counts = {}
    for name in ("full-rank", "low-rank"):
        one = trainer(recipe, name, images(128), seed=0, epochs=3)
        trainable = [p.numel() for p in one.model.parameters() if p.requires_grad]
        counts[name] = sum(trainable)
        assert len(one.ranks.layers) == 19
    assert counts == {"full-rank": 272_762, "low-rank": 155_170}


def test_the_second_experiment_is_the_papers() -> None:
    recipe = load_recipe("cifar100-wrn28-10")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (200, 128, 0.1)
    assert (recipe.momentum, recipe.label_smoothing, recipe.decay_at) == (0.9, 0.1, (150, 180))
    assert (recipe.inflate, recipe.deflate, recipe.rank, recipe.alpha) == (80, 170, HALF, 16)
    assert recipe.augment and recipe.shuffle == "epoch" and recipe.weight_decay == 5e-4
    assert recipe.model_options == {"dropout": 0.3}
    published = recipe.published()
    assert (published.inflate, published.deflate, published.weight_decay) == (55, 120, 1e-3)
    assert (published.shuffle, published.init, published.moments) == ("once", "spectral", "reset")


def test_its_parameters_are_exact_by_phase() -> None:
    recipe = load_recipe("cifar100-wrn28-10")
    drawn = sketch(recipe)
    layers = [site.path for site in select(survey(drawn.model), recipe.layers)]
    use = trace(drawn.model, drawn.sample[:1])
    cost = cost_schedule(use, recipe.schedule("dynamic-rank"), layers, 200)
    counts = [(one.phase.start, one.trainable_parameters) for one in cost.phases]
    assert counts == [(0, 20_590_236), (80, 36_539_124), (170, 20_590_236)]
    assert len(layers) == 24
    assert cost.mean_trainable == pytest.approx(27_767_236, abs=0.5)


def test_transition_points_that_a_recipe_leaves_open_follow_its_learning_rate(
    digits: ImageData, tmp_path: Path
) -> None:
    free = {"inflate": None, "deflate": None}
    recipe = Recipe.model_validate(load_recipe("digits").model_dump() | free)
    one = trainer(recipe, "dynamic-rank", digits, seed=0, epochs=30)
    starts = [cost.phase.start / one.total_steps for cost in one.forecast().phases]
    assert starts == pytest.approx([0, 0.54 * 20 / 30, (20 + 0.4 * 10) / 30], abs=0.01)
    done = run(tmp_path, "dynamic-rank", digits, recipe=recipe)
    found = [phase.step / 25 for phase in done.all(PhaseRecord)]
    assert found == pytest.approx(starts, abs=0.05)


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("fashion-mnist")])
def test_low_rank_saves_more_than_half_of_the_flops_on_fashion_mnist(name: str) -> None:
    recipe = load_recipe(name)
    drawn = sketch(recipe)
    layers = [site.path for site in select(survey(drawn.model), recipe.layers)]
    use = trace(drawn.model, drawn.sample)
    assert cost_schedule(use, recipe.schedule("low-rank"), layers, 10).relative_training < 0.4


def test_as_published_keeps_the_published_codes_faults() -> None:
    recipe = load_recipe("cifar10-resnet20").published()
    assert (recipe.shuffle, recipe.weight_decay, recipe.moments) == ("once", 0, "reset")
    assert recipe.schedule("dynamic-rank").execution == "two-branch"  # type: ignore[attr-defined]
    one = trainer(recipe, "low-rank", images(128), seed=0, epochs=3)
    stage = one.model.stages[0]  # type: ignore[index]
    assert torch.equal(stage[0].conv1.down, stage[1].conv2.down)
    ours = trainer(load_recipe("cifar10-resnet20"), "low-rank", images(128), seed=0, epochs=3)
    stage = ours.model.stages[0]  # type: ignore[index]
    assert not torch.equal(stage[0].conv1.down, stage[1].conv2.down)
    with pytest.raises(RecipeError, match="'digits' is not a published experiment"):
        load_recipe("digits").published()


def test_a_short_run_is_the_same_experiment_in_small() -> None:
    recipe = load_recipe("cifar10-resnet20")
    one = trainer(recipe, "dynamic-rank", images(1280), seed=0, epochs=15)
    assert [cost.phase.start for cost in one.forecast().phases] == [0, 55, 120]
    assert sorted(one.lr_scheduler.milestones) == [100, 130]  # type: ignore[attr-defined]
    assert one.forecast().relative_training == pytest.approx(0.842, abs=0.003)


def test_every_recipe_loads_and_an_unknown_one_names_the_nearest() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.summary
        assert all(p.is_meta for p in sketch(recipe).model.parameters())
    with pytest.raises(
        RecipeError, match=r"'cifar-resnet'; did you mean 'cifar10-resnet20'\?.*digits"
    ):
        load_recipe("cifar-resnet")


@pytest.mark.parametrize(
    "change", [{"inflate": 25}, {"deflate": 30}, {"epochs": 0}, {"schedules": ["x"]}, {"rnk": 2}]
)
def test_a_recipe_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Recipe.model_validate({**load_recipe("digits").model_dump(), **change})


def test_configurations_are_plain_json(runs: dict[str, Run]) -> None:
    for one in runs.values():
        saved = json.loads((one.folder / "config.json").read_text())
        assert Recipe.model_validate(saved["recipe"]) == load_recipe("digits")
