"""A byte GPT of width 128 on books."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.language import Language, books

_PAPER = arms.paper()


def _problem(data: Path) -> Language:
    return Language(
        *books(data), width=128, depth=3, steps=600, rate=0.002, bf16=True, calibrated_on=8
    )


EXPERIMENT = Experiment(
    title="Byte GPT, width 128, 3 blocks, books, 600 steps, AdamW",
    label="byte GPT, width 128",
    problem=_problem,
    metric="loss",
    higher=False,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *_PAPER,
        *arms.matched(_PAPER[-1:]),
    ],
    tuning=(100, 101),  # the losses of shorter runs jump: one seed chose rates that fail on others
)
