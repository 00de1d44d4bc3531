"""``dynarank plan``: what a recipe costs under a schedule, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from torch.utils._pytree import tree_leaves

from dynarank.cli.machine import choose_machine
from dynarank.cli.options import BudgetOption, DecompositionOption, RankOption
from dynarank.cli.recipe_options import (
    BatchSizeOption,
    LearningRateOption,
    RecipeArgument,
    SetOption,
    change_recipe,
)
from dynarank.cli.show import console, print_json, print_whole_words, right_aligned
from dynarank.cli.timings import show_timings, time_layers, timings_data
from dynarank.cost.flops import LayerUse, ModelUse, trace
from dynarank.cost.schedule import PhaseCost, ScheduleCost, cost_schedule
from dynarank.forms import Adapted, Form, FullRank, Rank, RankLike, Within, form_name
from dynarank.planning.estimate import estimate_phases
from dynarank.planning.estimate_phase import PhaseEstimate, layer_data
from dynarank.planning.estimate_table import calibration_text
from dynarank.report.formats import bytes_text, count, number, ratio
from dynarank.schedules.timelines import Phase
from dynarank.surgery.selection import select, why_left
from dynarank.surgery.site import Site
from dynarank.surgery.sites import survey
from dynarank.train.loop import calibration_batches
from dynarank.train.optimizers import make_optimizer, optimizer_slots
from dynarank.train.rates import forecast_rates
from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.schedules import make_schedule, passing_forward, with_default_layers
from dynarank.train.task import Sketch
from dynarank.train.tasks import sketch

__all__ = ["plan"]


def plan(
    recipe: RecipeArgument,
    schedule: Annotated[
        str,
        typer.Option(help="A schedule; `dynarank schedules` lists them."),
    ] = "dynamic-rank",
    as_published: Annotated[
        bool, typer.Option("--as-published", help="Plan exactly what the published code runs.")
    ] = False,
    rank: RankOption = None,
    decomposition: DecompositionOption = None,
    budget: BudgetOption = None,
    lr: LearningRateOption = None,
    batch_size: BatchSizeOption = None,
    overrides: SetOption = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Show what so many processes all-reduce a step, with DDP."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every form of every layer on this machine.")
    ] = False,
    device: Annotated[str, typer.Option(help="For --measure: auto, cpu, cuda, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="For --measure: auto, fp32 or bf16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what RECIPE costs, per layer and per phase: form, rank, parameters, FLOPs, memory.

    FLOPs are of matrix products and convolutions in forward and backward pass (1 multiply-add = 2),
    relative to full-rank training. Nothing is trained, and no data is read but a batch of your
    own. With --measure, each
    layer's forms are timed on this machine, to find layers that run faster at full rank.
    """
    terminal = console(quiet_stdout=as_json)
    chosen = load_recipe(recipe)
    chosen = chosen.published() if as_published else chosen
    chosen = change_recipe(
        chosen, overrides, lr=lr, batch_size=batch_size, rank=rank,
        decomposition=decomposition, budget=budget,
    )  # fmt: skip
    machine = choose_machine(device, precision)
    drawn = sketch(chosen)
    sites = survey(drawn.model)
    left = _left(sites, chosen)
    chosen = with_default_layers(chosen, drawn.model)
    layers = [site.path for site in select(sites, chosen.layers)]
    with passing_forward(chosen):
        use = trace(drawn.model, drawn.sample)
    cost = _cost(chosen, schedule, use, layers, drawn)
    plans = [phase.plan for phase in cost.phases]
    timings = time_layers(terminal, use, plans, machine) if measure else None
    optimizer = make_optimizer(chosen, drawn.model)
    phases = estimate_phases(drawn.model, [optimizer], cost, drawn.sample, counted=False)
    calibration = _calibration(chosen, cost, drawn)
    if as_json:
        measured = {"measured": timings_data(timings)} if timings else {}
        planned = _data(chosen, schedule, use, cost, phases)
        print_json(planned | {"calibration": calibration} | measured)
        return
    _show_layers(terminal, chosen, schedule, use, cost)
    _show_phases(terminal, chosen, cost, phases)
    if processes is not None:
        terminal.print(_reduced_text(chosen, cost, phases, processes))
    if _waits_for_spectra(chosen, schedule):
        terminal.print(
            f"[bold yellow]{schedule} decides by the layers' spectra during training:[/] the "
            "numbers above hold until its first decision, they are not the cost of the whole run."
        )
    if timings:
        show_timings(terminal, use, timings, machine)
    for line in filter(None, [*_remarks(chosen, use, cost), calibration_text(calibration)]):
        terminal.print(line)
    if left:
        terminal.print(left, markup=False)
    if drawn.read:
        terminal.print(f"Read: {drawn.read}.", markup=False)


