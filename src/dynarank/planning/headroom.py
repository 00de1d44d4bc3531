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

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dynarank.allocation.within_budget import plan_within
from dynarank.cost.flops import ModelUse, trace
from dynarank.decompositions import UnfitWeightError
from dynarank.forms import FullRank, LowRank, Plan, RankLike
from dynarank.layers.running import call_model, preserve_state
from dynarank.monitors.calibration import calibrate
from dynarank.planning.headroom_result import Arm, Headroom, RankHeadroom
from dynarank.scheduler.batch_norm import recalibrate_batch_norms
from dynarank.surgery.selection import LayerFilter, rank_for, select
from dynarank.surgery.sites import survey
from dynarank.surgery.verbs import apply_plan

__all__ = ["headroom", "runs"]

RATES = (1 / 3, 1.0, 3.0)
"""Multiples of the optimizer's learning rate that are tried."""
CUT_AT = 1 / 3
"""The share of the run after which the third arm is cut."""
WARMUP = 1 / 5
"""The share of the run over which the learning rate rises; then it falls to zero, as a cosine."""
LEAST_STEPS = 10
HELD_OUT = 8  # batches, at most a quarter of those there are
CALIBRATION = 4  # batches

_Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
_Optimizer: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]


def headroom(
    make_model: Callable[[], nn.Module],
    loader: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    loss: _Loss | None = None,
    optimizer: _Optimizer | None = None,
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
    _check(make_model, asked, steps, seeds)
    train, held_out = _batches(loader, steps, evaluate)
    how = loss or _default_loss, optimizer or _default_optimizer
    probe = _Probe(make_model, *how, train, held_out, steps)
    count = itertools.count(1)
    with preserve_state(nn.Module(), grad=True), torch.random.fork_rng(_devices()):
        model = probe.check()
        probe.use = trace(model, train[0] if sample is None else sample)
        targets = [_target(model, probe.use, rank, layers, decomposition) for rank in asked]
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


@dataclass(frozen=True)
class _Target:
    """A rank: the plan of low rank from scratch, and its training FLOPs."""

    rank: RankLike
    plan: Plan
    decomposition: str
    flops: int
    cost: float


@dataclass
class _Run:
    """A model in training, its optimizer, and the learning rates that this was made with."""

    model: nn.Module
    optimizer: Optimizer
    rates: list[float]
    seed: int
    factor: float
    diverged: bool = False


_Kind: TypeAlias = Literal["full", "low", "cut"]
_Arm: TypeAlias = tuple[_Kind, _Target | None]


@dataclass
class _Probe:
    """The task, and the runs on it."""

    make_model: Callable[[], nn.Module]
    loss: _Loss
    make_optimizer: _Optimizer
    train: list[Any]
    held_out: list[Any]
    steps: int
    use: ModelUse | None = None

    def losses(self, arm: _Arm, seed: int, factor: float) -> Tensor:
        """Train one arm; its held-out losses, which are infinite if it diverged."""
        kind, target = arm
        run = self.start(seed, factor)
        if kind == "low" and target:
            apply_plan(run.model, target.plan, optimizer=run.optimizer)
        at = max(1, round(CUT_AT * self.steps))
        self.advance(run, 0, at)
        if kind == "cut" and target:
            self.cut(run, target)
        self.advance(run, at, self.steps)
        return self.measure(run)

    def start(self, seed: int, factor: float) -> _Run:
        """A new model and its optimizer."""
        torch.manual_seed(seed)
        model = self.make_model()
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"make_model must return a module, got {type(model).__name__}")
        made = self.make_optimizer([p for p in model.parameters() if p.requires_grad])
        rates = [float(group["lr"]) for group in made.param_groups]
        return _Run(model.train(), made, rates, seed, factor)

    def advance(self, run: _Run, start: int, stop: int) -> None:
        """Train; each step has the same batch and random draws in all arms of a seed."""
        order = _order(len(self.train), self.steps, run.seed)
        for step in range(start, stop):
            if run.diverged:
                return
            torch.manual_seed(1_000_003 * (run.seed + 1) + step)
            for group, rate in zip(run.optimizer.param_groups, run.rates, strict=True):
                _set_rate(group, rate * run.factor * _shape(step, self.steps))
            value = self.loss(run.model, _own(self.train[order[step]]))
            value.backward()
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.diverged = not math.isfinite(value.item())

    def cut(self, run: _Run, target: _Target) -> None:
        """Cut to the cost of the target, by the data."""
        if run.diverged:
            return
        some = [_own(batch) for batch in self.train[:CALIBRATION]]
        paths = list(target.plan)
        try:
            known = calibrate(run.model, some, layers=paths, forward=self.loss)
            plan = plan_within(
                run.model,
                flops=target.flops,
                calibration=known,
                multiple_of=1,
                layers=paths,
                decomposition=target.decomposition,
                use=self.use,
            )
            apply_plan(run.model, plan, optimizer=run.optimizer, calibration=known)
            recalibrate_batch_norms(run.model, some, forward=self.loss)
        except UnfitWeightError:  # it diverges, though its last loss was finite
            run.diverged = True

    def measure(self, run: _Run) -> Tensor:
        """The held-out losses; infinite if the run diverged."""
        diverged = torch.full((len(self.held_out),), math.inf)
        if run.diverged:
            return diverged
        with preserve_state(run.model, training=False, grad=False):
            found = torch.tensor([float(self.loss(run.model, _own(b))) for b in self.held_out])
        return found if found.isfinite().all() else diverged

    def check(self) -> nn.Module:
        """A new model, whose loss and optimizer are good for training."""
        model = self.start(0, 1.0).model
        if self.make_model() is model:
            raise ValueError(
                "make_model returned the same model twice; it must build a new one at each call, "
                "such as lambda: copy.deepcopy(model)"
            )
        _check_loss(self.loss(model, _own(self.train[0])))
        return model


