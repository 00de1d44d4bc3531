"""What `make demo` shows: at equal FLOPs, decay ends near full rank and fixed low rank does not."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from training import Silent

from dynarank.records import SummaryRecord
from dynarank.schedules import get_preset
from dynarank.train.loop import Machine
from dynarank.train.recipes import load_recipe
from dynarank.train.run import run_schedule
from dynarank.train.tasks import make_task

ROOT = Path(__file__).parents[2]
RECIPE = load_recipe("shifted-digits")
CPU = torch.device("cpu")


def command() -> list[str]:
    """The command of `make demo`, without where it is and where its runs go."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    line = next(one for one in text.splitlines() if "/dynarank compare" in one)
    return shlex.split(line.partition("$(BIN)/dynarank ")[2].partition(" --out ")[0])


def test_the_demo_compares_the_schedules_of_its_recipe_on_three_seeds() -> None:
    schedules = ",".join(RECIPE.schedules)
    assert command() == ["compare", RECIPE.name, "--schedules", schedules, "--seeds", "3"]
    assert schedules == "full-rank,low-rank,decay" and all(map(get_preset, RECIPE.schedules))
    assert " ".join(command()) in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_decay_ends_near_full_rank_and_fixed_low_rank_of_the_same_cost_does_not(
    tmp_path: Path,
) -> None:
    task = make_task(RECIPE, seed=0, device=CPU)

    def run(name: str) -> SummaryRecord:
        return run_schedule(
            RECIPE, name, task, tmp_path / name, Silent(), seed=0, epochs=RECIPE.epochs,
            machine=Machine(CPU), say=lambda text: None,
        )  # fmt: skip

    full, low, decay = map(run, RECIPE.schedules)
    assert low.relative_flops == pytest.approx(decay.relative_flops, rel=0.01)
    assert decay.relative_flops <= RECIPE.budget == 0.2
    assert low.test_score + 0.01 < decay.test_score  # in single runs 1 to 3 points
    assert full.test_score - 0.015 < decay.test_score
