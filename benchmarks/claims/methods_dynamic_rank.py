"""Dynamic rank: what the schedule costs, and runs under it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynarank.cost.flops import trace
from dynarank.cost.schedule import ScheduleCost, cost_schedule
from dynarank.records import ChangeRecord, Run, SpectrumRecord
from dynarank.surgery.selection import select
from dynarank.surgery.sites import survey
from dynarank.train.recipes import Recipe, load_recipe
from dynarank.train.schedules import make_schedule
from dynarank.train.tasks import sketch

from .methods_shared import accuracies, flops, number, row, spread, summaries
from .records import mean, read_runs

PAGE = "docs/methods/dynamic-rank.md"
SETTINGS = ("10,000 images and 12 epochs", "all 50,000 images", "applied, 1e-4, to weights")
RUNS = "2026-11-24-cifar10-resnet20-12-epochs"
NAMES = {"dynamic-rank-low": "dynamic-rank, deflating to low-rank"}


def claims() -> Iterator[str]:
    """Yield the figures as the page has them."""
    yield from _costs()
    yield from _scores()
    yield from _effective_ranks()


def _costs() -> Iterator[str]:
    recipe = load_recipe("cifar10-resnet20")
    both = [recipe.published(), recipe]
    branches, merged = (_cost(one, "dynamic-rank") for one in both)
    low, _, adapted = (
        [f"{cost.phases[phase].relative_training:.3f}" for cost in (branches, merged)]
        for phase in range(3)
    )
    yield row("low-rank phase", *low)
    yield row("adapted phase", f"**{adapted[0]}**", adapted[1])
    yield _whole("whole schedule", [branches, merged])
    ending = [_cost(one, "dynamic-rank-low") for one in both]
    yield _whole("whole schedule, deflating to low-rank", ending)


def _cost(recipe: Recipe, name: str) -> ScheduleCost:
    drawn = sketch(recipe)
    layers = [site.path for site in select(survey(drawn.model), recipe.layers)]
    schedule = make_schedule(recipe, name, drawn.model, drawn.sample, recipe.epochs)
    return cost_schedule(trace(drawn.model, drawn.sample), schedule, layers, recipe.epochs)


def _whole(name: str, costs: Sequence[ScheduleCost]) -> str:
    return row(name, *(f"{cost.relative_training:.3f}" for cost in costs))


def _scores() -> Iterator[str]:
    runs = summaries(RUNS)
    yield f"test accuracy, % ({number(*runs.values())})"
    scores = accuracies(runs)
    for name, group in runs.items():
        yield row(
            NAMES.get(name, name),
            spread(scores[name], 2),
            f"{max(run.trainable_parameters_peak for run in group):,}",
            f"{mean(run.trainable_parameters_mean for run in group):,.0f}",
            f"{flops(group)}x",
            f"{mean(run.memory_bytes for run in group) / 2**20:.1f} MiB",
            f"{min(run.train_seconds for run in group):.0f} s",
        )
    low, full = (scores[name] for name in ("low-rank", "full-rank"))
    noise = spread(full, 1).split(" ± ")[1]
    yield f"({mean(low):.2f} against {mean(full):.2f}, spread {noise})"
    pairs = zip(scores["dynamic-rank"], scores["dynamic-rank-low"], strict=True)
    lost = spread([adapted - low for adapted, low in pairs], 2)
    yield f"lost {lost} points against the adapted ending on the same seeds"
    yield f"cut off {_cut_off():.0%} of a layer's norm in the mean"


def _cut_off() -> float:
    """Return the mean relative error of the layers at the deflation."""
    runs = [
        run
        for run in read_runs(f"training/results/{RUNS}")
        if run.header.schedule == "dynamic-rank-low"
    ]
    changes = [change for run in runs for change in run.all(ChangeRecord)]
    return mean(one.error for one in changes if one.after["form"] == "low-rank")


def _effective_ranks() -> Iterator[str]:
    runs = {run.header.schedule: run for run in read_runs(f"training/results/{RUNS}/seed0")}
    shares = {name: _shares(run) for name, run in runs.items()}
    (layers,) = {len(one.layers) for run in runs.values() for one in run.all(SpectrumRecord)}
    yield f"The mean effective rank of the {layers} layers, as a share"
    full, low, dynamic = (
        f"{shares[name][-1]:.2f}" for name in ("full-rank", "low-rank", "dynamic-rank")
    )
    yield f"ends at {full} (full-rank), {low} (low-rank) and {dynamic} (dynamic-rank; seed 0)"
    before, after = shares["dynamic-rank"][4], shares["dynamic-rank"][9]
    yield f"from {before:.2f} to {after:.2f} within five epochs"


def _shares(run: Run) -> list[float]:
    """Return the mean effective rank of the layers after each epoch, as a share of full rank."""
    return [
        mean(layer.effective_rank / layer.full_rank for layer in record.layers.values())
        for record in run.all(SpectrumRecord)
    ]
