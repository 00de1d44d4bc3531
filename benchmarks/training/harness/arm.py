"""What an arm is: a way to train the network of a problem, and what of it is tuned."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from benchmarks.training.harness.source import source
from dynarank.schedules import schedule_to_data
from dynarank.schedules.base import RankSchedule


@dataclass(frozen=True)
class Setting:
    """What is chosen for an arm before its results count.

    Args:
        rate: multiplies the problem's learning rate.
        start: how low rank starts: by the "truncated" draw, or that scaled to its "norm".
        decay: what weight decay pulls on in low-rank layers: the "factors" or their "product".
        coefficient: of the orthogonality penalty.
    """

    rate: float = 1.0
    start: str = "truncated"
    decay: str = "factors"
    coefficient: float = 0.0


@dataclass(frozen=True)
class Arm:
    """A named way to train.

    Args:
        name: unique in its experiment.
        schedule: the rank schedule; None: no layer changes form.
        rates: the factors of the problem's rate that are tried; if the best is at an end, more.
        starts: the ways to start low rank that are tried, at the best rate.
        decays: the ways to decay that are tried, at the best rate.
        family: arms of one family share what is tuned, on the first of them in the experiment;
            none: the arm is tuned by itself.
        spends: fixed low rank that costs as much as this arm did on average.
        narrow: a narrower full-rank network that costs this share of the FLOPs.
        length: trains for this share of the problem's steps; its learning rate ends with them.
        penalty: an orthogonality penalty, "soft" or "srip".
        coefficients: those of the penalty that are tried, at the best rate for the first of them.
        by_data: whether truncations are activation-aware, on a few training batches; budgets are
            always met by data.
        batches: how many batches a calibration takes; None: as many as the problem's.
        moments: how the optimizer's moments follow a change.
        rewarmup: how many steps the learning rate is warmed up after a change.
        optimizer: ``(problem, model, rate) -> optimizer``, in place of the problem's.
        prepare: ``(model, problem, seed) -> model``, done before the run.
    """

    name: str
    schedule: RankSchedule | None
    rates: Sequence[float] = (0.5, 1.0, 2.0)
    starts: Sequence[str] = ("truncated",)
    decays: Sequence[str] = ("factors",)
    family: str | None = None
    spends: str | None = None
    narrow: float | None = None
    length: float = 1.0
    penalty: str | None = None
    coefficients: Sequence[float] = (0.0,)
    by_data: bool = True
    batches: int | None = None
    moments: Any = "project"
    rewarmup: int = 0
    optimizer: Callable[[Any, nn.Module, float], Optimizer] | None = None
    prepare: Callable[[nn.Module, Any, int], nn.Module] | None = None

    @property
    def kind(self) -> str:
        """Arms of one kind share what is tuned."""
        return self.family or self.name

    @cached_property
    def options(self) -> dict[str, Any]:
        """What a record says of the arm beside its setting."""
        own = source(self.optimizer, self.prepare)
        return {
            "schedule": schedule_data(self.schedule), "length": self.length,
            "moments": str(self.moments), "rewarmup": self.rewarmup, "penalty": self.penalty,
            "by_data": self.by_data, "batches": self.batches, "narrow": self.narrow,
            "optimizer": named(self.optimizer), "prepare": named(self.prepare),
            **({"source": own} if own else {}),
        }  # fmt: skip

    def made(self, run: Mapping[str, Any]) -> bool:
        """Whether a run is of this arm as it is now, as far as the record says."""
        return run["arm"] == self.name and not self.changed(run)

    def changed(self, run: Mapping[str, Any]) -> list[str]:
        """The options in which a run of what had this name differs from this arm."""
        return [name for name, now in self.options.items() if run.get(name, now) != now]


def schedule_data(schedule: RankSchedule | None) -> Any:
    """A schedule as it is in a record."""
    return None if schedule is None else json.loads(json.dumps(schedule_to_data(schedule)))


def named(function: Callable[..., Any] | None) -> str | None:
    """A function by its name and the plain values that it has got.

    Example:
        >>> named(partial(int, base=2))
        'int(base=2)'
    """
    if function is None:
        return None
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{named(function.func)}({', '.join(given)})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if not inspect.isfunction(function):
        return name
    held = inspect.getclosurevars(function).nonlocals
    values = [
        f"{k}={v!r}" for k, v in sorted(held.items()) if isinstance(v, bool | int | float | str)
    ]
    return f"{name}({', '.join(values)})" if values else name
