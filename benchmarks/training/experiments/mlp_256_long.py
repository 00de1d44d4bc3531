"""An MLP as in ``mlp_256``, trained four times as long."""

from functools import partial

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionMLP

EXPERIMENT = Experiment(
    title="MLP 784-256-256-256-10, 20,000 images of Fashion-MNIST, 32 epochs, AdamW",
    label="MLP, width 256, 32 epochs",
    problem=partial(FashionMLP, epochs=32),
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.3, 0.5),
        *arms.shorter(0.3, 0.5),
        *arms.fixed_budgets(0.3, 0.5),
        *arms.decays(0.3, 0.5),
        *arms.paper()[1:],
    ],
    tuning=(100, 101),
    tuning_length=0.5,
)
