"""``dynarank probe``: whether a rank schedule has anything to gain on a recipe."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.progress import Progress

from dynarank.cli.machine import choose_machine
from dynarank.cli.options import (
    DataOption,
    DecompositionOption,
    DeviceOption,
    PrecisionOption,
    QuietOption,
    TrainLimitOption,
    parse_rank,
)
from dynarank.cli.recipe_options import (
    BatchSizeOption,
    LearningRateOption,
    RecipeArgument,
    SetOption,
    change_recipe,
)
from dynarank.cli.show import console, print_json, progress
from dynarank.planning.headroom import runs
from dynarank.train.probe import probe_recipe, probe_steps
from dynarank.train.recipes import RecipeError, load_recipe
from dynarank.train.tasks import make_task

__all__ = ["probe"]


def probe(
    recipe: RecipeArgument,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="RANKS",
            help="Comma-separated ranks, such as 0.125,0.25,0.5 (shares of the layer's own cost) "
            "or 16 (a rank). Default: the recipe's rank.",
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            help="Length of the whole probe, as a share of the steps of a run: all its runs "
            "together. Each has at least 100 steps."
        ),
    ] = 0.05,
    seeds: Annotated[
        int, typer.Option(min=1, max=1_000, help="Number of seeds, for the error.")
    ] = 2,
    data: DataOption = None,
    decomposition: DecompositionOption = None,
    lr: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    overrides: SetOption = None,
    train_limit: TrainLimitOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:  # fmt: skip
    """Say in a few short runs whether a rank schedule can gain on RECIPE, and which rank it needs.

    Three arms train on the same batches: full rank; low rank from scratch; and full rank first,
    then cut to the cost of low rank. Headroom is the share of low rank's loss above full rank that
    the third arm recovers: a schedule that comes down from full rank can gain that much. Without
    headroom, fixed low rank is the best that can be done for its FLOPs. Each arm counts at the best
    of three learning rates. Nothing is written.

    Short runs see the beginning of training only: "no gap" in a very short probe may open later.
    """
    if not 0 < share <= 1:
        raise RecipeError(f"--share is a share of the steps of a run, in (0, 1], got {share}")
    terminal = console(quiet_stdout=as_json)
    chosen = change_recipe(
        load_recipe(recipe), overrides, lr=lr, batch_size=batch_size,
        decomposition=decomposition,
    )  # fmt: skip
    ranks = (
        [parse_rank(one.strip()) for one in rank.split(",")] if rank is not None else [chosen.rank]
    )
    machine = choose_machine(device, precision)
    shown = progress(terminal, quiet)
    torch.manual_seed(0)
    task = make_task(chosen, data, seed=0, device=machine.device, train_limit=train_limit)
    steps = probe_steps(chosen, task, share, len(ranks), seeds)
    whole = steps * runs(len(ranks), seeds) / (chosen.epochs * task.steps_per_epoch)
    said = f"{runs(len(ranks), seeds)} runs of {steps} steps, {whole:.0%} of the steps of a run"
    shown.print(f"{chosen.name}: {said}", markup=False)
    with Progress(console=shown, transient=True, disable=not shown.is_terminal) as bar:
        bar_of = bar.add_task("probing")
        found = probe_recipe(
            chosen,
            task,
            machine,
            ranks,
            steps=steps,
            seeds=seeds,
            progress=lambda done, total: bar.update(bar_of, completed=done, total=total),
        )
    if as_json:
        print_json({"recipe": chosen.name, **found.to_data()})
    else:
        terminal.print(f"{found}" if quiet else f"\n{found}", markup=False)
