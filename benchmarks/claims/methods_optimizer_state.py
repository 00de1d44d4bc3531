"""Optimizer state: policies compared, and the cost of kept gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.training.studies.moments import PHASE, RANK
from dynarank.monitors.gradient_window import WINDOW
from dynarank.train.data import load_digits_data

from .methods_shared import number, row, spread
from .records import deviation, mean, read_json, read_lines, select, values
from .words import part

PAGE = "docs/methods/optimizer-state.md"
SETTINGS = (
    "2 bytes per entry and gradient",
    "| | loss, 5 | 20 | 99 |",
    "| | loss, 5 | 20 | 49 |",
    "| | project | calibrated by 4 | 8 | 16 | 32 |",
    "kept 32 (64 bytes)",
)
MOMENTS = "training/studies/moments"
CHANGES = {
    "low-rank to full": ("low-full-low", 1),
    "full to low-rank": ("low-full-low", 2),
    "full to adapted": ("low-full-adapted", 2),
    "adapted to full": ("full-adapted-full", 2),
}
KEPT = (0, 4, 8, 16, 32)  # gradients; none: projected
PROJECT = {"moments": "project"}


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    yield from _perceptron()
    yield from _deflated()
    yield from _convolutional()
    yield from _second_moments()
    yield f"Therefore {WINDOW} gradients are kept by default ({2 * WINDOW} bytes per entry)"
    yield from _cost()
    yield f"one test image is {100 / len(load_digits_data().test_labels):.2f} points"


def _results(change: str = "1", **fields: Any) -> list[list[float]]:
    """Return the loss at three times after a change and the final accuracy, each of all seeds."""
    runs = select(read_lines(f"{MOMENTS}/runs.jsonl"), **fields)
    rows = [[*run["losses"][change][1:], run["accuracy"]] for run in runs]
    return [list(column) for column in zip(*rows, strict=True)]


def _ahead(change: str = "1", **fields: Any) -> list[list[float]]:
    """Return the results minus those of `project` on the same seeds."""
    pairs = zip(_results(change, **fields), _results(change, **fields | PROJECT), strict=True)
    return [[a - b for a, b in zip(one, base, strict=True)] for one, base in pairs]


def _signed(differences: list[float], digits: int) -> str:
    return f"{mean(differences):+.{digits}f} ± {deviation(differences):.{digits}f}"


def _perceptron() -> Iterator[str]:
    for name, optimizer in (("AdamW", "adamw"), ("SGD", "sgd")):
        fields = {"task": "mlp", "schedule": "low-full-adapted", "optimizer": optimizer}
        steps = PHASE["mlp"]
        yield (
            f"a 64-128-128-10 MLP, a {part(RANK.value)} of the rank, {steps} steps per phase, "
            f"{number(*_results(**fields | PROJECT))} paired seeds; training loss 5 / 20 / "
            f"{steps - 1} steps after"
        )
        for policy in ("reset", "project", "calibrated"):
            *losses, accuracy = _results(**fields, moments=policy)
            cells = [f"{name}, {policy}", *(f"{mean(loss):.4f}" for loss in losses)]
            if policy == "project":
                yield row(*cells, spread(accuracy, 2), "")
            elif (name, policy) != ("SGD", "calibrated"):  # equals SGD, project
                difference = _ahead(**fields, moments=policy)[-1]
                yield row(*cells, f"{mean(accuracy):.2f}", _signed(difference, 2))


def _deflated() -> Iterator[str]:
    fields = {"task": "mlp", "schedule": "low-full-low", "optimizer": "adamw"}
    losses = [
        f"{policy} {mean(_results('2', **fields, moments=policy)[0]):.4f}"
        for policy in ("reset", "project", "calibrated")
    ]
    yield f"Five steps after deflating to low-rank, AdamW: {', '.join(losses)}"
    for policy in ("calibrated", "reset"):
        yield f"{policy} {_signed(_ahead('2', **fields, moments=policy)[0], 4)}"


def _convolutional() -> Iterator[str]:
    fields = {"task": "conv", "schedule": "low-full-adapted", "optimizer": "adamw"}
    *losses, accuracy = _results(**fields | PROJECT)
    steps = PHASE["conv"]
    yield (
        f"({steps} steps per phase, n = {len(accuracy)} pairs; fewer than planned), inflating from "
        f"low-rank, training loss at 5 / 20 / {steps - 1} steps"
    )
    yield row("project", *(spread(loss, 3) for loss in losses), spread(accuracy, 2))
    for policy in ("reset", "calibrated"):
        cells = [_signed(column, 2) for column in _ahead(**fields, moments=policy)]
        yield row(f"{policy}, relative to project", *cells)
    rises = [_rises(**fields, moments=policy) for policy in ("project", "calibrated", "reset")]
    above = f"{rises[0]} of {len(accuracy)} seeds"
    yield (
        f'above the one before inflation on {above} under `"project"`, '
        f'on {rises[1]} under `"calibrated"`, on {rises[2]} under `"reset"`'
    )


def _rises(**fields: Any) -> int:
    """Return on how many seeds the loss is higher 20 steps after a change than before it."""
    losses = [run["losses"]["1"] for run in select(read_lines(f"{MOMENTS}/runs.jsonl"), **fields)]
    return sum(after > before for before, _, after, _ in losses)


def _second_moments() -> Iterator[str]:
    rows = read_lines(f"{MOMENTS}/errors.jsonl")
    for name, (schedule, change) in CHANGES.items():
        one = select(rows, schedule=schedule, change=change)
        yield f"the MLP, {number(*(select(one, length=n) for n in KEPT))}; median"
        yield row(name, *(f"{mean(values(one, 'median', length=n)):.2f}" for n in KEPT))


def _cost() -> Iterator[str]:
    record = read_json(f"{MOMENTS}/window_cost.json")
    none, few, many = record["rows"]
    step, most = few["step_s"] / none["step_s"], many["step_s"] / none["step_s"]
    yield f"take {step:.2f}x as long"
    yield f"took {few['deflate_s']:.2f} s instead of {none['deflate_s']:.2f} s"
    yield f"with {many['kept']} gradients {most:.2f}x and {many['deflate_s']:.2f} s"
    yield f"medians of {record['steps']} steps and {record['cuts']} cuts"
