"""ResNet-20: the seconds of an epoch at full rank, low rank and adapted.

50,000 random images of CIFAR's shape (but for the rest of a batch) are on the device; batches
of 128, bf16 autocast, channels last, SGD with momentum. Arms take turns, an epoch each. At this
size a GPU may wait for Python, so full and low rank also have batches of 1024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynarank as dr
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Times
from dynarank.cost import trace
from dynarank.forms import Form
from dynarank.train.models import ResNet20

__all__ = ["run"]

_WARM_UP = 10


def run(bench: Bench) -> None:
    """Time epochs until the time is over."""
    images, labels = _images(bench)
    epochs: dict[str, Callable[[], None]] = {}
    for name, (form, batch) in _arms(bench).items():
        if bench.deadline.passed:
            return
        with bench.attempt(name):
            model = _made(bench, form)
            use = trace(model, images[:batch])
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            bench.put(name, batch=batch, images=len(images), trainable=trained,
                      flops_a_step=use.flops({}).training)  # fmt: skip
            step = _step_of(bench, model)
            epochs[name] = partial(_epoch, step, images, labels, batch)
            first = partial(step, images[:batch], labels[:batch])
            bench.device.times(first, min(_WARM_UP, len(images) // batch))
            bench.put(name, host_ms_a_step=min(bench.device.times(first, 2).host) * 1e3)

    def told(name: str, times: Times) -> None:
        bench.put(name, epoch_seconds=times.device, n=len(times.device))

    bench.alternate(epochs, told, repeats=1, warm=False)


def _arms(bench: Bench) -> dict[str, tuple[Form, int]]:
    """The form and the batch of each arm."""
    rank, usual, large = dr.Rank(1 / 2, of="out"), bench.sizes.images, bench.sizes.many
    full, low = dr.FullRank(), dr.LowRank(rank)  # of the published rank
    return {
        "full rank": (full, usual),
        "low rank 1/2": (low, usual),
        "adapted 1/2": (dr.Adapted(rank), usual),
        "adapted 1/2, two branches": (dr.Adapted(rank, execution="two-branch"), usual),
        f"full rank, batches of {large}": (full, large),
        f"low rank 1/2, batches of {large}": (low, large),
    }


def _images(bench: Bench) -> tuple[Tensor, Tensor]:
    whole = math.lcm(bench.sizes.images, bench.sizes.many)
    number = bench.sizes.epoch // whole * whole  # no batch has a shape of its own
    where = {"device": bench.device.torch}
    images = torch.randn(number, 3, 32, 32, **where)
    labels = torch.randint(10, (number,), **where)
    return images.contiguous(memory_format=torch.channels_last), labels


def _made(bench: Bench, form: Form) -> nn.Module:
    model = ResNet20().to(bench.device.torch)
    paths = [site.path for site in dr.survey(model) if "conv" in site.path and site.path != "conv"]
    dr.apply_plan(model, dict.fromkeys(paths, form))
    return model.to(memory_format=torch.channels_last).train()


def _step_of(bench: Bench, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)

    def step(x: Tensor, y: Tensor) -> None:
        with bench.device.autocast():
            outputs = model(x)
        F.cross_entropy(outputs.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _epoch(
    step: Callable[[Tensor, Tensor], None], images: Tensor, labels: Tensor, batch: int
) -> None:
    order = torch.randperm(len(images), device=images.device)
    for chosen in order.split(batch):
        step(images[chosen], labels[chosen])
