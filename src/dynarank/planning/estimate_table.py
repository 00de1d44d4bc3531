"""The tables of an estimate: layers and phases, in at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from dynarank.cost.flops import Flops, LayerUse, ModelUse, share_of
from dynarank.forms import Form, FullRank, Within, form_name
from dynarank.planning.estimate_phase import PhaseEstimate, break_even
from dynarank.surgery.survey_table import grouped

__all__ = [
    "WIDTH",
    "break_even_table",
    "bytes_text",
    "calibration_text",
    "flops_text",
    "joined",
    "layer_table",
    "phase_table",
]

WIDTH = 100
_PATH, _SHAPE = 28, 12  # columns
_FORM = f"{'form':<14}{'parameters':>11}{'FLOPs':>9}{'of full':>9}"


def joined(head: str, layers: Sequence[str], phases: Sequence[str], notes: Sequence[str]) -> str:
    """The tables with lines between them, then the notes, wrapped."""
    rule = "=" * WIDTH
    told = [line for note in notes for line in textwrap.wrap(note, WIDTH, break_on_hyphens=False)]
    lines = [head, rule, *layers, rule, *phases, rule, *told]
    return "\n".join(line.rstrip() for line in lines)


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """What passes through the network before cuts; empty if no cut is measured on batches.

    Example:
        >>> calibration_text({"cuts": 2, "batches": 16, "relative_flops": 0.25})
        'Before the 2 cuts 16 batches pass through the network: 0.250x, not in the training FLOPs.'
    """
    if not (cuts := calibration["cuts"]):
        return ""
    share = calibration["relative_flops"]
    before = "the cut" if cuts == 1 else f"the {cuts} cuts"
    costs = "" if share is None else f": {share:.3f}x"
    batches = f"{calibration['batches']} batches"
    return f"Before {before} {batches} pass through the network{costs}, not in the training FLOPs."


def layer_table(use: ModelUse, paths: Iterable[str], phases: Sequence[PhaseEstimate]) -> list[str]:
    """The form of each layer in each phase, and what it costs; like layers in one row."""
    rows = [
        (path, (_shape(use.layers[path]), *_forms(use.layers[path], path, phases)))
        for path in paths
    ]
    lines = [f"{'layer':{_PATH}} {'weight':{_SHAPE}} {'phase':>7}  {_FORM}"]
    for name, (shape, *forms) in grouped(rows):
        first, *more = forms
        lines += _named(name, f"{shape:{_SHAPE}} {first}")
        lines += [" " * (_PATH + _SHAPE + 2) + line for line in more]
    return lines


def break_even_table(use: ModelUse, paths: Iterable[str]) -> list[str]:
    """Each layer as it is, and the ranks at which its factors would cost as much as its weight."""
    lines = [
        f"{'break-even rank by':>{WIDTH}}",
        f"{'layer':{_PATH}} {'weight':{_SHAPE}} {_FORM} {'params':>7}{'FLOPs':>7}",
    ]
    for name, (shape, row) in grouped((path, _as_it_is(use.layers[path])) for path in paths):
        lines += _named(name, f"{shape:{_SHAPE}} {row}")
    return lines


def phase_table(
    phases: Sequence[PhaseEstimate], full: Flops, *, spans: bool, reduced: bool = False
) -> list[str]:
    """The parameters, FLOPs and memory of the model in each phase, and all-reduced bytes."""
    seconds = f"{'s/step':>9}" if any(one.measured for one in phases) else ""
    lines = [
        f"{'phase':5} {'steps':>13}{'trainable':>12}{'FLOPs':>10}{'of full':>8}"
        f"{'params':>8}{'grads':>8}{'optim':>8}{'activ':>8}{'total':>8}{seconds}"
    ]
    for number, one in enumerate(phases, start=1):
        cost, memory = one.cost, one.memory
        sizes = (memory.parameters + memory.buffers, memory.gradients, memory.optimizer,
                 memory.activations, memory.total)  # fmt: skip
        time = f"{one.measured.seconds:9.3g}" if one.measured else ""
        span = f"{one.start}..{one.stop - 1}" if spans else ""
        lines.append(
            f"{number:5} {span:>13}{cost.trainable_parameters:12,}"
            f"{flops_text(one.flops.training):>10}"
            f"{share_of(one.flops.training, full.training):7.3f}x"
            + "".join(f"{bytes_text(size):>8}" for size in sizes)
            + time
        )
        more = [f"{n} {name}" for name, n in one.forms.items()]
        if reduced:
            more.append(f"all-reduced {bytes_text(memory.gradients)} a step")
        if more:
            lines.append("      " + ", ".join(more))
    return lines


def _named(name: str, rest: str) -> list[str]:
    """A row; a name too long for its column has a line of its own."""
    if len(name) > _PATH:  # cut, two layers could look the same
        return [name, f"{'':{_PATH}} {rest}"]
    return [f"{name:{_PATH}} {rest}"]


def _forms(use: LayerUse, path: str, phases: Sequence[PhaseEstimate]) -> tuple[str, ...]:
    """A layer's forms, those of successive phases in one line if they are the same."""
    held = [
        (number, one.cost.plan[path], isinstance(one.cost.phase.plan[path], Within))
        for number, one in enumerate(phases, start=1)
        if path in one.cost.plan
    ]
    lines: list[str] = []
    for (form, about), group in groupby(held, key=lambda one: one[1:]):
        numbers = [number for number, *_ in group]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        lines.append(f"{span:>7}  {_costs(use, form, '~' if about else '')}")
    return tuple(lines)


def _as_it_is(use: LayerUse) -> tuple[str, str]:
    ranks = break_even(use)
    flops = "-" if ranks["flops"] is None else f"{ranks['flops']}"
    return _shape(use), f"{_costs(use, use.form)} {ranks['parameters']:>7}{flops:>7}"


def _costs(use: LayerUse, form: Form, about: str = "") -> str:
    resolved, name = use.spec.resolve(form), form_name(form)
    if not isinstance(resolved, FullRank):
        kind = name if resolved.decomposition == "svd" else resolved.decomposition
        name = f"{kind} {about}{resolved.rank}"
    flops, full = use.flops(form).training, use.flops(FullRank()).training
    ratio = f"{share_of(flops, full):.3f}x" if full else "-"
    return f"{name:<14}{use.parameters(form)[1]:>11,}{flops_text(flops):>9}{ratio:>9}"


def _shape(use: LayerUse) -> str:
    return "x".join(map(str, use.shape))


def flops_text(count: float) -> str:
    """A number of FLOPs with three digits: ``2.80M``."""
    return _scaled(count, 1000, " KMGTPE").strip()


def bytes_text(count: float | None) -> str:
    """A number of bytes in at most seven characters: ``12.3M``."""
    return "?" if count is None else _scaled(count, 1024, "BKMGTP")


def _scaled(value: float, base: int, units: str) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g}{units[power]}"
