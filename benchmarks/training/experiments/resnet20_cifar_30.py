"""A ResNet-20 as in ``resnet20_cifar``, for 30 epochs; 40 to 49 CPU minutes a run."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import CifarResNetAsPublished

_PAPER = arms.paper("out")

EXPERIMENT = Experiment(
    title="ResNet-20, 48,000 images of CIFAR-10 at 32 x 32, 30 epochs, SGD",
    label="ResNet-20, 30 epochs",
    problem=partial(CifarResNetAsPublished, blocks=3, images=48_000, size=32, epochs=30),
    arms=[
        *arms.full_rank(),
        *_PAPER,
        *arms.narrow(0.65),
        *arms.matched(_PAPER[-1:]),
    ],
    seeds=(0, 1, 2),
    tuning_length=1 / 30,
    points=6,
)
