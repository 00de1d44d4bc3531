"""A byte GPT of 10 million parameters on books; rates as the smaller GPTs chose."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.language import Language, books


def _problem(data: Path) -> Language:
    return Language(
        *books(data), width=384, depth=6, heads=6, context=256, batch_size=8, steps=600,
        rate=0.001, bf16=True,
    )  # fmt: skip


EXPERIMENT = Experiment(
    title="Byte GPT of 10 million parameters, width 384, 6 blocks, books, 600 steps, AdamW",
    problem=_problem,
    metric="loss",
    higher=False,
    arms=arms.at_one_rate(
        [
            *arms.full_rank(),
            *arms.fixed_ranks(shares=(1 / 4,)),
            *arms.fixed_budgets(0.5, 0.65),
            *arms.decays(0.5, 0.65),
            *arms.paper()[1:],
        ],
        {"full rank": 1.0, "fixed": 2.0, "decay": 1.0, "paper": 1.0},
    ),
    seeds=(0, 1, 2),
    tuning=(),
    note="Rates are not tuned here: fixed low rank has twice the rate of the others.",
)
