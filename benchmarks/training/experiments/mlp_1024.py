"""An MLP of width 1024 on Fashion-MNIST."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionMLP

_PAPER = arms.paper()

EXPERIMENT = Experiment(
    title="MLP 784-1024-1024-1024-10, 20,000 images of Fashion-MNIST, 8 epochs, AdamW",
    label="MLP, width 1024",
    tuning=(100, 101),
    problem=partial(FashionMLP, width=1024, rate=0.001, calibrated_on=8),
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.2, 0.3),
        *arms.shorter(0.2, 0.3),
        *arms.fixed_ranks(shares=(1 / 16, 1 / 4)),
        *arms.fixed_budgets(0.2, 0.3),
        *arms.decays(0.2, 0.3),
        *arms.full_first(0.2, 0.3),
        *_PAPER,
        *arms.matched(_PAPER[1:]),
    ],
)
