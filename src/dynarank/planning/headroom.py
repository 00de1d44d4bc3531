"""The headroom probe: a few short runs that say whether a rank schedule has anything to gain.

Low rank from scratch may end above full rank for two reasons. Either the factors train worse, which
a schedule that starts at full rank avoids; or so few parameters cannot represent the function,
which no schedule changes. The probe trains three arms on the same batches and initial weights: full
rank, low rank from scratch, and full rank first, then cut to the cost of low rank. It reports::

    headroom = (L_low - L_cut) / (L_low - L_full)

with held-out losses L. Low rank often wants a higher learning rate than full rank: each arm counts
at the best of three, which are found with the first seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.cost.flops import trace
from dynarank.forms import RankLike
from dynarank.layers.running import preserve_state
from dynarank.planning.headroom_input import (
    check_arguments,
    default_loss,
    default_optimizer,
    split,
)
from dynarank.planning.headroom_result import Arm, Headroom, RankHeadroom
from dynarank.planning.headroom_runs import Kind, Loss, OptimizerMaker, Probe, Target, find_target
from dynarank.surgery.selection import LayerFilter

__all__ = ["headroom", "runs"]

RATES = (1 / 3, 1.0, 3.0)
"""Multiples of the optimizer's learning rate that are tried."""


def headroom(
    make_model: Callable[[], nn.Module],
    loader: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    loss: Loss | None = None,
    optimizer: OptimizerMaker | None = None,
    ranks: RankLike | Sequence[RankLike] = (1 / 8, 1 / 4, 1 / 2),
    steps: int = 250,
    seeds: int = 2,
    evaluate: Iterable[Any] | None = None,
    layers: LayerFilter = None,
    decomposition: str = "svd",
    sample: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Headroom:
    """Whether a rank schedule can gain on a task, and the rank that the task needs.

    Trains :func:`runs` short runs of ``steps``. Nothing of the caller's is changed: the models are
    new, and the state of the random generators is restored.

    Args:
        make_model: a function that returns a new full-rank model, on its device; it is called for
            every run, after ``torch.manual_seed``.
        loader: batches, or a function that returns them; ``steps`` and a few held-out ones are
            taken once, and repeated if there are fewer.
        loss: a function ``(model, batch) -> scalar``; None: the cross-entropy of batches ``(inputs,
            targets)``, or the ``loss`` of the model's output if batches are dicts.
        optimizer: a function from a list of parameters to their optimizer; None: AdamW at 1e-3.
        ranks: one rank or several, as :func:`dynarank.factorize` takes them.
        steps: the length of each run: the longer, the surer. A language model needs to be past
            its first plateau, where low rank is often ahead.
        seeds: the number of seeds, from which the error is estimated.
        evaluate: batches to compare the losses on; None: the held-out ones of the loader.
        layers: as for :func:`dynarank.factorize`.
        decomposition: the decomposition's name.
        sample: a batch's arguments of the forward pass, as :func:`dynarank.plan_within` takes
            them; None: the first batch.
        progress: called after each run with the number of runs done and of all.

    Raises:
        TypeError: ``make_model`` is not a function that returns models, or ``loss`` no scalar.
        ValueError: too few batches, no layer that can be cut, a rank that saves nothing, or a loss
            that is not finite before any training.
        FloatingPointError: full rank diverged at every learning rate.

    Example:
        >>> def make_model():
        ...     return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(12)]
        >>> found = headroom(make_model, batches, ranks=0.25, steps=10, layers="0")
        >>> found.verdict in ("headroom", "none", "no gap", "cannot tell")
        True
    """
    asked = tuple(cast(Any, ranks)) if isinstance(ranks, Sequence) else (ranks,)
    check_arguments(make_model, asked, steps, seeds)
    train, held_out = split(loader, steps, evaluate)
    how = loss or default_loss, optimizer or default_optimizer
    probe = Probe(make_model, *how, train, held_out, steps)
    count = itertools.count(1)
    with preserve_state(nn.Module(), grad=True), torch.random.fork_rng(_devices()):
        model = probe.check()
        probe.use = trace(model, train[0] if sample is None else sample)
        targets = [find_target(model, probe.use, rank, layers, decomposition) for rank in asked]
        targets.sort(key=lambda target: target.flops)
        total = runs(len(targets), seeds)
        return _compare(probe, targets, seeds, lambda: progress and progress(next(count), total))


def runs(ranks: int, seeds: int) -> int:
    """The number of runs of a probe.

    Example:
        >>> runs(ranks=1, seeds=2)
        12
    """
    return (len(RATES) + seeds - 1) * (1 + 2 * ranks)


def _compare(
    probe: Probe, targets: Sequence[Target], seeds: int, done: Callable[[], None]
) -> Headroom:
    """Run each arm with the first seed at all learning rates, with the others at its best one."""

    def measured(kind: Kind, target: Target | None = None) -> Arm:
        def losses(seed: int, factor: float) -> Tensor:
            found = probe.losses(kind, target, seed, factor)
            done()
            return found

        first = {factor: losses(0, factor) for factor in RATES}
        best = min(first, key=lambda factor: first[factor].mean().item())
        others = [losses(seed, best) for seed in range(1, seeds)]
        return Arm(torch.stack([first[best], *others]), best)

    full = measured("full")
    if not math.isfinite(full.loss):
        raise FloatingPointError(
            f"full rank diverged within {probe.steps} steps, at best at {full.rate:.2g} times the "
            "optimizer's learning rate; lower it"
        )
    found = [
        RankHeadroom(one.rank, one.cost, full, measured("low", one), measured("cut", one))
        for one in targets
    ]
    return Headroom(tuple(found), probe.steps)


def _devices() -> list[int]:
    """The GPUs whose random states are in use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
