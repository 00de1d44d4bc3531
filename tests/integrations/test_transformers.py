"""The Trainer trains as the plain loop does, and resumes as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from host_runs import ENDINGS, POSITIONS
from pretrained_models import MODELS
from trainer_runs import fit, plain_losses

Run = tuple[Path, list[float]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """An uninterrupted run of each kind, with checkpoints at all positions."""
    made: dict[tuple[str, str], Run] = {}

    def run(name: str, to: str) -> Run:
        if (name, to) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{to}")
            how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
            made[name, to] = folder, fit(MODELS[name](), folder, to, **how)
        return made[name, to]

    return run


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_plain_loop(name: str, to: str, runs: Any) -> None:
    assert runs(name, to)[1] == pytest.approx(plain_losses(MODELS[name](), to), abs=2e-6)


@pytest.mark.parametrize("step", POSITIONS)
@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_equals_the_uninterrupted_one(
    name: str, to: str, step: int, runs: Any, tmp_path: Path
) -> None:
    folder, whole = runs(name, to)
    again = fit(MODELS[name](5), tmp_path, to, resume=f"{folder}/checkpoint-{step}")
    assert again == whole
