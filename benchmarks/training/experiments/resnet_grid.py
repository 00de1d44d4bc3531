"""When to inflate and when to deflate (the paper's Figure 3): a ResNet-8 on Fashion-MNIST."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionResNet

EXPERIMENT = Experiment(
    title="ResNet-8 on Fashion-MNIST: inflate and deflate at these shares of the run",
    problem=FashionResNet,
    arms=[*arms.full_rank(), *arms.grid(of="out", inflate=(0.0, 0.37, 0.7))],
    seeds=(0, 1, 2),
)
