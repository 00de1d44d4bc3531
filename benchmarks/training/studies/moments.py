"""Policies for the optimizer's moments compared: paired runs on scikit-learn's digits.

    python benchmarks/training/studies/moments.py run --task mlp --seeds 8
    python benchmarks/training/studies/moments.py errors --seeds 8
    python benchmarks/training/studies/moments.py table

A run's initial weights and batches depend on the seed alone, so runs of one seed are pairs. ``run``
records the loss on the whole training set at the change and 5, 20 and all but one of the phase's
steps later; ``errors`` compares second moments right after a change with those of 400 fresh batches
at the same weights. Records are written one per line next to this file; ``table`` prints a summary.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynarank as dr
from dynarank.monitors.gradient_window import GradientWindow
from dynarank.schedules import Phases
from dynarank.surgery.selection import find_sites
from dynarank.surgery.sites import survey
from dynarank.train.data import load_digits_data
from dynarank.train.models import DigitsNet

FOLDER = Path(__file__).with_suffix("")
POLICIES = ("reset", "project", "calibrated")
RANK, BATCH = dr.Rank(0.25, of="out"), 64
LENGTH = 32  # gradients kept before a change; `errors` tries others
PHASE = {"mlp": 100, "conv": 50}  # steps; three phases a run
LOW, FULL, ADAPTED = dr.LowRank(RANK), dr.FullRank(), dr.Adapted(RANK)
SCHEDULES = {
    "low-full-adapted": (LOW, FULL, ADAPTED),
    "low-full-low": (LOW, FULL, LOW),
    "full-adapted-full": (FULL, ADAPTED, FULL),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.01),
}
DATA = load_digits_data()


class Run:
    """One run of a task, step by step."""

    def __init__(self, task: str, schedule: str, optimizer: str, moments: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = DigitsNet() if task == "conv" else _mlp()
        layers = "conv*" if task == "conv" else ["1", "3"]
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.generator = torch.Generator().manual_seed(seed)
        self.phase = PHASE[task]
        phases = Phases((0.0, 1 / 3, 2 / 3), SCHEDULES[schedule])
        self.ranks = dr.RankScheduler(
            self.model,
            self.optimizer,
            phases,
            3 * self.phase,
            layers=layers,
            moments=GradientWindow(self.model, self.optimizer, length=LENGTH)
            if moments == "calibrated"
            else moments,
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """A batch drawn with replacement."""
        rows = torch.randint(0, len(DATA.train_labels), (BATCH,), generator=self.generator)
        return DATA.train_images[rows], DATA.train_labels[rows]

    def gradient(self) -> None:
        """The gradient of one batch."""
        x, y = self.batch()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()

    def step(self) -> None:
        """One step of the run."""
        self.gradient()
        self.optimizer.step()
        self.ranks.step()

    @torch.no_grad()
    def loss(self) -> float:
        """On the training set."""
        self.model.eval()
        loss = F.cross_entropy(self.model(DATA.train_images), DATA.train_labels).item()
        self.model.train()
        return loss

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the test set, in percent."""
        self.model.eval()
        output = self.model(DATA.test_images)
        return 100 * (output.argmax(1) == DATA.test_labels).float().mean().item()


