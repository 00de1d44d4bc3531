"""ResNet-20 on all of CIFAR-10, 30 epochs, with the paper's schedule scaled; hours on a CPU."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import CifarResNet

EXPERIMENT = Experiment(
    title="ResNet-20, all of CIFAR-10 at 32 x 32, 30 epochs, SGD",
    label="ResNet-20",
    problem=partial(CifarResNet, blocks=3, images=50_000, size=32, epochs=30),
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
