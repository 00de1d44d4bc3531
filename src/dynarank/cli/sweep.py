"""``dynarank sweep``: a grid over the epochs of inflation and deflation."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.console import Console

from dynarank.cli.interruption import same_command
from dynarank.cli.job_runner import JobRunner
from dynarank.cli.machine import choose_machine
from dynarank.cli.options import (
    CheckpointOption,
    DataOption,
    DecompositionOption,
    DeviceOption,
    EpochsOption,
    PrecisionOption,
    QuietOption,
    RankOption,
    TestLimitOption,
    TrainLimitOption,
)
from dynarank.cli.recipe_options import (
    BatchSizeOption,
    LearningRateOption,
    RecipeArgument,
    SetOption,
    change_recipe,
)
from dynarank.cli.show import console, print_json, progress, right_aligned
from dynarank.files.nearest import did_you_mean
from dynarank.records import Metric
from dynarank.report.formats import number, score_text
from dynarank.report.plotting import save_figure
from dynarank.report.sweep import best_cell, best_cells, sweep_figure
from dynarank.train.grid import Job
from dynarank.train.recipes import Recipe, RecipeError, load_recipe

__all__ = ["sweep"]

Cell = tuple[float, float]

_MOST_EPOCHS = 1_000  # of an axis
_SCHEDULES = ("dynamic-rank", "dynamic-rank-low")


def sweep(
    recipe: RecipeArgument,
    inflate: Annotated[
        str, typer.Option(help="Inflation epochs, on the recipe's own scale: 20,40,60 or "
                          "FROM:TO:STEP, end included.")
    ],
    deflate: Annotated[str, typer.Option(help="Deflation epochs, in the same format.")],
    seeds: Annotated[int, typer.Option(min=1, max=1_000, help="Number of seeds: 0, 1, ...")] = 1,
    schedule: Annotated[
        str, typer.Option(help="dynamic-rank, or dynamic-rank-low (deflates to low-rank).")
    ] = "dynamic-rank",
    data: DataOption = None,
    rank: RankOption = None,
    decomposition: DecompositionOption = None,
    lr: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    overrides: SetOption = None,
    epochs: EpochsOption = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: runs/sweep-RECIPE.")
    ] = None,
    checkpoint_every: CheckpointOption = "10",  # pyright: ignore[reportArgumentType]
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Train RECIPE over a grid of inflation and deflation epochs, and draw a heat-map.

    Cells that would deflate before they inflate are skipped. Can be interrupted and rerun: finished
    runs are kept, so that a finer grid adds to a coarse one, and an unfinished one goes on where it
    was. Runs with other settings or data are refused, never mixed or deleted.
    """
    if schedule not in _SCHEDULES:
        raise RecipeError(
            f"a sweep varies the inflation and deflation epochs: --schedule must be dynamic-rank "
            f"or dynamic-rank-low, got {schedule!r}{did_you_mean(schedule, _SCHEDULES)}"
        )
    terminal = console(quiet_stdout=as_json)
    chosen = change_recipe(
        load_recipe(recipe), overrides, lr=lr, batch_size=batch_size, rank=rank,
        decomposition=decomposition,
    )  # fmt: skip
    cells = grid(parse_epochs(inflate), parse_epochs(deflate), chosen.epochs)
    machine = choose_machine(device, precision)
    runner = JobRunner("sweep", progress(terminal, quiet), machine, data, epochs or chosen.epochs,
                       train_limit, test_limit, checkpoint_every)  # fmt: skip
    folder = out or Path("runs") / f"sweep-{chosen.name}"
    at = {_place(folder, cell, seed): (seed, cell) for seed in range(seeds) for cell in cells}
    jobs = [Job(place, _at(chosen, cell), schedule, seed) for place, (seed, cell) in at.items()]
    common = runner.common(chosen, schedule=schedule)
    with runner.working_in(folder, jobs, common, same_command(folder, as_json)):
        scores: dict[Cell, list[float]] = {cell: [] for cell in cells}
        metric = Metric()
        for job, run in runner.runs(jobs, folder):
            assert run.summary is not None and run.summary.test_score is not None
            metric = run.header.metric
            scores[at[job.folder][1]].append(run.summary.test_score)
        _print_result(terminal, chosen.name, scores, metric, folder, runner, as_json)
        runner.finish()


