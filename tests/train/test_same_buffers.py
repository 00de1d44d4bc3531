"""In two processes: what layers average of their own shares is refused, what is alike is not."""

from __future__ import annotations

import pytest
import torch
from process_pool import Pools
from torch import Tensor, nn

from dynarank.distributed.processes import processes_of
from dynarank.train.loop import Machine, Trainer
from dynarank.train.own_parts import TensorPart
from dynarank.train.own_task import OwnTask
from dynarank.train.recipe import Recipe
from dynarank.train.recipe_error import RecipeError


class _Mean(nn.Module):
    """It keeps a mean of its inputs, as a codebook does, which no BatchNorm of torch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().mean((0, 2)), 0.1)
        return x


class _Constant(nn.Identity):
    """Its buffers are alike in all processes, though no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unset", torch.full((2,), torch.nan))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


NORMS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "instance": lambda: nn.InstanceNorm1d(4, track_running_stats=True),
    "own": _Mean,
    "constant": _Constant,
    "none": nn.Identity,
}


class _Own(OwnTask):
    norm = "none"

    def model(self) -> nn.Module:
        layers = nn.Linear(8, 8), NORMS[self.norm](), nn.Flatten(), nn.Linear(32, 3)
        return nn.Sequential(*layers)


def _trainer(norm: str) -> Trainer:
    torch.manual_seed(0)
    part = TensorPart((torch.randn(16, 4, 8), torch.randint(0, 3, (16,))), 8)
    recipe = Recipe(data="a.py:data", model="mlp", epochs=2, learning_rate=0.1)
    task = _Own(recipe, part, part, seed=0, device=torch.device("cpu"))
    task.norm = norm
    machine = Machine(torch.device("cpu"))
    return Trainer(
        recipe, "full-rank", task, seed=0, epochs=2, machine=machine, processes=processes_of()
    )


def _epoch(norm: str) -> str:
    try:
        _trainer(norm).train_epoch(0)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("norm", NORMS)
def test_buffers_of_a_share_are_refused_by_name(norm: str, processes: Pools) -> None:
    names = {"instance": "'1.running_mean', '1.running_var'", "own": "'1.seen'"}
    for text in processes(2)(_epoch, norm):
        assert text.startswith(f"after a step, {names[norm]} differ" if norm in names else "")
        assert bool(text) == (norm in names)


def _scored(done: int) -> tuple[float, float | None]:
    """An epoch that goes on after its last step, in more processes than began it."""
    trainer = _trainer("none")
    sums = {"learning_rate": 0.1, "losses": torch.tensor(2.0), "scores": torch.tensor(1.0)}
    trainer._go_on_apart([{"sums": sums}])
    trainer.done = done
    result = trainer.train_epoch(0)
    return result.train_loss, result.train_score


def test_a_process_that_comes_after_the_last_step_loses_no_score(processes: Pools) -> None:
    assert processes(2)(_scored, 2) == [(1.0, 0.5), (1.0, 0.5)]
