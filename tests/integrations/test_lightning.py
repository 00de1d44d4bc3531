"""The callback in Lightning's trainer: each run is the plain loop's, loss by loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_runs import (
    ENDINGS,
    POSITIONS,
    STEPS,
    adamw,
    plain_losses,
)
from lightning_runs import (
    QUIET,
    Manual,
    Module,
    every_four,
    fit,
    two_optimizers,
)
from torch import Tensor

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in QUIET]


@pytest.fixture(scope="module", params=[(to, n) for to in ENDINGS for n in (1, 2)], ids=str)
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], Any]:
    """The checkpoints of a run, its losses, and what it was."""
    to, accumulate = request.param
    folder, module = tmp_path_factory.mktemp("run"), Module()
    fit(module, to, every_four(folder), accumulate=accumulate)
    return folder, module.losses, request.param


def test_losses_are_the_plain_loops(saved: Any) -> None:
    _, losses, (to, accumulate) = saved
    assert losses == plain_losses(to, accumulate=accumulate, model=Module())


@pytest.mark.parametrize("step", POSITIONS)
def test_a_run_goes_on_from_every_position_bit_by_bit(saved: Any, step: int) -> None:
    folder, losses, (to, accumulate) = saved
    module, path = Module(seed=9), folder / f"step={step}.ckpt"
    callback = fit(module, to, accumulate=accumulate, checkpoint=path)
    assert module.losses == losses[step * accumulate :]
    assert callback.ranks.last_step == STEPS


# --- steps


def clipped(model: Any) -> Any:
    def clip(optimizer: Any, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 0.1)

    optimizer = adamw(model)
    optimizer.register_step_pre_hook(clip)
    return [optimizer]


class InBf16(Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of torch.compile
@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("how", ["clipped", "bf16", "compiled", "max_steps", "manual"])
def test_whatever_the_trainer_does_losses_are_the_plain_loops(how: str, to: str) -> None:
    module, model, options, optimizers = Module(), Module(), dict[str, Any](), None
    given: Any = module
    if how == "clipped":
        options, optimizers = {"gradient_clip_val": 0.1}, clipped
    elif how == "bf16":
        options, model = {"precision": "bf16-mixed"}, InBf16()
    elif how == "compiled":
        given = torch.compile(module, backend="eager")
    elif how == "max_steps":
        options = {"max_epochs": -1, "max_steps": STEPS}
    else:
        module = given = Manual()
        options = {"max_epochs": -1, "max_steps": 2 * STEPS}  # it counts those of both
        optimizers = lambda model: two_optimizers(model.net)  # noqa: E731
    callback = fit(given, to, **options)
    assert callback.ranks.total_steps == STEPS
    assert module.losses == plain_losses(to, model=model, optimizers=optimizers)
