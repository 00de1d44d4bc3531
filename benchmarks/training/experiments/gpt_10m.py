"""A byte GPT of 10 million parameters on books."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.language import Language, books

_PAPER = arms.paper()


def _problem(data: Path) -> Language:
    return Language(
        *books(data), width=384, depth=6, heads=6, context=256, batch_size=8, steps=400,
        rate=0.001, bf16=True,
    )  # fmt: skip


EXPERIMENT = Experiment(
    title="Byte GPT of 10 million parameters, width 384, 6 blocks, books, 400 steps, AdamW",
    label="GPT, 10M parameters",
    problem=_problem,
    metric="loss",
    higher=False,
    arms=[
        *arms.full_rank(),
        *arms.fixed_budgets(0.65),
        *arms.decays(0.65),
        *arms.on_few(arms.decays(0.65)),
        *arms.narrow(0.65),
        *_PAPER[-1:],
    ],
    seeds=(0, 1, 2),
    tuning_length=0.25,
)
