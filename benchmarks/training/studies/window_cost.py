"""What keeping gradients before a change costs: seconds of a step, and of the change itself.

Two layers of 768 x 768 under AdamW, batches of 256, with no gradients kept, 8 and 32. Steps of the
three are interleaved; then the layers are cut to rank 192; all of it five times. CPU seconds on one
thread, medians.

    OMP_NUM_THREADS=1 python -m benchmarks.training.studies.window_cost
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import dynarank as dr
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.recording.host import commit, hardware, started, versions

RESULTS = Path(__file__).with_name("moments") / "window_cost.json"
SIZE, BATCH, RANK, STEPS, CUTS = 768, 256, 192, 24, 5
LENGTHS = (0, 8, 32)


class Run:
    """Two layers, their optimizer and, unless ``length`` is 0, a window of their gradients."""

    def __init__(self, length: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        paths = ("0", "2")
        self.window = None
        if length:
            self.window = GradientWindow(self.model, self.optimizer, paths, length=length)

    def step(self) -> float:
        """A training step; returns its CPU seconds."""
        x = torch.randn(BATCH, SIZE)
        began = time.process_time()
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        return time.process_time() - began

    def deflate(self) -> float:
        """Cut both layers; returns the CPU seconds."""
        moments = self.window or "project"
        began = time.process_time()
        dr.deflate(self.model, RANK, to="low-rank", optimizer=self.optimizer, moments=moments)
        return time.process_time() - began


def measure() -> list[dict[str, Any]]:
    """A row for each number of gradients kept."""
    steps: dict[int, list[float]] = {length: [] for length in LENGTHS}
    cuts: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for _ in range(CUTS):
        runs = {length: Run(length) for length in LENGTHS}
        for step in range(max(LENGTHS) + STEPS):
            for length, run in runs.items():
                seconds = run.step()
                if step >= max(LENGTHS):
                    steps[length].append(seconds)
        for length, run in runs.items():
            cuts[length].append(run.deflate())
    return [{"kept": n, "step_s": median(steps[n]), "deflate_s": median(cuts[n])} for n in LENGTHS]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {"hardware": hardware(torch.device("cpu")), "commit": commit(), "date": started()[:10]}
    found |= {"versions": versions(), "steps": CUTS * STEPS, "cuts": CUTS, "rows": measure()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["rows"], indent=1))
