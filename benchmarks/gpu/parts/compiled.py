"""A GPT of the smallest width, its blocks compiled and not, in the forms that matter most.

Blocks are compiled one by one: they are equal, so the code of the first serves all. The time to
compile is that of the first step. The last part: it may take all the time there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from benchmarks.gpu.bench import Bench, spread
from benchmarks.gpu.device import Times
from benchmarks.gpu.forms import plans
from benchmarks.gpu.models import filled, gpt_step
from benchmarks.gpu.parts.gpt import outline_of, random_batches
from dynarank.cost import trace

__all__ = ["run"]

_FORMS = "full rank", "low rank 1/4", "adapted 1/4, the paper's last phase", "low rank 1/8"


def run(bench: Bench) -> None:
    """Time each form, compiled and eager in turn."""
    width = bench.sizes.widths[0]
    outline, batches = outline_of(bench, width), random_batches(bench)
    sample = next(batches)[0].to("meta")
    known = plans(trace(outline, sample), bench.sizes.multiple)
    took = 0.0
    for name in _FORMS:
        begun = bench.deadline.left
        if begun <= took:  # it would be compiled and not timed
            bench.record.part(bench.part, left_out=list(_FORMS[_FORMS.index(name) :]))
            return
        with bench.attempt(f"{name}: compiled"):
            steps = {}
            for how in ("eager", "compiled"):
                model = filled(outline, known[name], bench.device)
                if how == "compiled":
                    for block in model.get_submodule("blocks").children():
                        block.compile(backend=bench.sizes.backend)
                key = f"{name}: {how}"
                bench.put(key, width=width, form=name, execution=how)
                steps[key] = gpt_step(model, batches, bench.device)
                bench.put(key, first_step_seconds=_first(bench, steps[key]))

            def told(key: str, times: Times) -> None:
                row = spread(times)
                bench.put(key, **row, tokens_per_second=sample.numel() / row["ms"] * 1e3)

            bench.alternate(steps, told)
        torch.compiler.reset()
        bench.device.free()
        took = begun - bench.deadline.left


def _first(bench: Bench, step: Callable[[], object]) -> float:
    """The seconds of a first step."""
    begun = bench.device.now()
    with warnings.catch_warnings():
        # Of torch's own, when the input of a compiled block is the output of another one.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        step()
    return bench.device.now() - begun
