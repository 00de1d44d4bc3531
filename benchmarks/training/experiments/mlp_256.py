"""An MLP of width 256 on Fashion-MNIST: every arm there is, since a run takes seconds."""

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.images import FashionMLP
from dynarank.forms import Rank

_DECAYS = arms.decays(0.3, 0.5, 0.65)
_PAPER = arms.paper()
_RELATED = arms.related(Rank(1 / 4, of="min"), every=40)

EXPERIMENT = Experiment(
    title="MLP 784-256-256-256-10, 20,000 images of Fashion-MNIST, 8 epochs, AdamW",
    label="MLP, width 256",
    problem=FashionMLP,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.3, 0.5, 0.65),
        *arms.shorter(0.3, 0.5, 0.65),
        *arms.fixed_ranks(shares=(1 / 4, 1 / 16, 1 / 3, 1 / 2)),
        *arms.fixed_budgets(0.3, 0.5, 0.65),
        *_DECAYS,
        *arms.on_few(_DECAYS),
        *arms.full_first(0.3, 0.5),
        *_PAPER,
        *arms.orthogonal(_PAPER),
        *_RELATED,
        *arms.matched([*_PAPER, *_RELATED]),
    ],
    tuning=(100, 101, 102, 103),
)
