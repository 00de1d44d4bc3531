"""When to inflate and when to deflate (the paper's Figure 3): an MLP on Fashion-MNIST."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionMLP

EXPERIMENT = Experiment(
    title="MLP of width 256 on Fashion-MNIST: inflate and deflate at these shares of the run",
    problem=FashionMLP,
    arms=[*arms.full_rank(), *arms.grid()],
    seeds=(0, 1, 2),
)
