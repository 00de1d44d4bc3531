"""Timing on a shared machine: interleaved candidates, medians, process time."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["conditions", "interleaved", "keep_memory", "layer_step", "spread", "write"]


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each step ``rounds`` times, interleaved, after one warm-up round.

    Process time counts only the threads of this process. The order rotates from round to round,
    since the previous candidate affects memory and caches.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begun = time.process_time()
            steps[name]()
            if i:
                found[name].append(time.process_time() - begun)
    return found


def keep_memory() -> None:
    """Restart this program with an allocator that keeps freed memory, as jemalloc does.

    Otherwise the system maps and clears every large tensor each time, which costs as much for a
    product of few FLOPs as for one of many.
    """
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    if not wanted.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def layer_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """One forward and backward pass of a layer alone."""

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        y.backward(torch.ones_like(y))

    return step


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median": middle * 1e3, "low": low * 1e3, "high": high * 1e3, "n": len(seconds)}


def conditions(packages: Sequence[str] = ("peft", "tensorly-torch")) -> dict[str, Any]:
    """Hardware, versions (those of other packages, too), commit and load of this run."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "hardware": f"{cpu}, {torch.get_num_threads()} thread(s)",
        "load": Path("/proc/loadavg").read_text().split()[:2],
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("dynarank", "torch", *packages)}
        | {"python": platform.python_version()},
    }


def write(path: Path, rows: list[dict[str, Any]], **about: Any) -> None:
    """The rows with their conditions, see :func:`conditions`, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"conditions": conditions(**about), "rows": rows}
    path.write_text(json.dumps(found, indent=1) + "\n")
