"""GPTs in the forms of a plan, and their training steps.

Weights in fp32, bf16 autocast, fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.gpu.device import Device
from dynarank.cost.stand_in import stand_in
from dynarank.forms import Plan

__all__ = ["adamw", "filled", "gpt_loss", "gpt_step"]


def filled(outline: nn.Module, plan: Plan, device: Device) -> nn.Module:
    """A model in the forms of a plan, with random values: no weight is decomposed.

    Args:
        outline: a plain model on the meta device.
        plan: the forms.
        device: where the model is made.
    """
    model = stand_in(outline, [], plan, meta=True)[0].to_empty(device=device.torch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    return model.train()


def adamw(model: nn.Module, rate: float) -> AdamW:
    """Fused AdamW; only matrices of the blocks decay."""
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    matrices = {k for k, p in trained.items() if p.ndim == 2 and k.startswith("blocks")}
    groups = [
        {"params": [trained[k] for k in trained if k in matrices]},
        {"params": [trained[k] for k in trained if k not in matrices], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def gpt_loss(model: nn.Module, x: Tensor, y: Tensor, device: Device) -> Tensor:
    """The loss of a batch, under bf16 autocast."""
    with device.autocast():
        outputs = model(x)
    return F.cross_entropy(outputs.float().flatten(0, 1), y.flatten())


def gpt_step(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: Device
) -> Callable[[], None]:
    """A function that trains for a step."""
    optimizer = adamw(model, 1e-4)

    def step() -> None:
        x, y = next(batches)
        gpt_loss(model, x, y, device).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
