"""``dynarank train``: train a recipe under one or several schedules."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dynarank.cli.interruption import GoOn
from dynarank.cli.job_runner import JobRunner, not_writable
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
    ScheduleOption,
    TestLimitOption,
    TrainLimitOption,
)
from dynarank.cli.processes import leader
from dynarank.cli.recipe_options import (
    RECIPE_HELP,
    BatchSizeOption,
    LearningRateOption,
    SetOption,
    change_recipe,
    complete_recipe,
)
from dynarank.cli.show import console, print_json, print_whole_words, progress, right_aligned
from dynarank.cli.train_settings import TrainSettings, find_train
from dynarank.files.ownership import new_folder
from dynarank.records import Metric, PhaseRecord, Run, SummaryRecord
from dynarank.report.formats import (
    bytes_text,
    count,
    number,
    plural,
    ratio,
    score_text,
    seconds_text,
)
from dynarank.report.tables import all_reduced_bytes
from dynarank.report.verdict import verdict
from dynarank.sinks import BACKENDS, open_sinks
from dynarank.train.checkpoint_plan import CheckpointPlan
from dynarank.train.recipes import RecipeError

__all__ = ["train"]


def train(
    recipe: Annotated[
        str | None, typer.Argument(help=RECIPE_HELP, autocompletion=complete_recipe)
    ] = None,
    data: DataOption = None,
    schedule: ScheduleOption = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Seed of weights, data and order; default: 0."),
    ] = None,
    rank: RankOption = None,
    decomposition: DecompositionOption = None,
    budget: BudgetOption = None,
    lr: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    overrides: SetOption = None,
    epochs: EpochsOption = None,
    train_limit: TrainLimitOption = None,
    test_limit: TestLimitOption = None,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Reproduce the published code, bugs included.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; default: that of the same run if it was interrupted, else "
                     "runs/RECIPE-TIME."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with this run folder and its settings."),
    ] = None,
    checkpoint_every: CheckpointOption = "10",  # pyright: ignore[reportArgumentType]
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
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Train RECIPE under one or several schedules.

    All schedules share the seed, initial weights and data order. The run folder holds config.json,
    records.jsonl and model.safetensors for each schedule, and one report.html for all.

    Ctrl-C (or SIGTERM) finishes the step and saves; the same command goes on, and so does
    `dynarank train --resume RUN`. A second Ctrl-C exits at once. Nothing is ever overwritten: a
    folder with other settings is refused.

    On several GPUs or machines: `torchrun --nproc-per-node 4 -m dynarank train RECIPE`. The
    processes share each batch, and the run is that of one process.
    """
    if resume is not None and out is not None:
        raise RecipeError(f"either --out or --resume, got --out {out} and --resume {resume}")
    home, stored = find_train(resume) if resume is not None else (out, None)
    terminal = console(quiet_stdout=as_json)
    settings = TrainSettings.of(recipe, stored)
    chosen = settings.recipe.published() if as_published else settings.recipe
    chosen = change_recipe(
        chosen, overrides, lr=lr, batch_size=batch_size, rank=rank,
        decomposition=decomposition, budget=budget,
    )  # fmt: skip
    settings = settings.with_options(
        schedule, recipe=chosen, seed=seed, epochs=epochs, train_limit=train_limit,
        test_limit=test_limit, compile=compile, measure=measure, noise=noise, data=data, log=log,
        precision=None if precision == "auto" else precision,
    )  # fmt: skip
    open_sinks(settings.backends, Path())  # fail on an unknown backend before reading any data
    runner = _runner(settings, progress(terminal, quiet), device, checkpoint_every)
    folder = home if home is not None else _place(settings, runner)
    jobs = settings.jobs(folder)
    lead = leader()
    words = "dynarank" if lead is None else lead.words
    go_on = GoOn(folder, (*words.split(), "train", "--resume", str(folder)), as_json)
    with runner.working_in(folder, jobs, _common(settings, runner), go_on):
        runs = {job.schedule: run for job, run in runner.runs(jobs, folder)}
        if runs:
            _print_result(terminal, settings, folder, runs, runner, as_json)
        runner.finish()


