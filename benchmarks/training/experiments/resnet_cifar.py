"""A ResNet-14 on CIFAR-10 at 16 x 16."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import CifarResNet

_PAPER = arms.paper("out")

EXPERIMENT = Experiment(
    title="ResNet-14, 10,000 images of CIFAR-10 at 16 x 16, 12 epochs, SGD",
    label="ResNet-14",
    problem=CifarResNet,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *_PAPER,
        *arms.matched(_PAPER[-1:]),
    ],
    values=True,
    tuning_length=0.5,
)
