"""A small BERT from scratch on MRPC."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.sentences import MRPC

_PAPER = arms.paper()

EXPERIMENT = Experiment(
    title="BERT from scratch, MRPC, two epochs, AdamW",
    label="BERT, MRPC",
    problem=MRPC,
    note="Two thirds of the answers are yes; always saying so is nearly as good as any arm.",
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *arms.on_few(arms.decays(0.5, 0.65)),
        *_PAPER,
        *arms.matched(_PAPER[-1:]),
    ],
    tuning=(100, 101),
)
