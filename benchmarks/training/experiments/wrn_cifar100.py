"""WRN-16-4 on CIFAR-100, 12 epochs; hours on a CPU."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import Cifar100WRN

EXPERIMENT = Experiment(
    title="WRN-16-4, all of CIFAR-100 at 32 x 32, 12 epochs, SGD",
    label="WRN-16-4",
    problem=Cifar100WRN,
    arms=arms.at_one_rate(
        [
            *arms.full_rank(),
            *arms.fixed_ranks("out", shares=(1 / 2,)),
            *arms.fixed_budgets(0.65),
            *arms.decays(0.65),
            *arms.paper("out"),
        ],
    ),
    seeds=(0, 1, 2),
    tuning=(),
)
