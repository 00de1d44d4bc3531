"""A byte GPT of width 128 on books."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.language import Language, books

_PAPER = arms.paper()


def _problem(data: Path) -> Language:
    sizes = {"width": 128, "depth": 3, "steps": 600}
    # Without clipping, losses jump (results/2026-11-30-byte-gpt-rates).
    return Language(*books(data), **sizes, rate=0.004, bf16=True, calibrated_on=8, max_norm=1.0)


EXPERIMENT = Experiment(
    title="Byte GPT, width 128, 3 blocks, books, 600 steps, AdamW, gradients clipped",
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
    tuning=(100, 101),
)
