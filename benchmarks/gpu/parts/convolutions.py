"""3x3 convolutions of WRN-28-10: adapted, merged or in two branches, low-rank and plain.

Forward and backward of one layer under bf16 autocast, channels last, with fp32 weights and bf16
images. Steps are asked for before the device begins; what Python takes is beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dynarank as dr
from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Device, Times
from dynarank.cost import trace
from dynarank.forms import Form

__all__ = ["run"]

_SHARES = {"1/2": 1 / 2, "1/4": 1 / 4}  # of the output channels
_REPEATS = 10


def run(bench: Bench) -> None:
    """Time each layer."""
    for channels, pixels in bench.sizes.channels:
        if bench.deadline.passed:
            return
        _layer(bench, channels, pixels)


def _forms() -> Iterator[tuple[str, Form]]:
    yield "plain", dr.FullRank()
    for name, share in _SHARES.items():
        rank = dr.Rank(share, of="out")
        yield f"adapted {name}, merged", dr.Adapted(rank, execution="merged")
        yield f"adapted {name}, two branches", dr.Adapted(rank, execution="two-branch")
        yield f"low rank {name}", dr.LowRank(rank, execution="factored")


def _layer(bench: Bench, channels: int, pixels: int) -> None:
    shape = bench.sizes.images, channels, pixels, pixels
    x = torch.randn(shape, device=bench.device.torch).bfloat16()  # as the layer before gives them
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(x)
    steps: dict[str, Callable[[], None]] = {}
    for name, form in _forms():
        key = f"{channels} channels, {pixels} x {pixels}: {name}"
        with bench.attempt(key):
            model = _made(channels, form, bench.device)
            use = trace(nn.Sequential(nn.Identity(), model), x.detach().float().requires_grad_())
            bench.put(key, channels=channels, pixels=pixels, form=name, batch=shape[0],
                      flops=use.flops({}).training)  # fmt: skip
            steps[key] = _step_of(model, x, gradient, bench.device)

    def told(key: str, times: Times) -> None:
        bench.put(key, **spread(times))

    bench.alternate(steps, told, repeats=min(_REPEATS, 10 * bench.sizes.repeats), ahead=True)


def _made(channels: int, form: Form, device: Device) -> nn.Module:
    """The convolution in a form; no factor is zero, as those of a new adapter are."""
    plain = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    model = nn.Sequential(plain).to(device.torch)
    dr.apply_plan(model, {"0": form})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(memory_format=torch.channels_last)


def _step_of(model: nn.Module, x: Tensor, gradient: Tensor, device: Device) -> Callable[[], None]:
    inputs = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        with device.autocast():
            y = model(x)
        torch.autograd.grad(y, inputs, gradient)

    return step
