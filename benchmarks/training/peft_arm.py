"""LoRA by the PEFT package, to compare with: an arm without a schedule of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.training.harness.arm import Arm


def peft_lora(rank: int, *, alpha: float = 16.0, rates: Sequence[float] = (4.0, 8.0, 16.0)) -> Arm:
    """LoRA on every linear layer of the encoder's blocks, as PEFT does it.

    Args:
        rank: of every adapter.
        alpha: divided by the rank, the scale of an adapter.
        rates: the factors of the problem's rate that are tried.
    """

    def prepare(model: nn.Module, problem: Any, seed: int) -> nn.Module:
        return with_adapters(model, rank, alpha, seed)

    return Arm(f"LoRA by PEFT, rank {rank}", None, "PEFT", rates, prepare=prepare)


def with_adapters(model: nn.Module, rank: int, alpha: float, seed: int) -> nn.Module:
    """The model with adapters in its ``bert``, whose own weights are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    torch.manual_seed(2000 + seed)
    model.bert = get_peft_model(model.bert, config)
    return model