def _runner(
    settings: TrainSettings, terminal: Console, device: str, checkpoints: CheckpointPlan
) -> JobRunner:
    if (lead := leader()) is not None:
        device = lead.device(device)
    machine = choose_machine(
        device, settings.precision, settings.compile, settings.measure, settings.noise
    )
    return JobRunner(
        "train", terminal, machine, settings.data, settings.epochs, settings.train_limit,
        settings.test_limit, checkpoints, settings.backends,
    )  # fmt: skip


def _common(settings: TrainSettings, runner: JobRunner) -> dict[str, Any]:
    own = {"schedules", "seed", "compile", "measure", "noise", "log"}
    return runner.common(settings.recipe, **settings.model_dump(include=own))


def _place(settings: TrainSettings, runner: JobRunner) -> Path:
    """The folder in which the same run was interrupted, or a new one; a refused run has none."""
    name = settings.recipe.name
    common = {**_common(settings, runner), "data_digest": runner.check(settings.jobs(Path()))}
    for folder in sorted(Path("runs").glob(f"{name}-*"), reverse=True):
        with suppress(ValueError, OSError):
            if runner.goes_on(folder, settings.jobs(folder), common):
                runner.terminal.print(
                    f"{folder} was interrupted: it goes on (--out for another)", markup=False
                )
                return folder
    try:
        return new_folder(Path("runs"), f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    except OSError as error:
        raise not_writable(Path("runs"), error) from error


def _print_result(
    terminal: Console,
    settings: TrainSettings,
    folder: Path,
    runs: Mapping[str, Run],
    runner: JobRunner,
    as_json: bool,
) -> None:
    """Print the table of all schedules, or the same as JSON; write the page."""
    summaries = {name: run.summary for name, run in runs.items() if run.summary is not None}
    report = runner.write_page(folder)
    if as_json:
        told = {n: {**one.model_dump(), "phases": _phases(runs[n])} for n, one in summaries.items()}
        print_json({**runner.status(folder), "report": report, "runs": told})
        return
    title = f"{settings.recipe.name}, seed {settings.seed}, {plural(settings.epochs, 'epoch')}"
    _show(terminal, title, next(iter(runs.values())).header.metric, summaries)
    for name, run in runs.items():
        if run.header.processes > 1:
            terminal.print(_all_reduced(name, run), markup=False)
    if any("low-rank" in phase.forms for run in runs.values() for phase in run.all(PhaseRecord)):
        terminal.print(
            f"Every schedule ran at the recipe's learning rate, {settings.recipe.learning_rate:g}. "
            "Low-rank networks often want another than full-rank ones: tune it for each schedule."
        )
    terminal.print(verdict(list(runs.values())), markup=False)
    terminal.print(
        f"Run folder: {folder}" + (f"; report: {report}" if report else ""), markup=False
    )


def _phases(run: Run) -> list[dict[str, Any]]:
    """What the phases of a run cost; ``all_reduced_bytes`` of a process in the whole phase."""
    return [
        {**phase.model_dump(exclude={"kind"}), "end": end, "all_reduced_bytes": given}
        for phase, end, given in all_reduced_bytes(run)
    ]


def _all_reduced(name: str, run: Run) -> str:
    """What each process gave to be averaged, phase by phase."""
    told = [
        f"{bytes_text(given)} in epochs {number(phase.epoch)} to {number(end)}"
        for phase, end, given in all_reduced_bytes(run)
    ]
    return f"All-reduced by each of {run.header.processes} processes, {name}: {', '.join(told)}."


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
            "" if summary.test_score is None else score_text(summary.test_score, metric, 2),
            count(summary.trainable_parameters_peak),
            count(summary.trainable_parameters_mean),
            ratio(summary.relative_flops),
            bytes_text(summary.memory_bytes),
            seconds_text(summary.wall_seconds),
        )
    print_whole_words(terminal, table)
    terminal.print(
        "Training FLOPs: matrix products and convolutions of the steps, relative to full-rank; "
        "`dynarank plan` says what the passes before cuts add."
    )
