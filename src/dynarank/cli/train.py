"""``dynarank train``: train a recipe under one or several schedules."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dynarank.cli.job_runner import write_page
from dynarank.cli.machine import choose_machine
from dynarank.cli.options import (
    BudgetOption,
    DataOption,
    DecompositionOption,
    DeviceOption,
    EpochsOption,
    PrecisionOption,
    RankOption,
    ScheduleOption,
    TestLimitOption,
    TrainLimitOption,
)
from dynarank.cli.show import ProgressListener, console, print_whole_words, right_aligned
from dynarank.records import Metric, SummaryRecord
from dynarank.report.formats import bytes_text, count, plural, ratio, score_text, seconds_text
from dynarank.schedules.catalog import get_preset
from dynarank.sinks import BACKENDS, open_sinks
from dynarank.train.recipes import Recipe, RecipeError, load_recipe, recipe_names
from dynarank.train.run import run_schedule
from dynarank.train.schedules import check_schedules
from dynarank.train.tasks import make_task

__all__ = ["train"]


def train(
    recipe: Annotated[str, typer.Argument(help=f"One of: {', '.join(recipe_names())}.")],
    data: DataOption = None,
    schedule: ScheduleOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, data and order.")] = 0,
    rank: RankOption = None,
    decomposition: DecompositionOption = None,
    budget: BudgetOption = None,
    epochs: EpochsOption = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Reproduce the published code, bugs included.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/RECIPE-TIME.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the layers first; low-rank only where faster.")
    ] = False,
    noise: Annotated[
        bool, typer.Option("--noise", help="Also measure the gradient noise scale (experimental): "
                           "four more steps per epoch.")
    ] = False,
    log: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated logging backends: {', '.join(BACKENDS)}."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Train RECIPE under one or several schedules.

    All schedules share the seed, initial weights and data order. The run folder holds config.json,
    records.jsonl and model.safetensors for each schedule, and one report.html for all.
    """
    chosen = load_recipe(recipe)
    chosen = chosen.published() if as_published else chosen
    chosen = chosen.with_factors(rank, decomposition).with_budget(budget)
    schedules = _schedules(schedule, chosen)
    backends = [name.strip() for name in log.split(",")] if log else []
    machine = choose_machine(device, precision, compile, measure, noise)
    folder = out or Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    if any(folder.rglob("records.jsonl")):
        raise RecipeError(f"{folder} already holds a run; pass another folder with --out")
    open_sinks(backends, folder)  # fail on an unknown backend before reading any data
    task = make_task(
        chosen, data, seed=seed, device=machine.device, train_limit=train_limit,
        test_limit=test_limit,
    )  # fmt: skip
    terminal = console(quiet_stdout=as_json)
    length = epochs or chosen.epochs
    check_schedules([(chosen, name) for name in schedules], task, length, measure=measure)

    def run(name: str) -> SummaryRecord:
        place = folder / name if len(schedules) > 1 else folder
        with ProgressListener(terminal, name, length, task.metric) as listener:
            return run_schedule(
                chosen, name, task, place, listener, seed=seed, epochs=length, machine=machine,
                sinks=open_sinks(backends, place),
            )  # fmt: skip

    summaries = {name: run(name) for name in schedules}
    report = write_page(folder, terminal)
    if as_json:
        runs = {name: summary.model_dump() for name, summary in summaries.items()}
        print(json.dumps({"folder": str(folder), "report": report, "runs": runs}, indent=2))
        return
    title = f"{chosen.name}, seed {seed}, {plural(length, 'epoch')}"
    _show(terminal, title, task.metric, summaries)
    terminal.print(f"Run folder: {folder}" + (f"; report: {report}" if report else ""))


def _schedules(asked: str | None, recipe: Recipe) -> list[str]:
    names = [name.strip() for name in asked.split(",")] if asked else list(recipe.schedules)
    for name in names:
        get_preset(name)
    return list(dict.fromkeys(names))


def _show(
    terminal: Console, title: str, metric: Metric, summaries: dict[str, SummaryRecord]
) -> None:
    numbers = [
        f"test {metric.name}",
        "trainable peak",
        "trainable mean",
        "training FLOPs",
        "peak memory",
        "wall-clock",
    ]
    table = right_aligned(title, ["schedule"], numbers)
    for name, summary in summaries.items():
        table.add_row(
            name,
            score_text(summary.test_score, metric, 2),
            count(summary.trainable_parameters_peak),
            count(summary.trainable_parameters_mean),
            ratio(summary.relative_flops),
            bytes_text(summary.memory_bytes),
            seconds_text(summary.wall_seconds),
        )
    print_whole_words(terminal, table)
    terminal.print("Training FLOPs: matrix products and convolutions, relative to full-rank.")