def _target(
    model: nn.Module, use: ModelUse, rank: RankLike, layers: LayerFilter, decomposition: str
) -> _Target:
    sites = select(survey(model), layers, rank, decomposition)
    if ranked := [site.path for site in sites if not isinstance(site.form, FullRank)]:
        raise ValueError(f"make_model must return a full-rank model; {ranked[0]!r} has factors")
    plan = {site.path: LowRank(rank_for(rank, site), decomposition) for site in sites}
    full, flops = use.flops({}).training, use.flops(plan).training
    if flops >= full:
        raise ValueError(
            f"rank {rank} takes {flops:,} FLOPs a step and full rank {full:,}, so there is nothing "
            "to gain; give a lower rank or other layers"
        )
    return _Target(rank, plan, decomposition, flops, flops / full)


def _compare(
    probe: _Probe, targets: Sequence[_Target], seeds: int, done: Callable[[], None]
) -> Headroom:
    """Run each arm with the first seed at all learning rates, with the others at its best one."""

    def measured(kind: _Kind, target: _Target | None = None) -> Arm:
        def losses(seed: int, factor: float) -> Tensor:
            found = probe.losses((kind, target), seed, factor)
            done()
            return found

        first = {factor: losses(0, factor) for factor in RATES}
        best = min(first, key=lambda factor: first[factor].mean().item())
        others = [losses(seed, best) for seed in range(1, seeds)]
        return Arm(torch.stack([first[best], *others]), best)

    full = measured("full")
    if not math.isfinite(full.loss):
        raise FloatingPointError(
            f"full rank diverged within {probe.steps} steps, even at {min(RATES):.2g} times the "
            "optimizer's learning rate; lower it"
        )
    found = [
        RankHeadroom(one.rank, one.cost, full, measured("low", one), measured("cut", one))
        for one in targets
    ]
    return Headroom(tuple(found), probe.steps)


def _shape(step: int, steps: int) -> float:
    """The learning rate of a step, as a multiple of the peak: warm-up, then a cosine to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """The batch of each step: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps // batches)
    every = [torch.randperm(batches, generator=generator) for _ in range(epochs)]
    return torch.cat(every)[:steps].tolist()


def _batches(
    loader: Iterable[Any] | Callable[[], Iterable[Any]], steps: int, evaluate: Iterable[Any] | None
) -> tuple[list[Any], list[Any]]:
    """The batches to train on, and those to compare on, which no run trains on."""
    source = loader if isinstance(loader, Iterable) else loader()
    if evaluate is not None:
        train, held_out = list(islice(source, steps)), list(evaluate)
    else:
        every = list(islice(source, steps + HELD_OUT))
        count = min(HELD_OUT, max(1, len(every) // 4))
        apart = {round(i * len(every) / count) for i in range(count)}  # evenly, if they are sorted
        train = [batch for i, batch in enumerate(every) if i not in apart]
        held_out = [every[i] for i in sorted(apart)] if every else []
    if not train or not held_out:
        raise ValueError(
            f"the loader has {len(train)} batches to train on and there are {len(held_out)} to "
            "compare losses on; both must be at least 1. An iterator that has ended has none"
        )
    return train, held_out


def _own(batch: Any) -> Any:
    """A copy of a dict, so that a loss that takes the labels out of it can do so again."""
    return copy.copy(cast(Any, batch)) if isinstance(batch, MutableMapping) else batch


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    output = call_model(model, batch)
    if isinstance(batch, Mapping):
        found = getattr(output, "loss", None)
        if isinstance(found, Tensor):
            return found
    elif isinstance(output, Tensor) and isinstance(batch, tuple | list) and len(batch) == 2:
        target = cast(Any, batch[1])
        if isinstance(target, Tensor) and not target.is_floating_point():
            if output.shape[:-1] == target.shape:
                return F.cross_entropy(output.flatten(0, -2), target.flatten())
            return F.cross_entropy(output, target)
    raise ValueError(
        "by default the loss is the cross-entropy of batches (inputs, integer targets), or the "
        "loss of the model's output if batches are dicts; give loss=, a function (model, batch) "
        "-> scalar"
    )


def _devices() -> list[int]:
    """The GPUs whose random states are in use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"loss(model, batch) must return a scalar tensor, got {shown}")
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: it does not depend on trainable parameters")
    if not math.isfinite(value.item()):
        raise ValueError(f"the loss of the first batch is {value.item()}, before any training")


def _check(make_model: object, ranks: Sequence[RankLike], steps: int, seeds: int) -> None:
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(
            "make_model is a function that returns a new model, such as lambda: "
            f"copy.deepcopy(model); got {type(make_model).__name__}"
        )
    if not ranks:
        raise ValueError("give at least one rank to probe, got none")
    for name, value, least in (("steps", steps, LEAST_STEPS), ("seeds", seeds, 1)):
        if isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is a whole number >= {least}, got {value!r}")
