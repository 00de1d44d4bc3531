"""The optimizer of a recipe, and gradient clipping in the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training import images

from dynarank.train.images import ImageTask
from dynarank.train.loop import Machine, Trainer
from dynarank.train.optimizers import OPTIMIZER_SLOTS, make_optimizer
from dynarank.train.recipes import Recipe, load_recipe


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(load_recipe("digits").model_dump() | changes)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_adamw_has_its_betas_and_decays_no_vectors() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = make_optimizer(
        recipe(optimizer="adamw", betas=(0.8, 0.95), weight_decay=0.1, learning_rate=3e-4), model
    )
    assert isinstance(optimizer, torch.optim.AdamW)
    weights, vectors = optimizer.param_groups
    assert weights["betas"] == (0.8, 0.95) and weights["lr"] == 3e-4
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [p.ndim for p in weights["params"]] == [2] and len(vectors["params"]) == 3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_slots_are_those_that_the_optimizer_fills(name: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = make_optimizer(recipe(optimizer=name), model)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert sum(v.shape == model.weight.shape for v in state.values()) == OPTIMIZER_SLOTS[name]


def test_clipping_bounds_what_one_step_moves() -> None:
    base = load_recipe("cifar10-resnet20").model_dump() | {"weight_decay": 0.0, "batch_size": 8}
    moved: dict[float | None, float] = {}
    for clip in (None, 0.01):
        one = Recipe.model_validate(base | {"clip_norm": clip})
        task = ImageTask(one, images(16), seed=0)
        cpu = Machine(torch.device("cpu"))
        trainer = Trainer(one, "full-rank", task, seed=0, epochs=1, machine=cpu)
        before = flat(trainer.model)
        trainer._step(next(task.epoch(0)))
        moved[clip] = float((flat(trainer.model) - before).norm())
    assert moved[0.01] == pytest.approx(0.01 * base["learning_rate"], rel=1e-3)
    assert (moved[None] or 0) > 2 * moved[0.01]
