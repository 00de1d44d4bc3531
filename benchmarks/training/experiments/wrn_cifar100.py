"""WRN-16-4 on CIFAR-100 at 16 x 16; 12 to 16 CPU minutes a run, at 32 x 32 four times as many."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import Cifar100WRN

_PAPER = arms.paper("out")[-1:]

EXPERIMENT = Experiment(
    title="WRN-16-4, 48,000 images of CIFAR-100 at 16 x 16, 6 epochs, SGD",
    label="WRN-16-4",
    problem=partial(Cifar100WRN, size=16, epochs=6),
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.65),
        *arms.fixed_budgets(0.65),
        *arms.decays(0.65),
        *_PAPER,
        *arms.matched(_PAPER),
    ],
    seeds=(0, 1, 2),
    tuning_length=0.15,
    points=4,
)
