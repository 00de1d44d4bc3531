"""Language models: a GPT on characters of tinyshakespeare, or on bytes of books."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.training.problems.problem import Batch, Part, Problem
from dynarank.train.gpt import GPT


class Language(Problem):
    """A GPT on a text, random windows at each step.

    Args:
        parts: the tokens of "train", "valid" and "test".
        tokens: how many different ones there are.
        width: the model width.
        depth: the number of blocks.
        heads: the number of attention heads.
        context: the length of a window.
        steps: the length of the training.
        rate: the learning rate.
        batch_size: windows a step.
        bf16: whether the forward pass is under bf16 autocast.
        calibrated_on: how many batches a calibration takes.
        max_norm: what the norm of all gradients is clipped to.
    """

    layers, metric, higher = "blocks.*", "loss", False

    def __init__(
        self,
        parts: dict[str, Tensor],
        tokens: int,
        *,
        width: int,
        depth: int,
        steps: int,
        rate: float,
        heads: int = 4,
        context: int = 64,
        batch_size: int = 32,
        bf16: bool = False,
        calibrated_on: int = 32,
        max_norm: float | None = None,
    ) -> None:
        self.parts, self.tokens, self.width, self.depth = parts, tokens, width, depth
        self.steps, self.rate, self.heads, self.context = steps, rate, heads, context
        self.batch_size, self.bf16, self.calibrated_on = batch_size, bf16, calibrated_on
        self.max_norm = max_norm

    def network(self, width: float = 1.0) -> nn.Module:
        """A GPT."""
        sides = {"width": self.heads * 2 * round(self.width * width / self.heads / 2)}
        return GPT(self.tokens, self.context, **sides, depth=self.depth, heads=self.heads)

    def optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """AdamW; only the matrices of the blocks decay."""
        named = dict(model.named_parameters())
        matrices = [p for k, p in named.items() if p.ndim == 2 and k.startswith("blocks")]
        others = [p for k, p in named.items() if not (p.ndim == 2 and k.startswith("blocks"))]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        return AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)

    def factor(self, step: int) -> float:
        """5% of warm-up, then a cosine."""
        return self.warmup_then(step, 0.02)

    def batch(self, seed: int, step: int) -> Batch:
        """Random windows of the text."""
        text, generator = self.parts["train"], torch.Generator()
        generator.manual_seed(seed * 1_000_003 + step)
        last = len(text) - self.context - 1
        starts = torch.randint(0, last, (self.batch_size,), generator=generator)
        windows = text[starts[:, None] + torch.arange(self.context + 1)].long()
        return windows[:, :-1], windows[:, 1:]

    def held_out(self, part: Part) -> Iterator[Batch]:
        """The text in windows that follow one another."""
        text, n = self.parts[part].long(), self.context
        length = (len(text) - 1) // n * n
        x, y = text[:length].view(-1, n), text[1 : length + 1].view(-1, n)
        return zip(x.split(128), y.split(128), strict=True)

    @torch.no_grad()
    def test(self, model: nn.Module, part: Part) -> dict[str, float]:
        """The mean loss of a token; outputs are not kept, they are large."""
        was = model.training
        model.eval()
        total = count = 0
        for x, y in self.held_out(part):
            outputs = self.outputs(model, x).flatten(0, 1)
            total += F.cross_entropy(outputs, y.flatten(), reduction="sum").item()
            count += y.numel()
        model.train(was)
        return {"loss": total / count}


def shakespeare(data: Path) -> tuple[dict[str, Tensor], int]:
    """Characters of tinyshakespeare: the last 100,000 are the test, 20,000 before the validation.

    Returns:
        The tokens of each part, and how many different ones there are.
    """
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    place = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([place[character] for character in text])
    return {
        "train": tokens[:-120_000], "valid": tokens[-120_000:-100_000], "test": tokens[-100_000:],
    }, len(place)  # fmt: skip


def books(data: Path) -> tuple[dict[str, Tensor], int]:
    """Bytes of public-domain books, split by book; 20,000 bytes to validate and 200,000 to test."""
    folder = data / "books" / "split"

    def read(part: str, most: int | None = None) -> Tensor:
        found = (folder / f"{part}.txt").read_bytes()
        middle = len(found) // 2 if most else 0
        chosen = found[middle : middle + most] if most else found
        return torch.from_numpy(np.frombuffer(chosen, np.uint8).copy())

    parts = {
        "train": read("train_64mb"),
        "valid": read("valid", 20_000),
        "test": read("test", 200_000),
    }
    return parts, 256
