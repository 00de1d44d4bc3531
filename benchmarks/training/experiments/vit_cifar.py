"""A small ViT on CIFAR-10 at 16 x 16: linear layers in vision."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import CifarViT

_PAPER = arms.paper()

EXPERIMENT = Experiment(
    title="ViT, width 96, 4 blocks, 10,000 images of CIFAR-10 at 16 x 16, 12 epochs, AdamW",
    label="ViT",
    problem=CifarViT,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *_PAPER,
        *arms.matched(_PAPER[-1:]),
    ],
    tuning=(100, 101),
    tuning_length=0.5,
)
