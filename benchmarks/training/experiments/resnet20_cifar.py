"""A ResNet-20 on all of CIFAR-10 but 2,000 images, which tune; 11 to 13 CPU minutes a run."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import CifarResNet

_PAPER = arms.paper("out")[-1:]

EXPERIMENT = Experiment(
    title="ResNet-20, 48,000 images of CIFAR-10 at 32 x 32, 7 epochs, SGD",
    label="ResNet-20",
    problem=partial(CifarResNet, blocks=3, images=48_000, size=32, epochs=7),
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.65),
        *arms.fixed_budgets(0.65),
        *arms.decays(0.65),
        *_PAPER,
        *arms.matched(_PAPER),
    ],
    seeds=(0, 1, 2),
    tuning_length=0.125,
    points=4,
)