# Steps per epoch depend on the data. Where it is not read, phases are planned in thousandths of an
# epoch or, for a stateful schedule, which must be queried step by step, in 10,000ths of the run.
_FINE, _STEPS = 1000, 10_000
_NOT_NAMED = "not in the layers of the recipe"
_COLUMNS = 3  # phases of which the table of layers shows each


def _cost(
    recipe: Recipe, name: str, use: ModelUse, layers: list[str], drawn: Sketch
) -> ScheduleCost:
    coarse = drawn.steps_per_epoch or max(1, _STEPS // recipe.epochs)
    schedule = make_schedule(recipe, name, drawn.model, drawn.sample, recipe.epochs * coarse)
    scale = coarse if schedule.stateful or drawn.steps_per_epoch else _FINE
    return cost_schedule(
        use,
        schedule,
        layers,
        recipe.epochs * scale,
        optimizer_slots=optimizer_slots(recipe),
        forecast=forecast_rates(recipe, recipe.epochs * scale),
    )


def _span(recipe: Recipe, cost: ScheduleCost, phase: Phase) -> str:
    """The phase's first and last epoch."""
    scale = cost.steps / recipe.epochs
    return f"{number(phase.start / scale)} to {number(phase.stop / scale)}"


def _waits_for_spectra(recipe: Recipe, name: str) -> bool:
    return bool(recipe.schedule(name).requires)


def _calibration(recipe: Recipe, cost: ScheduleCost, drawn: Sketch) -> dict[str, Any]:
    """What passes through the network before cuts; its share is unknown where no data was read."""
    batches = calibration_batches(recipe.batch_size or len(tree_leaves(drawn.sample)[0]))
    if epoch := drawn.steps_per_epoch:
        return cost.calibration(lambda _: min(batches, epoch))
    return cost.calibration(lambda _: batches) | {"relative_flops": None}


def _data(
    recipe: Recipe,
    schedule: str,
    use: ModelUse,
    cost: ScheduleCost,
    phases: Sequence[PhaseEstimate],
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "schedule": schedule,
        "until_first_decision": _waits_for_spectra(recipe, schedule),
        "relative_training_flops": cost.relative_training,
        "trainable_parameters_mean": cost.mean_trainable,
        "trainable_parameters_peak": cost.peak_trainable,
        "phases": [_phase_data(use, phase, cost.steps / recipe.epochs) for phase in phases],
    }


def _phase_data(use: ModelUse, one: PhaseEstimate, scale: float) -> dict[str, Any]:
    cost = one.cost
    return {
        "start_epoch": cost.phase.start / scale,
        "stop_epoch": cost.phase.stop / scale,
        "trainable_parameters": cost.trainable_parameters,
        "total_parameters": cost.total_parameters,
        "relative_forward_flops": cost.relative_forward,
        "relative_training_flops": cost.relative_training,
        "estimated_ranks": cost.estimated,
        "state_bytes": cost.state_bytes,
        "costs_more_than_full_rank": cost.relative_training > 1,
        "memory": one.memory.to_dict(),
        "all_reduced_bytes_per_step": one.memory.gradients,
        "layers": [layer_data(use.layers[path], path, form) for path, form in cost.plan.items()],
    }


def _relative(use: LayerUse, form: Form) -> float:
    return use.flops(form).training / use.flops(FullRank()).training


def _show_layers(
    terminal: Console, recipe: Recipe, schedule: str, use: ModelUse, cost: ScheduleCost
) -> None:
    title = f"{recipe.name}, {schedule}: form, trainable parameters, FLOPs by layer and epochs"
    # Of many phases the first and the last say which ranks there will be; the next table has all.
    shown = cost.phases if len(cost.phases) <= _COLUMNS else [cost.phases[0], cost.phases[-1]]
    phases = [_span(recipe, cost, one.phase) for one in shown]
    table = right_aligned(title, ["layer", "weight"], phases)
    for path in cost.phases[0].plan:
        one = use.layers[path]
        cells = [_cell(one, phase, path) for phase in shown]
        table.add_row(path, "x".join(map(str, one.shape)), *cells)
    terminal.print(table)


def _cell(use: LayerUse, phase: PhaseCost, path: str) -> str:
    form = phase.plan[path]
    resolved, name = use.spec.resolve(form), form_name(form)
    about = "~" if isinstance(phase.phase.plan[path], Within) else ""
    name = name if isinstance(resolved, FullRank) else f"{name} {about}{resolved.rank}"
    trained, _ = use.parameters(form)
    return f"{name} {trained:,} {_relative(use, form):.3f}x"


def _show_phases(
    terminal: Console, recipe: Recipe, cost: ScheduleCost, phases: Sequence[PhaseEstimate]
) -> None:
    numbers = ["trainable", "all", "forward", "training", "state", "activations"]
    table = right_aligned("Per phase, whole model", ["epochs", "form or budget"], numbers)
    for found in phases:
        one = found.cost
        answers = one.phase.plan.values()
        names = sorted({_budget(a) if isinstance(a, Within) else form_name(a) for a in answers})
        table.add_row(
            _span(recipe, cost, one.phase),
            ", ".join(names),
            count(one.trainable_parameters),
            count(one.total_parameters),
            ratio(one.relative_forward),
            ratio(one.relative_training),
            bytes_text(one.state_bytes),
            bytes_text(found.memory.activations),
        )
    table.add_section()
    mean, total = count(cost.mean_trainable), ratio(cost.relative_training)
    table.add_row("whole run", "mean", mean, "", "", total, "", "")
    print_whole_words(terminal, table)
    terminal.print(
        "Trainable and all: parameters. Forward and training: FLOPs relative to full-rank. State: "
        "parameters, gradients and optimizer state in fp32. Activations: what a batch saves for "
        "the backward pass, attention scores in full.\n"
    )


def _reduced_text(
    recipe: Recipe, cost: ScheduleCost, phases: Sequence[PhaseEstimate], processes: int
) -> str:
    """The gradients that processes all-reduce in a step of each phase."""
    told = [
        f"{bytes_text(one.memory.gradients)} (epochs {_span(recipe, cost, one.cost.phase)})"
        for one in phases
    ]
    return (
        f"All-reduced a step with DDP: {', '.join(told)}; by rings each of {count(processes)} "
        f"processes sends {2 * (processes - 1) / processes:.3g} times as much.\n"
    )


def _budget(budget: Within) -> str:
    """The budget in few words: ``0.45 of layers``."""
    amount = budget.amount
    return f"{amount:.3g} of {budget.of}" if isinstance(amount, float) else str(budget)


def _two_branch(use: ModelUse, one: PhaseCost, cost: ScheduleCost) -> float:
    """What the phase costs with two-branch adapters."""
    forms = one.plan.items()
    plan = {
        path: replace(form, execution="two-branch") if isinstance(form, Adapted) else form
        for path, form in forms
    }
    return use.flops(plan).training / cost.full_rank.training


def _rank_text(rank: RankLike) -> str:
    if isinstance(rank, int):
        return f"rank {rank}"
    share = rank if isinstance(rank, Rank) else Rank(rank)
    names = {"cost": "the layer's cost", "out": "the outputs", "min": "the largest rank"}
    return f"rank {share.value} of {names[share.of]}"


def _left(sites: Sequence[Site], recipe: Recipe) -> str:
    """The layers that keep their weight, those of one reason together; empty if there are none."""
    reasons: dict[str, list[str]] = {}
    why = why_left(sites, recipe.layers, recipe.rank, recipe.decomposition)
    for site, reason in zip(sites, why, strict=True):
        if reason:
            reasons.setdefault(reason.replace("not in layers", _NOT_NAMED), []).append(site.path)
    told = [f"{', '.join(paths)} ({reason})" for reason, paths in reasons.items()]
    return f"Not factorized: {'; '.join(told)}." if told else ""


def _remarks(recipe: Recipe, use: ModelUse, cost: ScheduleCost) -> list[str]:
    lines = [
        f"[bold yellow]The adapted phase costs more than full-rank training: "
        f"{one.relative_training:.3f}x a step ({_two_branch(use, one, cost):.3f}x as two branches, "
        f"as published).[/] The frozen weight still takes part in forward and backward, and the "
        f"adapter ({_rank_text(recipe.rank)}) is added to it. `--schedule "
        f"dynamic-rank-low` deflates to low-rank instead."
        for one in cost.phases
        if one.adapted_costs_more
    ]
    if any(one.estimated for one in cost.phases):
        lines.append(
            "Ranks with ~ are an estimate: they are measured when the phase begins. Its FLOPs are "
            "its budget."
        )
    return lines