def _print_result(
    terminal: Console,
    name: str,
    scores: dict[Cell, list[float]],
    metric: Metric,
    folder: Path,
    runner: JobRunner,
    as_json: bool,
) -> None:
    """Draw the heat-map, and print the grid as a table or as JSON."""
    pictures = _draw(folder, scores, metric, name, runner)
    if as_json:
        rows = [{"inflate": i, "deflate": d, "scores": s} for (i, d), s in scores.items()]
        result = {**runner.status(folder), "pictures": pictures, "metric": metric.model_dump(),
                  "cells": rows, "best": best_cell(scores, metric)}  # fmt: skip
        print_json(result)
        return
    _show(terminal, scores, metric, name)
    terminal.print(f"Runs: {folder}" + "".join(f"; {p}" for p in pictures), markup=False)


def parse_epochs(text: str) -> list[float]:
    """Parse ``20,40,60`` or ``20:60:20``.

    Raises:
        RecipeError: the text is in neither format.

    Example:
        >>> parse_epochs("20:60:20"), parse_epochs("5,7.5")
        ([20.0, 40.0, 60.0], [5.0, 7.5])
    """
    try:
        if ":" in text:
            first, last, step = map(float, text.split(":"))
            if step > 0 and last >= first and last - first < _MOST_EPOCHS * step:
                return [first + i * step for i in range(int((last - first) / step + 1e-9) + 1)]
            raise ValueError
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise RecipeError(
            f"epochs must be a list like 20,40,60 or FROM:TO:STEP with a positive step, of at most "
            f"{_MOST_EPOCHS:,} epochs, got {text!r}"
        ) from None


def grid(inflate: list[float], deflate: list[float], epochs: int) -> list[Cell]:
    """The (inflate, deflate) cells with ``0 < inflate < deflate < epochs``.

    Raises:
        RecipeError: there is none.
    """
    cells = [(i, d) for i in inflate for d in deflate if 0 < i < d < epochs]
    if not cells:
        raise RecipeError(
            f"no pair of --inflate {inflate} and --deflate {deflate} satisfies "
            f"0 < inflate < deflate < {epochs}"
        )
    return cells


def _at(recipe: Recipe, cell: Cell) -> Recipe:
    return recipe.with_settings({"inflate": cell[0], "deflate": cell[1]})


def _place(folder: Path, cell: Cell, seed: int) -> Path:
    return folder / f"inflate{number(cell[0], 12)}-deflate{number(cell[1], 12)}" / f"seed{seed}"


def _draw(
    folder: Path, scores: dict[Cell, list[float]], metric: Metric, name: str, runner: JobRunner
) -> list[str]:
    with runner.showing("figure"):
        figure = sweep_figure(scores, metric, f"{name}: mean test {metric.name}")
        pictures = [folder / f"sweep.{suffix}" for suffix in ("png", "svg")]
        for place in pictures:
            save_figure(figure, place)
        return list(map(str, pictures))
    return []


def _show(terminal: Console, scores: dict[Cell, list[float]], metric: Metric, name: str) -> None:
    down, across = (sorted({cell[axis] for cell in scores}) for axis in (1, 0))
    title = f"{name}: mean test {metric.name}, deflate down, inflate across"
    terminal.print(title, style="bold", markup=False)  # often wider than the table
    table = right_aligned("", ["deflate"], [number(i) for i in across])
    best = best_cells(scores, metric)
    for d in reversed(down):
        table.add_row(
            number(d), *(_cell(scores.get((i, d)), metric, (i, d) in best) for i in across)
        )
    terminal.print(table)


def _cell(scores: list[float] | None, metric: Metric, best: bool) -> str:
    if not scores:
        return "" if scores is None else "-"
    text = score_text(fmean(scores), metric, 2)
    return f"[bold]{text}*[/]" if best else text
