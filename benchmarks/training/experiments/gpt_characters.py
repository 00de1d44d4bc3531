"""A character GPT of width 64 on tinyshakespeare: every arm for matrices."""

from pathlib import Path

from benchmarks.training.harness import arms
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.harness.peers import peers
from benchmarks.training.problems.language import Language, shakespeare
from dynarank.forms import Rank

_PAPER = arms.paper()


def _problem(data: Path) -> Language:
    return Language(*shakespeare(data), width=64, depth=2, steps=800, rate=0.012)


EXPERIMENT = Experiment(
    title="Character GPT, width 64, 2 blocks, tinyshakespeare, 800 steps, AdamW",
    label="character GPT",
    problem=_problem,
    metric="loss",
    higher=False,
    values=True,
    arms=[
        *arms.full_rank(),
        *arms.narrow(0.5, 0.65),
        *arms.shorter(0.5, 0.65),
        *arms.fixed_ranks(),
        *arms.fixed_budgets(0.5, 0.65),
        *arms.decays(0.45, 0.5, 0.65),
        *arms.on_few(arms.decays(0.45, 0.5, 0.65)),
        *arms.full_first(0.5),
        *_PAPER,
        *arms.related(Rank(1 / 4, of="min"), every=25),
        *arms.matched(_PAPER),
        *peers(),
    ],
    tuning=(100, 101),
)
