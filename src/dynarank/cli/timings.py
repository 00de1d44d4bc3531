"""``dynarank plan --measure``: each layer's forms, timed on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from dynarank.cli.show import right_aligned
from dynarank.cost.flops import ModelUse
from dynarank.cost.timing import Timings, default_cache, measure
from dynarank.form_data import form_to_data
from dynarank.forms import Adapted, Form, FullRank, LowRank, Plan, form_name
from dynarank.train.loop import Machine

__all__ = ["show_timings", "time_layers", "timings_data"]


def time_layers(
    terminal: Console, use: ModelUse, plans: Iterable[Plan], machine: Machine
) -> Timings:
    """Time every form in the plans, with a progress bar in a terminal."""
    plans = list(plans)
    paths = dict.fromkeys(path for plan in plans for path in plan)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("timing the layers", total=len(paths))
        return measure(
            use,
            plans,
            device=machine.device,
            autocast=torch.bfloat16 if machine.precision == "bf16" else None,
            channels_last=True,
            cache=default_cache(),
            on_layer=lambda path: bar.advance(task),
        )


def show_timings(terminal: Console, use: ModelUse, timings: Timings, machine: Machine) -> None:
    """Print each layer's milliseconds at full rank and in the fastest execution of each form."""
    title = f"Measured, {machine.device}, {machine.precision}: ms per training step of the layer"
    table = right_aligned(title, ["layer", "weight"], ["full-rank", "low-rank", "adapted", "runs"])
    for path in timings.seconds:
        shape = "x".join(map(str, use.layers[path].shape))
        cells = [_cell(timings, path, kind) for kind in (LowRank, Adapted)]
        table.add_row(path, shape, _ms(timings.full_rank(path)), *cells, verdict(timings, path))
    terminal.print(table)
    terminal.print(
        f"A layer stays full-rank unless low-rank is {timings.margin:.0%} faster. "
        f"Timings are cached in {default_cache()}.\n"
    )


def verdict(timings: Timings, path: str) -> str:
    """Whether the layer is faster in its low-rank phase, or stays full-rank."""
    low = [form for form in timings.seconds[path] if isinstance(form, LowRank)]
    if not low:
        return "no low-rank phase"
    form = min(low, key=lambda one: timings.seconds[path][one])
    seconds, full = timings.seconds[path][form], timings.full_rank(path)
    if isinstance(timings.choose(path, form), LowRank):
        return f"{full / seconds:.2f}x faster"
    return f"stays full-rank: {full / seconds:.2f}x"


def timings_data(timings: Timings) -> list[dict[str, Any]]:
    """The timings as plain data."""
    return [
        {
            "layer": path,
            "verdict": verdict(timings, path),
            "timed": [{**form_to_data(f), "seconds": s} for f, s in found.items()],
        }
        for path, found in timings.seconds.items()
    ]


def _cell(timings: Timings, path: str, kind: type[Form]) -> str:
    able = {f: s for f, s in timings.seconds[path].items() if type(f) is kind}
    if not able:
        return ""
    form = min(able, key=lambda one: able[one])
    assert not isinstance(form, FullRank), form_name(form)
    return f"{form.execution} {_ms(able[form])}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
