"""What a run was of: its problem, with settings, network and data, as a record says it.

An experiment can be edited after some of its runs. Runs of what it was before are other runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.training.harness.identity import digest
from benchmarks.training.harness.narrow import flops
from benchmarks.training.harness.record import Run, finite
from benchmarks.training.harness.source import source
from benchmarks.training.harness.spectra import digits
from benchmarks.training.problems.problem import Problem

_ALIKE = 1e-6
"""What equal sums may differ by, relative. With kernels of AVX-512, of AVX2 and of neither they
differ by 5e-8 at most (six problems, AMD EPYC, torch 2.13.0, 2026-11-30)."""
_LONG = 1000
"""The characters of a setting of which a record has the digest."""


def defined(problem: Problem) -> dict[str, Any]:
    """The settings of a problem, sums over its network and some of its data, and its own source.

    Settings are its public attributes that are numbers, words or lists of these, but for paths.
    What the methods of ``problems`` do is not in it: a record has a digest of them beside it.
    """
    own = source(problem)
    with torch.random.fork_rng(devices=[]):
        found = {
            "class": type(problem).__name__,
            **{name: _short(value) for name, value in _attributes(problem) if _plain(value)},
            "flops": flops(problem),
            "network": _sum(problem.model(0).parameters()),
            "data": [_sum(_tensors(batch)) for batch in _batches(problem)],
            **({"source": own} if own else {}),
        }
    return finite(found)  # as it is in a record


def _attributes(problem: Problem) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(problem, name)) for name in dir(problem) if not name.startswith("_"))


def _plain(value: Any) -> bool:
    if isinstance(value, str) and Path(value).is_absolute():  # of this machine
        return False
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _short(value: Any) -> Any:
    """A setting, or the digest of a long one, such as labels."""
    text = json.dumps(value)
    return value if len(text) < _LONG else digest(text.encode())


def _batches(problem: Problem) -> Iterator[Any]:
    """The first batch to train on, and the first of each part to test on."""
    yield problem.batch(0, 0)
    yield next(iter(problem.held_out("valid")))
    yield next(iter(problem.held_out("test")))


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, Mapping):
        yield from (found for one in nested.values() for found in _tensors(one))
    elif isinstance(nested, Sequence):
        yield from (found for one in nested for found in _tensors(one))


def _sum(tensors: Any) -> list[float]:
    """The number of entries, and the sum of their sizes, weighted by place."""
    count, total = 0, 0.0
    for tensor in tensors:
        values = tensor.detach().double().abs().flatten()
        places = torch.arange(count, count + len(values), dtype=torch.float64)
        total += (values * (2 + places.cos())).sum().item()
        count += len(values)
    return [count, digits(total, 8)]


def is_of(run: Run, problem: Mapping[str, Any]) -> bool:
    """Whether a run is of this problem, as :func:`defined` gives it.

    Of records that do not have it: as far as rate, steps, precision and FLOPs say.
    """
    if "problem" in run:
        return _alike(run["problem"], problem)
    precision = "bf16 autocast" if problem["bf16"] else "fp32"
    return (
        math.isclose(run["rate"], run["setting"]["rate"] * problem["rate"])
        and ("length" not in run or run["steps"] == round(run["length"] * problem["steps"]))
        and run.get("precision", precision) == precision
        and math.isclose(run["training_flops"], run["flops"] * problem["flops"] * problem["steps"])
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two nested plain values are equal, numbers up to rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=_ALIKE)
    return one == other


def of_one_problem(runs: Sequence[Run], problem: Mapping[str, Any] | None = None) -> list[Run]:
    """The runs that are of this problem; None: of that of the last run that says it."""
    if problem is None:
        problem = next((run["problem"] for run in reversed(runs) if "problem" in run), None)
    return [run for run in runs if problem is None or is_of(run, problem)]


def changed(runs: Sequence[Run], problem: Mapping[str, Any]) -> list[str]:
    """The settings in which runs that say theirs differ from this problem."""
    others = [run["problem"] for run in runs if "problem" in run]
    names = dict.fromkeys(name for one in (problem, *others) for name in one)
    return [n for n in names if any(not _alike(one.get(n), problem.get(n)) for one in others)]
