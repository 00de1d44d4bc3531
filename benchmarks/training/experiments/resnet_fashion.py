"""A ResNet-8 on Fashion-MNIST: the paper's schedule in three decompositions."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionResNet

_PAPER = arms.paper("out", ("svd", "tucker", "separable"))

EXPERIMENT = Experiment(
    title="ResNet-8, 10,000 images of Fashion-MNIST at 14 x 14, 8 epochs, SGD",
    label="ResNet-8",
    problem=FashionResNet,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_ranks("out"),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *arms.on_few(arms.decays(0.5, 0.65)),
        *arms.full_first(0.5),
        *_PAPER,
        *arms.orthogonal(_PAPER),
        *arms.convolutional(every=39),
        *arms.matched(_PAPER),
    ],
    note="The paper's CP is called separable here: it is what the published code calls CP.",
    tuning=(100, 101),
)
