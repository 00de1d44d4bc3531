"""A GPT's tokens a second and peak memory, in each form and phase.

All forms of one width are on the device at a time, and take turns. A form's memory is the peak
during its first steps above what was allocated before it was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Times
from benchmarks.gpu.forms import plans
from benchmarks.gpu.models import filled, gpt_step
from dynarank.cost import ModelUse, trace
from dynarank.cost.stand_in import meta_copy
from dynarank.forms import FullRank, Plan
from dynarank.train.gpt import GPT

__all__ = ["outline_of", "random_batches", "run"]

_VOCABULARY = 256


def run(bench: Bench) -> None:
    """Time each width, the smallest first."""
    for width in bench.sizes.widths:
        if bench.deadline.passed:
            return
        _width(bench, width)
        bench.device.free()


def outline_of(bench: Bench, width: int) -> nn.Module:
    """A GPT without values."""
    sizes, heads = bench.sizes, width // bench.sizes.head
    with bench.device.torch:
        model = GPT(_VOCABULARY, sizes.context, width=width, depth=sizes.depth, heads=heads)
    return meta_copy(model)


def random_batches(bench: Bench) -> Iterator[tuple[Tensor, Tensor]]:
    """A few batches of random tokens, again and again."""
    shape = bench.sizes.batch, bench.sizes.context + 1
    drawn = [torch.randint(_VOCABULARY, shape, device=bench.device.torch) for _ in range(4)]
    return itertools.cycle([(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn])


def _width(bench: Bench, width: int) -> None:
    outline, batches = outline_of(bench, width), random_batches(bench)
    sample = next(batches)[0].to("meta")
    use = trace(outline, sample)
    steps: dict[str, Callable[[], None]] = {}
    flops: dict[str, int] = {}
    for name, plan in plans(use, bench.sizes.multiple).items():
        if bench.deadline.passed:
            break
        key = f"d = {width}: {name}"
        with bench.attempt(key):
            predicted = _predicted(bench, use, plan)
            bench.put(key, width=width, form=name, **predicted)
            flops[key] = predicted["flops"]
            steps[key] = _made(bench, key, filled(outline, plan, bench.device), batches)
    tokens = sample.numel()

    def told(key: str, times: Times) -> None:
        row = spread(times)
        rate = {
            "tokens_per_second": tokens / row["ms"] * 1e3,
            "tflops": flops[key] / row["ms"] / 1e9,
        }
        bench.put(key, **row, **rate)

    bench.alternate(steps, told, warm=False)


def _predicted(bench: Bench, use: ModelUse, plan: Plan) -> dict[str, Any]:
    """Batch, ranks, FLOPs and parameters of a form, and its memory without activations."""
    trainable, total = use.parameters(plan)
    forms = [use.layers[path].spec.resolve(form) for path, form in plan.items()]
    ranks = sorted({form.resolved_rank for form in forms if not isinstance(form, FullRank)})
    flops = use.flops(plan).training
    return {
        "batch": [bench.sizes.batch, bench.sizes.context], "depth": bench.sizes.depth,
        "ranks": ranks, "flops": flops, "flops_relative": flops / use.flops({}).training,
        "trainable": trainable, "parameters": total,
        "predicted_bytes_without_activations": 4 * (total + 3 * trainable),
    }  # fmt: skip


def _made(
    bench: Bench, key: str, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """The step of a model, warmed up, with its memory recorded."""
    parameters = sum(p.numel() * p.itemsize for p in model.parameters())
    before = max(0, bench.device.allocated() - parameters)
    step = gpt_step(model, batches, bench.device)
    bench.device.reset_peak()
    for _ in range(2):
        step()
    bench.put(key, peak_bytes=bench.device.peak() - before)
    return step
