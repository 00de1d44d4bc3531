"""``dynarank export``: the trained network of a run as files that run without dynarank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from dynarank.cli.export_files import IN_FOLDER, KINDS, Answer, write_files
from dynarank.cli.options import QuietOption
from dynarank.cli.show import console, print_json, progress
from dynarank.export.plain import Keep
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError
from dynarank.records import Run, find_runs, read_run
from dynarank.report.formats import bytes_text, count, ratio
from dynarank.train.recipe_error import RecipeError
from dynarank.train.trained import OWN_FILES, read_trained

__all__ = ["export"]


def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.")],
    to: Annotated[
        Path,
        typer.Option(
            metavar="PLACE",
            help="FILE.safetensors or FILE.pt (the weights), FILE.pt2 (torch.export), FILE.onnx, "
            "or a folder: model card, weights and .pt2.",
        ),
    ],
    schedule: Annotated[
        str | None, typer.Option(help="Which schedule's run, if there are several.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Which seed's run, if there are several.")
    ] = None,
    keep: Annotated[
        Keep,
        typer.Option(
            help="Which low-rank layers stay factors: where that is smaller, all, or none."
        ),
    ] = "cheaper",
    fixed_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Fix the batch size in .pt2 and .onnx files to this number."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    quiet: QuietOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the trained network of RUN to a file that runs without dynarank.

    Low-rank layers are kept as their factors, in a row (Linear -> Linear, Conv -> Conv), adapted
    ones are merged: the file is as small as the trained network. The weights are those of the end
    of the run. No data is read: what the inputs are like is in the run.

    .pt2 and .onnx need no code of the network, and take batches of any size (.onnx needs
    `dynarank[onnx]`). .safetensors and .pt hold the weights, by the names of the plain network; the
    header of .safetensors says which layers are factors. A folder has README.md (a model card:
    ranks, costs, how it was made and how to load it), model.safetensors and model.pt2.

    Each file is loaded again and its outputs are compared with the network's before it takes its
    place. Nothing is overwritten without --force.
    """
    _check_place(to, force)
    folder = _choose(run, schedule, seed)
    terminal = console(quiet_stdout=as_json)
    shown = progress(terminal, quiet)
    shown.print(f"Making the network of {folder} again", markup=False)
    trained = read_trained(folder)
    shown.print(f"Writing {to} and comparing it with the network", markup=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        answer = write_files(trained, to, keep=keep, batch=fixed_batch)
    _show(answer, list(dict.fromkeys(str(one.message) for one in told)), as_json)


def _check_place(to: Path, force: bool) -> None:
    """Raise RecipeError for a place that cannot be written to, or that is taken."""
    if to.suffix and to.suffix not in KINDS and not to.is_dir():
        raise RecipeError(
            f"--to is a file with one of the suffixes {', '.join(KINDS)}, or a folder, got {to}"
        )
    if not to.absolute().parent.is_dir():
        raise RecipeError(
            f"cannot write {to}: the folder {to.parent} does not exist; pass another, or make it"
        )
    real = to.resolve()
    if real.name in OWN_FILES and (real.parent / "records.jsonl").exists():
        raise RecipeError(
            f"{to} is a run's own file, from which the run is read; give another name"
        )
    if not to.exists():
        return
    if not force:
        raise RecipeError(f"{to} exists already and is not overwritten; --force replaces it")
    others = [one.name for one in to.iterdir() if one.name not in IN_FOLDER] if to.is_dir() else []
    if others:
        raise RecipeError(
            f"{to} holds files that are not of an export ({', '.join(sorted(others)[:3])}); name "
            "another folder"
        )


def _choose(run: Path, schedule: str | None, seed: int | None) -> Path:
    """The folder of the one run that is meant.

    Raises:
        RecipeError: there are several, or none of this schedule and seed.
    """
    found: list[Run] = []
    for folder in find_runs(run):
        try:
            found.append(read_run(folder))
        except DamagedFileError:
            if folder == run:
                raise
    names = [f"--schedule {one.header.schedule} --seed {one.header.seed}" for one in found]
    meant = [
        one.folder
        for one in found
        if schedule in (None, one.header.schedule) and seed in (None, one.header.seed)
    ]
    if len(meant) != 1:
        what = "is of several runs" if meant else "has no such run"
        raise RecipeError(f"{run} {what}: choose one by {', or '.join(names)}")
    return meant[0]


def _show(answer: Answer, told: list[str], as_json: bool) -> None:
    if as_json:
        print_json({**answer.data(), "warnings": told})
        return
    terminal = console()
    for line in told:
        terminal.print(f"Note: {printable(line, 1_000)}", markup=False)
    for one in answer.files:
        compared = f", outputs within {one.difference:.1e} of the network's" if one.outputs else ""
        terminal.print(f"{one.path}: {bytes_text(one.size)}{compared}", markup=False)
    terminal.print(
        f"{count(answer.parameters)} parameters, {ratio(answer.parameters / answer.full_rank)} of "
        f"the {count(answer.full_rank)} at full rank",
        markup=False,
    )
