"""A problem of 40 steps, some arms, and experiments and trials of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dynarank as dr
from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.experiment import Experiment
from benchmarks.training.harness.trial import Trial
from benchmarks.training.problems.rows import Rows
from dynarank.schedules import decay, low_rank

FULL = Arm("full rank", None)
FIXED = Arm("fixed 1/4", low_rank(dr.Rank(0.25, of="min")), (1.0, 2.0))
DECAY = Arm("decay", decay(total=0.7, cuts=[0.2, 0.5]))


class Tiny(Rows):
    """A three-layer network on random rows, 40 steps."""

    layers, batch_size, rate = ["0", "2"], 8, 0.01

    def __init__(self, _: Path | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(80, 16, generator=generator)
        parts = {part: (x, (x[:, 0] > 0).long()) for part in ("train", "valid", "test")}
        super().__init__(parts, epochs=4)

    def network(self, width: float = 1.0) -> nn.Module:
        w = round(32 * width)
        return nn.Sequential(
            nn.Linear(16, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 2)
        )


def experiment(*chosen: Arm, **options: object) -> Experiment:
    """An experiment of these arms, and full rank if that is not one of them."""
    more = [] if any(arm.name == FULL.name for arm in chosen) else [replace(FULL, rates=(1.0,))]
    options = {"seeds": (0, 1), "tuning": (100,), "points": 4, **options}
    return Experiment("tiny", Tiny, [*chosen, *more], **options)  # pyright: ignore


def trial(
    arm: Arm, setting: Setting | None = None, reported: bool = True, **options: object
) -> Trial:
    setting = setting or Setting()
    return Trial(experiment(arm, **options), Tiny(), arm, setting, 0, arm.schedule, reported)


def record(**other: Any) -> dict[str, Any]:
    """A whole record of a run of experiment a."""
    ran = {
        "experiment": "a", "arm": "full rank", "seed": 0, "part": "test",
        "setting": asdict(Setting()), "result": {"accuracy": 50.0},
        "rate": 0.1, "steps": 40, "flops": 1.0, "training_flops": 100, "end_flops": 1.0,
        "parameters_mean": 9.0, "memory_peak": 9,
        "cpu_seconds": 1.0, "points": [], "changes": [], "full_ranks": {},
    }  # fmt: skip
    return {**ran, **other}
