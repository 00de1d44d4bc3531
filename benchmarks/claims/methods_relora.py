"""ReLoRA: the size of the first step on a zeroed entry."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature

from torch.optim import AdamW

PAGE = "docs/methods/relora.md"
SETTINGS = (
    "5,000 of 20,000 steps",
    "every 5,000 steps (in other runs 1,000 to 5,320)",
    "below its 90% quantile, or 99.9% of them",
    "random 99.9%",
    "language models of 11M to 66M parameters",
)


def claims() -> Iterator[str]:
    """Yield the size of the first step on a zeroed entry."""
    first, second = signature(AdamW).parameters["betas"].default
    step = (1 - first) / (1 - second) ** 0.5
    yield f"(1 - b1) / sqrt(1 - b2) learning rates, {step:.1f} with the usual betas"
