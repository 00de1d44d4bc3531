"""A small BERT from scratch on SST-2."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.sentences import SST2

_PAPER = arms.paper()

EXPERIMENT = Experiment(
    title="BERT from scratch, 24,000 sentences of SST-2, one epoch, AdamW",
    label="BERT, SST-2",
    problem=SST2,
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
    tuning_length=0.5,
)
