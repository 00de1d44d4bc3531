"""What each layer's forms cost in seconds, on the user's device and for the user's shapes.

FLOPs say what a form must compute, not how fast a device does it: a small convolution's factors
can be slower than the convolution. Here every candidate runs: forward and backward pass of one
weight alone, the candidates in turn, the median of several rounds. Answers are kept in a file, by
device, library version, threads, precision, shape and form, so that asking again costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dynarank.cost.flops import ModelUse
from dynarank.cost.stopwatch import Cache, Setting, layer_seconds
from dynarank.forms import Adapted, Form, FullRank, LowRank, Plan
from dynarank.schedules import Mapped, Schedule

__all__ = [
    "Timings",
    "candidates",
    "default_cache",
    "layer_timer",
    "measure",
    "where_faster",
]


@dataclass(frozen=True)
class Timings:
    """Seconds of a training step of each weight, in each form and execution that was timed.

    Args:
        seconds: by path and form; forms with factors have an explicit execution.
        margin: how much faster than full-rank a form must be to be worth it, as a share: timings
            have noise, and a change of form has its price.
    """

    seconds: Mapping[str, Mapping[Form, float]]
    margin: float = 0.02

    def full_rank(self, path: str) -> float:
        """Seconds of the weight at full rank."""
        return self.seconds[path][FullRank()]

    def of(self, path: str, form: Form) -> float:
        """Seconds in a form; of its executions the fastest, if it leaves that open.

        Raises:
            KeyError: the form was not timed.
        """
        return self.seconds[path][self.fastest(path, form)]

    def fastest(self, path: str, form: Form) -> Form:
        """The form with the execution that was fastest."""
        timed = self.seconds[path]
        able = [one for one in candidates(form) if one in timed]
        if not able:
            raise KeyError(
                f"layer {path!r}: {form} was not timed; timed: {', '.join(map(str, timed))}"
            )
        return min(able, key=lambda one: timed[one])

    def is_faster(self, path: str, form: Form) -> bool:
        """Whether the form is faster than full rank, by the margin."""
        return self.of(path, form) < (1 - self.margin) * self.full_rank(path)

    def choose(self, path: str, form: Form) -> Form:
        """The fastest execution of a low-rank form, or full rank where that is not slower.

        An adapted form keeps its form, for it changes what trains: only its execution is chosen. A
        form that was not timed, such as one a schedule finds while it trains, stays as it is.
        """
        timed = self.seconds.get(path, {})
        if isinstance(form, FullRank) or not any(one in timed for one in candidates(form)):
            return form
        fastest = self.fastest(path, form)
        if isinstance(form, LowRank):
            return fastest if self.is_faster(path, form) else FullRank()
        assert isinstance(fastest, Adapted)
        return replace(fastest, restart=form.restart)


def candidates(form: Form) -> list[Form]:
    """The form with each execution it leaves open; a restart is as fast as another.

    Example:
        >>> candidates(LowRank(8))
        [LowRank(rank=8, decomposition='svd', execution='factored'), LowRank(rank=8, decomposition='svd', execution='joined')]
    """  # noqa: E501
    if isinstance(form, Adapted):
        form = replace(form, restart=0)
    if isinstance(form, FullRank) or form.execution != "auto":
        return [form]
    if isinstance(form, LowRank):
        return [replace(form, execution="factored"), replace(form, execution="joined")]
    return [replace(form, execution="merged"), replace(form, execution="two-branch")]


def measure(
    use: ModelUse,
    plans: Iterable[Plan],
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    rounds: int = 5,
    cache: Path | None = None,
    on_layer: Callable[[str], None] = lambda path: None,
) -> Timings:
    """Time every weight in every form that the plans give it, and at full rank.

    Args:
        use: how a batch runs through the model, from :func:`dynarank.cost.trace`.
        plans: the plans in question, such as those of a schedule's phases.
        device: where to run.
        autocast: the dtype of autocast, None for fp32 throughout.
        channels_last: whether convolutions run in that memory format.
        rounds: how often each candidate runs, after once to warm up.
        cache: a file of earlier answers, read and added to; None: none. See ``default_cache``.
        on_layer: called with each path before it is timed.

    Example:
        >>> from dynarank.cost.flops import trace
        >>> use = trace(nn.Sequential(nn.Linear(32, 32)), torch.ones(16, 32))
        >>> sorted(measure(use, [{"0": LowRank(4)}]).seconds["0"], key=str)[0]
        FullRank()
    """
    stored = Cache(cache)
    setting = Setting(torch.device(device), autocast, channels_last, rounds)
    wanted: dict[str, dict[Form, None]] = {}
    for plan in plans:
        for path, form in plan.items():
            forms = wanted.setdefault(path, {FullRank(): None})
            forms.update(dict.fromkeys(candidates(use.layers[path].spec.resolve(form))))
    seconds: dict[str, Mapping[Form, float]] = {}
    for path, forms in wanted.items():
        on_layer(path)
        seconds[path] = layer_seconds(use.layers[path], list(forms), setting, stored)
    stored.save()
    return Timings(seconds)


def layer_timer(
    use: ModelUse, device: torch.device | str = "cpu", *, channels_last: bool = False
) -> Callable[[str, Form], float]:
    """A function ``(path, form) -> seconds`` of a training step, each asked for measured once.

    Args:
        use: how a batch runs through the model.
        device: where to run.
        channels_last: whether convolutions run in that memory format.

    Example:
        >>> from dynarank.cost.flops import trace
        >>> use = trace(nn.Sequential(nn.Linear(8, 8)), torch.ones(2, 8))
        >>> layer_timer(use)("0", FullRank()) > 0
        True
    """
    setting, stored = Setting(torch.device(device), None, channels_last, 5), Cache(None)

    def seconds(path: str, form: Form) -> float:
        layer = use.layers[path]
        return min(
            layer_seconds(layer, candidates(layer.spec.resolve(form)), setting, stored).values()
        )

    return seconds


def where_faster(schedule: Schedule, timings: Timings) -> Mapped:
    """The schedule with its low-rank forms only where they were measured to be faster.

    Example:
        >>> from dynarank.schedules import Clock, Readings, low_rank
        >>> timings = Timings({"0": {FullRank(): 1.0, LowRank(4, execution="factored"): 2.0}})
        >>> faster = where_faster(low_rank(4), timings)
        >>> faster.update({}, Clock(0, 1), Readings({"0": (32, 32)})).plan
        {'0': FullRank()}
    """

    def faster(plan: Plan) -> Plan:
        return {path: timings.choose(path, form) for path, form in plan.items()}

    return Mapped(schedule, faster)


def default_cache() -> Path:
    """``timings.json`` under ``DYNARANK_CACHE``, or under the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DYNARANK_CACHE") or Path(home) / "dynarank") / "timings.json"
