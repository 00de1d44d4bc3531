"""A character GPT as in ``gpt_characters``, trained four times as long."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.language import Language, shakespeare


def _problem(data: Path) -> Language:
    text = shakespeare(data)
    return Language(*text, width=64, depth=2, steps=3200, rate=0.012, calibrated_on=8)


EXPERIMENT = Experiment(
    title="Character GPT, width 64, 2 blocks, tinyshakespeare, 3,200 steps, AdamW",
    label="character GPT, 3,200 steps",
    problem=_problem,
    metric="loss",
    higher=False,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.65),
        *arms.shorter(0.65),
        *arms.fixed_budgets(0.65),
        *arms.decays(0.65),
        *arms.paper()[1:],
    ],
    seeds=(0, 1, 2),
    tuning_length=0.5,
)
