"""The same layer in other libraries: PEFT's LoRA, tensorly-torch, and two plain layers."""

from __future__ import annotations

import warnings

import torch
from torch import nn

__all__ = ["Pair", "lora", "pair", "tensorly_layer"]


class Pair(nn.Module):
    """Two plain layers in sequence, as Composer's Factorize produces them."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Second(first(x))."""
        return self.second(self.first(x))


def pair(layer: nn.Linear | nn.Conv2d, rank: int) -> Pair:
    """A layer's arithmetic at this rank as two plain layers."""
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        return Pair(first, nn.Linear(rank, layer.out_features, bias=bias))
    first_conv = nn.Conv2d(
        layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False
    )
    return Pair(first_conv, nn.Conv2d(rank, layer.out_channels, 1, bias=bias))


def lora(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Module:
    """PEFT's adapter on the frozen layer."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0"])
    return get_peft_model(nn.Sequential(layer), config)  # type: ignore[arg-type]


def tensorly_layer(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Module:
    """tensorly-torch's layer of as many parameters as two factors of this rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

    whole = layer.weight.numel()
    n, m = layer.weight.shape[0], whole // layer.weight.shape[0]
    share = rank * (n + m) / whole
    if isinstance(layer, nn.Linear):
        side = round(n**0.5) if round(n**0.5) ** 2 == n else n // 32
        other = layer.in_features
        inner = round(other**0.5) if round(other**0.5) ** 2 == other else other // 32
        return tltorch.FactorizedLinear(
            in_tensorized_features=(inner, other // inner),
            out_tensorized_features=(side, n // side),
            bias=layer.bias is not None, factorization="tucker", rank=share,
            implementation="reconstructed",  # its factorized way asks for 11 GB at 256 -> 256
        )  # fmt: skip
    factorized = tltorch.FactorizedConv.from_conv(layer, rank=share, factorization="tucker")
    return factorized
