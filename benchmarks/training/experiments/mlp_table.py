"""An MLP on a table of scikit-learn's own."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.problems.tabular import Table
from dynarank.forms import Rank

_PAPER = arms.paper()
_RELATED = arms.related(Rank(1 / 4, of="min"), every=20)


def _problem(_: Path) -> Table:
    return Table()


EXPERIMENT = Experiment(
    title="MLP 64-64-64-64-10, the digits of scikit-learn as a table, 60 epochs, AdamW",
    label="MLP, a table",
    problem=_problem,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_ranks(),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.5, 0.65),
        *arms.on_few(arms.decays(0.5, 0.65)),
        *arms.full_first(0.5),
        *_PAPER,
        *_RELATED,
        *arms.matched(_PAPER),
    ],
    tuning=(100, 101, 102, 103),
)
