"""The record of a run: plain data, and what of it is read."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.training.harness.arm import Setting

VERSION = 1

Run = dict[str, Any]

_KINDS: dict[str, type | tuple[type, ...]] = {
    "experiment": str, "arm": str, "seed": int, "part": str, "setting": dict, "result": dict,
    "rate": (int, float), "steps": int, "flops": (int, float), "training_flops": (int, float),
    "end_flops": (int, float), "parameters_mean": (int, float), "memory_peak": (int, float),
    "cpu_seconds": (int, float), "points": list, "changes": list, "full_ranks": dict,
}  # fmt: skip
"""What every record has, and of which types."""


def check(run: Run, experiment: str) -> None:
    """Check that a record has what is read of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type.
        ValueError: it is of another experiment, or a result is no number.
    """
    for name, kinds in _KINDS.items():
        if not isinstance(run[name], kinds) or isinstance(run[name], bool):
            raise TypeError(f"{name} is {run[name]!r}")
    if run["experiment"] != experiment or run["part"] not in ("valid", "test"):
        raise ValueError(f"experiment {run['experiment']!r}, part {run['part']!r}")
    if missing := {"rate", "start", "decay"} - run["setting"].keys():
        raise KeyError(f"setting: {missing}")
    Setting(**run["setting"])
    if wrong := [v for v in run["result"].values() if not isinstance(v, int | float)]:
        raise TypeError(f"result {wrong[0]!r}")


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
