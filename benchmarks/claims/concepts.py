"""Concepts: what an adapted convolution costs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dynarank.cost import trace
from dynarank.forms import Adapted, FullRank, Rank

PAGE = "docs/concepts.md"
SETTINGS = ("One multiply-add is 2 FLOPs",)


def claims() -> Iterator[str]:
    """Yield the cost of the two executions of an adapted convolution."""
    yield f"with two branches costs {adapted('two-branch'):.2f} times as much as full-rank training"
    yield f"the merged execution reduces it to {adapted('merged'):.2f}"


def adapted(execution: str) -> float:
    """Return the training FLOPs of a 3x3 convolution relative to full rank."""
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(2)))
    conv = trace(model, torch.ones(128, 64, 32, 32)).layers["1"]
    form = Adapted(Rank(0.5, of="out"), execution=execution)
    return conv.flops(form).training / conv.flops(FullRank()).training