def _mlp() -> nn.Module:
    layers = [nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)]
    return nn.Sequential(nn.Flatten(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def run(task: str, schedule: str, optimizer: str, moments: str, seed: int) -> dict[str, Any]:
    """The losses after each change, and the final accuracy."""
    one = Run(task, schedule, optimizer, moments, seed)
    offsets = (0, 5, 20, one.phase - 1)
    losses: dict[str, list[float]] = {"1": [], "2": []}
    for step in range(1, 3 * one.phase + 1):
        one.step()
        change, offset = divmod(step, one.phase)
        if change in (1, 2) and offset in offsets:
            losses[str(change)].append(one.loss())
    return {"losses": losses, "loss": one.loss(), "accuracy": one.accuracy()}


def errors(schedule: str, change: int, length: int, seed: int) -> dict[str, Any]:
    """How far second moments are off after a change; ``length`` 0: projected."""
    moments = "calibrated" if length else "project"
    one = Run("mlp", schedule, "adamw", moments, seed)
    if one.ranks.gradients is not None:
        one.ranks.gradients.length = length
    for _ in range(change * one.phase):
        one.step()
    sites = find_sites(one.model, survey(one.model), one.ranks.layers).values()
    parameters = [p for site in sites for p in site.parameters().values() if p.requires_grad]
    parameters = [p for p in parameters if p in one.optimizer.state]
    truth = [torch.zeros_like(p) for p in parameters]
    for _ in range(400):
        one.gradient()
        for total, p in zip(truth, parameters, strict=True):
            total += p.grad.square() / 400
    found = [
        one.optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** float(one.optimizer.state[p]["step"]))
        for p in parameters
    ]
    live = [t > 1e-3 * t.mean() for t in truth]
    off = torch.cat([(v[k] / t[k]).log10() for v, t, k in zip(found, truth, live, strict=True)])
    total = sum(v.sum().item() for v in found) / sum(t.sum().item() for t in truth)
    return {"median": off.abs().median().item(), "bias": off.median().item(), "sum": total}


def record(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to a file of records, one a line."""
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / name).open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": "one core of an AMD EPYC",
    }


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of a file of records."""
    path = FOLDER / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def _missing(name: str, key: dict[str, Any]) -> bool:
    return not any(key.items() <= row.items() for row in recorded(name))


def _runs(task: str, schedules: list[str], optimizers: list[str], seeds: int) -> None:
    for seed in range(seeds):
        for schedule in schedules:
            for optimizer in optimizers:
                for moments in POLICIES:
                    key = {"task": task, "schedule": schedule, "optimizer": optimizer}
                    key |= {"moments": moments, "seed": seed}
                    if _missing("runs.jsonl", key):
                        record("runs.jsonl", [key | run(**key) | _versions()])  # type: ignore[arg-type]


def _errors(seeds: int) -> None:
    for seed in range(seeds):
        for schedule, change in [
            ("low-full-low", 1),
            ("low-full-low", 2),
            ("low-full-adapted", 2),
            ("full-adapted-full", 2),
        ]:
            for length in (0, 4, 8, 16, 32):
                key = {"schedule": schedule, "change": change, "length": length, "seed": seed}
                if _missing("errors.jsonl", key):
                    record("errors.jsonl", [key | errors(**key) | _versions()])  # type: ignore[arg-type]


def table() -> None:
    """Means and standard deviations over seeds; differences are of pairs, to ``project``."""
    groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for r in recorded("runs.jsonl"):
        key = (r["task"], r["optimizer"], r["schedule"], r["moments"])
        groups.setdefault(key, {})[r["seed"]] = r
    for key, runs in sorted(groups.items()):
        base = groups.get((*key[:3], "project"), {})
        cells = [
            _cell(runs, base, lambda r, c=c, i=i: r["losses"][c][i]) for c in "12" for i in range(4)
        ]
        cells += [_cell(runs, base, lambda r: r["accuracy"], 2)]
        print("|", " | ".join((*key, str(len(runs)), *cells)), "|")
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for r in recorded("errors.jsonl"):
        found.setdefault((r["schedule"], r["change"], r["length"]), []).append(r)
    for key, some in sorted(found.items()):
        cells = [_spread([r[name] for r in some], 3) for name in ("median", "bias", "sum")]
        print("|", " | ".join((*map(str, key), str(len(some)), *cells)), "|")


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _cell(runs: dict[int, Any], base: dict[int, Any], of: Any, digits: int = 4) -> str:
    mean = statistics.mean(of(r) for r in runs.values())
    pairs = [of(r) - of(base[s]) for s, r in runs.items() if s in base]
    if runs is base or len(pairs) < 2:
        return _spread([of(r) for r in runs.values()], digits)
    difference, deviation = statistics.mean(pairs), statistics.stdev(pairs)
    return f"{mean:.{digits}f} ({difference:+.{digits}f} ± {deviation:.{digits}f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "errors", "table"))
    parser.add_argument("--task", choices=sorted(PHASE), default="mlp")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        _runs(options.task, options.schedules, options.optimizers, options.seeds)
    elif options.what == "errors":
        _errors(options.seeds)
    else:
        table()


if __name__ == "__main__":
    main()
