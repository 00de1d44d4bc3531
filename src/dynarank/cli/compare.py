"""``dynarank compare``: schedules side by side, over several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from rich.console import Console

from dynarank.cli.interruption import same_command
from dynarank.cli.job_runner import JobRunner
from dynarank.cli.machine import choose_machine
from dynarank.cli.options import (
    BudgetOption,
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
from dynarank.cli.show import console, print_json, print_whole_words, progress, right_aligned
from dynarank.records import Metric, Run, SummaryRecord
from dynarank.report.comparison import compare_scores, require_scipy
from dynarank.report.formats import (
    bytes_text,
    count,
    plural,
    ratio,
    score_text,
    seconds_text,
    spread_text,
)
from dynarank.report.verdict import verdict
from dynarank.train.grid import Job
from dynarank.train.recipes import RecipeError, load_recipe

__all__ = ["compare"]


def compare(
    recipe: RecipeArgument,
    schedules: Annotated[
        str,
        typer.Option(
            help="Comma-separated schedules; `dynarank schedules` lists them.",
            show_default="full-rank, low-rank, dynamic-rank",
        ),
    ] = "full-rank,low-rank,dynamic-rank",
    seeds: Annotated[int, typer.Option(min=1, max=1_000, help="Number of seeds: 0, 1, ...")] = 3,
    data: DataOption = None,
    rank: RankOption = None,
    decomposition: DecompositionOption = None,
    budget: BudgetOption = None,
    lr: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    overrides: SetOption = None,
    epochs: EpochsOption = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; default: runs/compare-RECIPE.")
    ] = None,
    checkpoint_every: CheckpointOption = "10",  # pyright: ignore[reportArgumentType]
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Train RECIPE under several schedules and seeds, and test which differences are significant.

    Can be interrupted and rerun: finished runs are kept, an unfinished one goes on where it was,
    and more seeds or schedules are added to them. Runs with other settings or data are refused,
    never mixed or deleted. For each seed all schedules share initial weights and data order. Mean
    and standard deviation are over seeds.
    """
    terminal = console(quiet_stdout=as_json)
    chosen = change_recipe(
        load_recipe(recipe), overrides, lr=lr, batch_size=batch_size, rank=rank,
        decomposition=decomposition, budget=budget,
    )  # fmt: skip
    names = list(dict.fromkeys(name.strip() for name in schedules.split(",")))
    for name in names:
        chosen.check_schedule(name)
    require_scipy()
    machine = choose_machine(device, precision)
    runner = JobRunner("compare", progress(terminal, quiet), machine, data,
                       epochs or chosen.epochs, train_limit, test_limit,
                       checkpoint_every)  # fmt: skip
    folder = out or Path("runs") / f"compare-{chosen.name}"
    jobs = [
        Job(folder / f"seed{seed}" / name, chosen, name, seed)
        for seed in range(seeds)
        for name in names
    ]
    with runner.working_in(folder, jobs, runner.common(chosen), same_command(folder, as_json)):
        done = list(runner.runs(jobs, folder))
        if not done:
            runner.finish()
            raise RecipeError(f"no run in {folder} finished")
        grouped = {n: [run for job, run in done if job.schedule == n] for n in names}
        title = f"{chosen.name}, {plural(runner.epochs, 'epoch')}"
        finished = {name: runs for name, runs in grouped.items() if runs}
        _print_result(terminal, title, finished, folder, runner, as_json)
        runner.finish()


def _print_result(
    terminal: Console,
    title: str,
    grouped: Mapping[str, Sequence[Run]],
    folder: Path,
    runner: JobRunner,
    as_json: bool,
) -> None:
    """Print the scores and costs of each schedule, and which differences are significant."""
    metric = next(iter(grouped.values()))[0].header.metric
    sentences = compare_scores({n: _scores(runs) for n, runs in grouped.items()}, metric)
    page = runner.write_page(folder)
    if as_json:
        found = {name: _figures(runs) for name, runs in grouped.items()}
        result = {**runner.status(folder), "report": page, "metric": metric.model_dump(),
                  "schedules": found, "sentences": sentences}  # fmt: skip
        print_json(result)
        return
    _show(terminal, title, metric, grouped)
    terminal.print(verdict([run for runs in grouped.values() for run in runs]), markup=False)
    for sentence in sentences:
        terminal.print(sentence)
    terminal.print(f"Runs: {folder}" + (f"; report: {page}" if page else ""), markup=False)


def _scores(runs: Sequence[Run]) -> list[float]:
    scores = [_summary(run).test_score for run in runs]
    return [score for score in scores if score is not None]  # a run of `train` has one


def _summary(run: Run) -> SummaryRecord:
    assert run.summary is not None
    return run.summary


_COSTS: dict[str, tuple[Callable[[SummaryRecord], float], Callable[[float], str]]] = {
    "trainable peak": (lambda s: s.trainable_parameters_peak, count),
    "trainable mean": (lambda s: s.trainable_parameters_mean, count),
    "training FLOPs": (lambda s: s.relative_flops, ratio),
    "peak memory": (lambda s: s.memory_bytes, bytes_text),
    "training": (lambda s: s.train_seconds, seconds_text),
    "wall-clock": (lambda s: s.wall_seconds, seconds_text),
}

# The columns of the table, short enough for a terminal of 80 characters.
_COLUMNS = {
    "peak": "trainable peak",
    "mean": "trainable mean",
    "FLOPs": "training FLOPs",
    "memory": "peak memory",
    "time": "wall-clock",
}


def _figures(runs: Sequence[Run]) -> dict[str, Any]:
    """One schedule's results as plain data: n, mean and spread of the score, mean costs."""
    scores = _scores(runs)
    costs = {
        name.replace(" ", "_"): fmean(value(_summary(run)) for run in runs)
        for name, (value, _) in _COSTS.items()
    }
    return {
        "n": len(scores),
        "mean": fmean(scores),
        "sd": stdev(scores) if len(scores) > 1 else None,
        "scores": scores,
        **costs,
    }


def _show(
    terminal: Console, title: str, metric: Metric, grouped: Mapping[str, Sequence[Run]]
) -> None:
    table = right_aligned(title, ["schedule"], ["n", metric.name, *_COLUMNS])
    for name, runs in grouped.items():
        found = _figures(runs)
        spread = "" if found["sd"] is None else f" ± {spread_text(found['sd'], metric, 2)}"
        costs = (
            written(fmean(value(_summary(run)) for run in runs))
            for value, written in map(_COSTS.__getitem__, _COLUMNS.values())
        )
        score = score_text(found["mean"], metric, 2) + spread
        table.add_row(name, str(found["n"]), score, *costs)
    print_whole_words(terminal, table)
    terminal.print(
        f"{metric.name.capitalize()}: on the test set. Peak and mean: trainable parameters. FLOPs: "
        "of training, relative to full-rank. Memory: the peak. Time: wall-clock."
    )
