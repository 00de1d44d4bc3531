"""Training a byte GPT for a given time: its batches, its loss on held-out text, and the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dynarank as dr
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.forms import BLOCKS
from benchmarks.gpu.models import adamw, gpt_loss
from benchmarks.gpu.text import Text
from dynarank.cost import ModelUse
from dynarank.train.gpt import GPT
from dynarank.train.ledger import Ledger

__all__ = ["Batches", "Run", "byte_gpt", "held_out_loss"]

_EVERY = 5  # steps between looks at the clock
_WARM_UP = 0.05


def byte_gpt(bench: Bench, layers: int | None = None) -> nn.Module:
    """The GPT to train, the same values each time.

    Args:
        bench: the sizes and the device.
        layers: its depth; None: the usual one.
    """
    sizes = bench.sizes
    torch.manual_seed(0)
    with bench.device.torch:
        return GPT(
            256,
            sizes.window,
            width=sizes.width,
            depth=layers or sizes.layers,
            heads=sizes.width // sizes.head,
        ).train()


class Batches:
    """Random windows of a text, the same ones for each model.

    Args:
        bench: the sizes and the device.
        text: bytes, on the device.
    """

    def __init__(self, bench: Bench, text: Tensor) -> None:
        self._text, self._sizes = text, bench.sizes
        self._generator = torch.Generator(bench.device.torch).manual_seed(0)
        self._window = torch.arange(bench.sizes.window + 1, device=text.device)

    def __next__(self) -> tuple[Tensor, Tensor]:
        last, device = len(self._text) - self._sizes.window, self._text.device
        shape = self._sizes.windows, 1
        starts = torch.randint(last, shape, generator=self._generator, device=device)
        windows = self._text[starts + self._window].long()
        return windows[:, :-1], windows[:, 1:]

    def __iter__(self) -> Batches:
        return self


@torch.no_grad()
def held_out_loss(bench: Bench, model: nn.Module, text: Text) -> float:
    """The mean loss of a byte, on windows that are spread evenly over the held-out text."""
    sizes, device = bench.sizes, text.held_out.device
    number = sizes.held_out * sizes.windows
    last = len(text.held_out) - sizes.window - 1
    starts = torch.linspace(0, last, number, device=device, dtype=torch.float64).long()
    windows = text.held_out[starts[:, None] + torch.arange(sizes.window + 1, device=device)].long()
    model.eval()
    losses = [
        gpt_loss(model, part[:, :-1], part[:, 1:], bench.device)
        for part in windows.split(sizes.windows)
    ]
    model.train()
    return torch.stack(losses).mean().item()


@dataclass
class Run:
    """The training of a model for a given time.

    The learning rate follows the time that is spent, so that each run ends at its smallest one:
    5% of linear warm-up, then a cosine. The time of a run is that of its steps and its cuts; that
    of measuring the loss is left out.

    Args:
        bench: the sizes and the device.
        text: the text, on the device.
        model: the model.
        use: the trace of a batch of it at full rank.
        rate: the largest learning rate.
        seconds: how long.
        schedule: a rank schedule; None: the forms stay.
        total_steps: how many steps it is expected to do, for the schedule.
    """

    bench: Bench
    text: Text
    model: nn.Module
    use: ModelUse
    rate: float
    seconds: float
    schedule: dr.schedules.Schedule | None = None
    total_steps: int = 1
    points: list[dict[str, float]] = field(default_factory=list)
    cuts: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0

    def train(self, told: Callable[[dict[str, Any]], None]) -> None:
        """Train until the time or the deadline is over; ``told`` gets each point's results."""
        device, batches = self.bench.device, Batches(self.bench, self.text.train)
        optimizer = adamw(self.model, self.rate)
        ledger = Ledger(self.use, dr.current_plan(self.model))
        device.reset_peak()
        self._point(0.0, ledger, told)
        spent, begun = 0.0, device.now()
        ranks = self._scheduler(optimizer)
        cut_steps = set() if ranks is None else {phase.start for phase in ranks.phases()}
        while spent < self.seconds and not self.bench.deadline.passed:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * _factor(spent / self.seconds)
            x, y = next(batches)
            gpt_loss(self.model, x, y, device).backward()
            optimizer.step()
            if ranks is not None:
                self._step(ranks, ledger, cut=ranks.last_step + 1 in cut_steps)
            optimizer.zero_grad()
            ledger.step()
            self.steps += 1
            if self.steps % _EVERY == 0:
                spent = device.now() - begun
                if spent >= self.seconds * len(self.points) / self.bench.sizes.points:
                    before = device.now()
                    self._point(spent, ledger, told)
                    begun += device.now() - before
        if ranks is not None:
            ranks.close()

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> dr.RankScheduler | None:
        if self.schedule is None:
            return None
        return dr.RankScheduler(
            self.model, optimizer, self.schedule, total_steps=self.total_steps, layers=BLOCKS
        )

    def _step(self, ranks: dr.RankScheduler, ledger: Ledger, *, cut: bool) -> None:
        """The step of the rank scheduler; the time of a cut is recorded."""
        begun = self.bench.device.now() if cut else 0.0
        if ranks.step():
            ledger.turn(dr.current_plan(self.model))
            seconds = self.bench.device.now() - begun if cut else None
            self.cuts.append({"step": self.steps + 1, "seconds": seconds})

    def _point(self, spent: float, ledger: Ledger, told: Callable[[dict[str, Any]], None]) -> None:
        """Measure the loss, and tell all that is known by now."""
        loss = held_out_loss(self.bench, self.model, self.text)
        cut = sum(one["seconds"] or 0.0 for one in self.cuts)
        self.points.append({"seconds": spent, "cut_seconds": cut, "steps": self.steps,
                            "flops": ledger.training_flops, "loss": loss})  # fmt: skip
        told({
            "points": self.points, "cuts": self.cuts, "steps": self.steps, "seconds": spent,
            "cut_seconds": cut, "flops": ledger.training_flops, "loss": loss,
            "flops_relative_per_step": ledger.relative_flops,
            "parameters_mean": ledger.trainable_mean, "parameters_peak": ledger.trainable_peak,
            "parameters_last": ledger.last_trainable, "peak_bytes": self.bench.device.peak(),
        })  # fmt: skip


def _factor(done: float) -> float:
    """The learning rate after a share of the time, relative to the largest one."""
    if done < _WARM_UP:
        return max(done / _WARM_UP, 0.02)
    left = (done - _WARM_UP) / (1 - _WARM_UP)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(left, 1.0)))
