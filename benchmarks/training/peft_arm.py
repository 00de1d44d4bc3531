"""The arms of fine-tuning, with LoRA by the PEFT package: an arm without a schedule of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.training.harness import arms
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

    return Arm(f"LoRA by PEFT, rank {rank}", None, rates, prepare=prepare)


def fine_tuning() -> list[Arm]:
    """Full fine-tuning, whole and shorter; LoRA by PEFT and by this library; cuts and decays."""
    rates = (0.25, 0.5, 1.0)
    return [
        *arms.with_rates(arms.full_rank(), rates),
        *arms.with_rates(arms.shorter(0.7), rates),
        peft_lora(8),
        *arms.adapters(8, rates=(4.0, 8.0, 16.0)),
        *arms.with_rates(arms.cut(0.7), rates),
        *arms.with_rates(arms.decays(0.7), rates),
    ]


def with_adapters(model: nn.Module, rank: int, alpha: float, seed: int) -> nn.Module:
    """The model with adapters in its ``bert``, whose own weights are frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear")
    torch.manual_seed(2000 + seed)
    model.bert = get_peft_model(model.bert, config)
    return model
