"""Speed of whole models at low rank, compared with full rank and two plain layers in sequence.

    python benchmarks/layers/models.py --out benchmarks/layers/results/2026-11-24-cpu/models.json

A whole training step with the optimizer, one thread, fp32, candidates interleaved, medians of
process time. Ranks are a quarter of min(out, in) for transformers, of the output channels for
convolutions.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from networks import GPT, ViT, WideResNet
from peers import pair
from timing import interleaved, keep_memory, spread, write
from torch import Tensor, nn

import dynarank as dr
from dynarank import Rank
from dynarank.cost.flops import trace
from dynarank.forms import RankLike
from dynarank.train.models import ResNet20

TARGETS = {"gpt": 1.9, "wrn-16-4": 2.1, "vit": 2.0, "resnet-20": 1.0, "resnet-20-half": 1.0}


@dataclass(frozen=True)
class Case:
    """A model, a batch and what is low-rank in it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    rank: RankLike
    layers: str
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As transformers are trained."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """As convolutional networks are trained."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)


def tokens() -> tuple[Tensor, Tensor]:
    """8 sequences of 256 tokens."""
    return torch.randint(256, (8, 256)), torch.randint(256, (8 * 256,))


def images(batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Images of 32 x 32, channels last."""
    return lambda: (
        torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last),
        torch.randint(10, (batch,)),
    )


CASES = {
    "gpt": Case(GPT, tokens, Rank(0.25, of="min"), "blocks*", adamw),
    "wrn-16-4": Case(WideResNet, images(64), Rank(0.25, of="out"), "*conv?", sgd),
    "vit": Case(ViT, images(64), Rank(0.25, of="min"), "blocks*", adamw),
    "resnet-20": Case(ResNet20, images(128), Rank(0.25, of="out"), "*conv*", sgd),
    "resnet-20-half": Case(ResNet20, images(128), Rank(0.5, of="out"), "*conv*", sgd),
}


def two_layers(model: nn.Module, case: Case) -> nn.Module:
    """The model with two plain layers in sequence in place of each low-rank layer."""
    low = dr.factorize(copy.deepcopy(model), case.rank, layers=case.layers)
    for site in dr.survey(low):
        if factors := site.factors():
            parent, _, name = site.path.rpartition(".")
            plain = model.get_submodule(site.path)
            setattr(model.get_submodule(parent), name, pair(plain, factors[0].shape[0]))  # type: ignore[arg-type]
    return model


def measured(model: nn.Module, case: Case, batch: tuple[Tensor, Tensor]) -> nn.Module:
    """The low-rank model, with layers kept full-rank that were measured to be slower low-rank."""
    from dynarank.cost.timing import measure

    plan = dict(dr.current_plan(dr.factorize(copy.deepcopy(model), case.rank, layers=case.layers)))
    plan = {path: form for path, form in plan.items() if form != dr.FullRank()}
    timings = measure(trace(model, batch[0]), [plan], channels_last=True)
    dr.apply_plan(model, {path: timings.choose(path, form) for path, form in plan.items()})
    return model


def row(name: str, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = case.make(), case.batch()
    if batch[0].ndim == 4:
        model = model.to(memory_format=torch.channels_last)
    models = {
        "full-rank": copy.deepcopy(model),
        "low-rank": dr.factorize(copy.deepcopy(model), case.rank, layers=case.layers),
        "low-rank where faster": measured(copy.deepcopy(model), case, batch),
        "two layers": two_layers(copy.deepcopy(model), case),
    }
    use = {k: trace(m, batch[0]) for k, m in models.items()}
    flops = {k: u.flops({}).training for k, u in use.items()}
    found = interleaved({k: _step(m, case, batch) for k, m in models.items()}, rounds)
    full = statistics.median(found["full-rank"])
    return {
        "model": name,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()},
        "flop_ratio": {k: flops["full-rank"] / f for k, f in flops.items()},
        "ms": {k: spread(v) for k, v in found.items()},
        "speedup": {k: full / statistics.median(v) for k, v in found.items()},
        "target": TARGETS[name],
    }


def _step(model: nn.Module, case: Case, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    optimizer, (x, y) = case.optimizer(model), batch

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        F.cross_entropy(output.reshape(len(y), -1), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """Run the table and write it."""
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=list(CASES), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.only or CASES:
        rows.append(row(name, options.rounds))
        speed, flops = rows[-1]["speedup"], rows[-1]["flop_ratio"]
        shown = "  ".join(f"{k} {v:.2f}x (FLOPs {flops[k]:.2f}x)" for k, v in speed.items())
        print(f"{name}: {shown}; target {TARGETS[name]}x", flush=True)
    write(options.out, rows)


if __name__ == "__main__":
    main()
