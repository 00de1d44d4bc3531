"""The record of a run: plain data, and what of it is read."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.training.harness.arm import Setting

VERSION = 1

Run = dict[str, Any]

_KINDS: dict[str, type] = {
    "experiment": str, "arm": str, "seed": int, "part": str, "setting": dict, "result": dict,
    "steps": int, "points": list, "changes": list, "full_ranks": dict,
}  # fmt: skip
"""What every record has, and of which types."""
_ABOVE_0 = ("rate", "steps", "flops", "training_flops", "end_flops")
_COSTS = ("parameters_mean", "memory_peak", "cpu_seconds")


def check(run: Run, experiment: str, metric: str | None = None) -> None:
    """Check that a record has what is read of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type.
        ValueError: it is of another experiment, or a number cannot be that.
    """
    for name, kind in _KINDS.items():
        if not isinstance(run[name], kind) or isinstance(run[name], bool):
            raise TypeError(f"{name} is {run[name]!r}")
    if run["experiment"] != experiment or run["part"] not in ("valid", "test"):
        raise ValueError(f"experiment {run['experiment']!r}, part {run['part']!r}")
    _check_costs(run)
    _check_setting(run["setting"])
    for name, value in run["result"].items():
        _check_number(name, value)
    if run["result"] and metric is not None and metric not in run["result"]:
        raise KeyError(f"result: {metric}")


def _check_costs(run: Run) -> None:
    for name in (*_ABOVE_0, *_COSTS):
        _check_number(name, run[name], 0.0, name in _ABOVE_0)
    if run.get("full_rank_seconds") is not None:
        _check_number("full_rank_seconds", run["full_rank_seconds"], 0.0, True)


def _check_setting(setting: dict[str, Any]) -> None:
    if missing := {"rate", "start", "decay"} - setting.keys():
        raise KeyError(f"setting: {missing}")
    found = Setting(**setting)
    _check_number("setting: rate", found.rate, 0.0, True)
    _check_number("setting: coefficient", found.coefficient, 0.0)
    if wrong := [word for word in (found.start, found.decay) if not isinstance(word, str)]:
        raise TypeError(f"setting: {wrong[0]!r}")


def _check_number(name: str, value: Any, low: float = -math.inf, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}")
    if not math.isfinite(value) or value < low or (above and value == low):
        raise ValueError(f"{name} is {value!r}")


def number_of(text: str) -> float:
    """The finite number of this text."""
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def finite(value: Any) -> Any:
    """The plain data with None for what is not finite.

    Example:
        >>> finite({"loss": [1.0, float("inf")]})
        {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no number")
