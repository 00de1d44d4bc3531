"""Does rescaling the factors' learning rates help after a deflation to low-rank?

A perceptron 64-256-256-10 on the digits of scikit-learn (1,347 images to train on, 450 to test) is
trained full-rank for 200 steps of 64 images, its first two layers are deflated to low-rank
(truncated SVD, moments carried over), and trained for 200 more steps under each rule, all from
the same state and over the same images. Recorded 20, 100 and 200 steps after: cross-entropy on all
training and all test images, and test accuracy; mean and sample standard deviation over seeds.

    python benchmarks/training/experiments/factor_rates.py results.json --seeds 0 1 2 3 4 5
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import sklearn
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import dynarank as dr
from dynarank.factors.learning_rates import FactorLearningRates

BEFORE, AT, BATCH = 200, (20, 100, 200), 64
SHARES = (1 / 8,)
RULES = ("full-rank", "none", "spectral", "rms")
MAKERS = {
    "SGD momentum 0.9, lr 0.05": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "AdamW, lr 0.001": lambda p: AdamW(p, lr=1e-3),
}


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; another split for each seed."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16 - 0.5, dtype=torch.float32)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1347], order[1347:]
    return x[train], y[train], x[test], y[test]


def network(seed: int) -> nn.Sequential:
    """64-256-256-10."""
    torch.manual_seed(seed)
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def train(
    model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, batches: list[Tensor]
) -> None:
    """One step for each batch of indices."""
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def reading(model: nn.Module, x: Tensor, y: Tensor, tx: Tensor, ty: Tensor) -> dict[str, float]:
    """Losses and accuracy over all images."""
    logits = model(tx)
    return {
        "train_loss": F.cross_entropy(model(x), y).item(),
        "test_loss": F.cross_entropy(logits, ty).item(),
        "test_accuracy": 100 * (logits.argmax(1) == ty).float().mean().item(),
    }


def run(seed: int, name: str) -> list[dict[str, object]]:
    """Every share and rule for one seed and optimizer, from one full-rank state."""
    images = data(seed)
    x, y = images[:2]
    generator = torch.Generator().manual_seed(1000 + seed)
    batches = [torch.randint(len(x), (BATCH,), generator=generator) for _ in range(BEFORE + AT[-1])]
    start = network(seed)
    optimizer = MAKERS[name](start.parameters())
    train(start, optimizer, x, y, batches[:BEFORE])
    found: list[dict[str, object]] = []
    for share in SHARES:
        for rule in RULES if share == SHARES[0] else RULES[1:]:  # full-rank has no share
            pair = copy.deepcopy((start, optimizer))  # together: they share the parameters
            readings, scales = after(pair, share, rule, images, batches[BEFORE:])
            found.append({"seed": seed, "optimizer": name, "share": share, "rule": rule,
                          "scales": scales, "readings": readings})  # fmt: skip
    return found


def after(
    pair: tuple[nn.Module, Optimizer], share: float, rule: str,
    images: tuple[Tensor, Tensor, Tensor, Tensor], batches: list[Tensor],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:  # fmt: skip
    """Deflate, go on, and read at each of ``AT`` steps; and the scales at the start."""
    model, optimizer = pair
    scales: dict[str, float] = {}
    if rule != "full-rank":
        rank = dr.Rank(share, of="min")
        dr.deflate(model, rank, to="low-rank", layers=["0", "2"], optimizer=optimizer)
        if rule != "none":
            scales = FactorLearningRates(model, optimizer, rule).scales()
    readings = {"0": reading(model, *images)}
    for begin, end in zip((0, *AT[:-1]), AT, strict=True):
        train(model, optimizer, *images[:2], batches[begin:end])
        readings[str(end)] = reading(model, *images)
    return readings, scales


def summary(runs: list[dict]) -> list[dict]:
    """Mean and sample standard deviation of each cell over the seeds."""
    cells: dict[tuple, list[dict]] = {}
    for one in runs:
        cells.setdefault((one["optimizer"], one["share"], one["rule"]), []).append(one["readings"])
    rows = []
    for (optimizer, share, rule), readings in cells.items():
        row = {"optimizer": optimizer, "share": share, "rule": rule, "n": len(readings)}
        for step in readings[0]:
            for kind in readings[0][step]:
                values = [r[step][kind] for r in readings]
                row[f"{kind}@{step}"] = [
                    statistics.mean(values),
                    statistics.stdev(values) if len(values) > 1 else 0.0,
                ]
        rows.append(row)
    return rows


def record(runs: list[dict], seconds: int) -> dict:
    """Everything that is kept of the runs so far."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "seeds": sorted({one["seed"] for one in runs}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "hardware": "one core of an AMD EPYC",
        "seconds": seconds,
        "spread": "sample standard deviation over seeds",
        "summary": summary(runs),
        "runs": runs,
    }


def main() -> None:
    """Run, write the records, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(16)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict] = []
    began = time.perf_counter()
    for seed in options.seeds:
        runs += [one for name in MAKERS for one in run(seed, name)]
        seconds = round(time.perf_counter() - began)
        print(f"seed {seed}: {seconds} s", flush=True)
        options.results.write_text(json.dumps(record(runs, seconds)) + "\n", encoding="utf-8")
    rows = summary(runs)
    for row in rows:
        cells = "  ".join(
            f"{row[f'{kind}@{s}'][0]:.4f}±{row[f'{kind}@{s}'][1]:.4f}"
            for kind in ("train_loss", "test_loss", "test_accuracy") for s in AT
        )  # fmt: skip
        print(f"{row['optimizer']:26} {row['share']:.3f} {row['rule']:10} {cells}")


if __name__ == "__main__":
    main()
