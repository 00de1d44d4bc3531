"""Options shared by several commands."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, TypeAlias, cast

import typer

from dynarank.decompositions.registry import decomposition_names
from dynarank.forms import Rank, RankLike, plain_rank
from dynarank.schedules.catalog import SCHEDULES
from dynarank.train.checkpoint_plan import CheckpointPlan

__all__ = [
    "RANK_HELP",
    "BudgetOption",
    "CheckpointOption",
    "DataOption",
    "DecompositionOption",
    "DeviceOption",
    "EpochsOption",
    "PrecisionOption",
    "QuietOption",
    "RankOption",
    "ScheduleOption",
    "TestLimitOption",
    "TrainLimitOption",
    "parse_checkpoints",
    "parse_rank",
]

RANK_HELP = (
    "16 is a rank; 0.25 a share of the layer's own cost, 0.25:out of its outputs, 0.25:min of its "
    "largest rank."
)


def parse_rank(text: str | float) -> RankLike:
    """The value of ``--rank``: as in Python, an int is a rank and a float is a share.

    Raises:
        typer.BadParameter: a rank below 1, a share outside (0, 1], or one of something unknown.

    Example:
        >>> parse_rank("16"), parse_rank("0.25"), parse_rank("1"), parse_rank("1.0")
        (16, 0.25, 1, 1.0)
        >>> parse_rank("0.5:out")
        Rank(value=0.5, of='out', multiple_of=1)
    """
    value, colon, of = str(text).partition(":")
    with suppress(ValueError):
        if not colon:
            return plain_rank(int(value))
    with suppress(ValueError):
        return Rank(float(value), cast("Any", of)) if colon else plain_rank(float(value))
    raise typer.BadParameter(
        f"{text} is neither a rank (a whole number such as 16) nor a share (above 0 and up to 1.0, "
        "such as 0.25, of the layer's cost; 0.25:out of its outputs, 0.25:min of its largest rank)"
    )


def parse_checkpoints(text: str | CheckpointPlan) -> CheckpointPlan:
    """The value of ``--checkpoint-every``: minutes, or ``off``.

    Raises:
        typer.BadParameter: neither.

    Example:
        >>> parse_checkpoints("2.5").minutes, parse_checkpoints("off").minutes
        (2.5, None)
    """
    if isinstance(text, CheckpointPlan):
        return text
    with suppress(ValueError):
        return CheckpointPlan(None if text == "off" else float(text))
    raise typer.BadParameter(f"{text} is neither a number of minutes (0 or more) nor off")


RankOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        parser=parse_rank, metavar="RANK", help=f"Override the recipe's rank: {RANK_HELP}"
    ),
]
DecompositionOption: TypeAlias = Annotated[
    str | None, typer.Option(help=f"Override the recipe's: {', '.join(decomposition_names())}.")
]
BudgetOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Fit dynamic rank to this share of full-rank training FLOPs, such as 0.62: finds "
        "rank, final form and transition points."
    ),
]
ScheduleOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"Comma-separated schedules: {', '.join(SCHEDULES)}. Default: the recipe's."),
]
DataOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Folder (or .npz) of the data set; 'hub' downloads it by name; default: "
        "$DYNARANK_DATA. digits and text-gpt need none."
    ),
]
EpochsOption: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, max=1_000_000, help="Scale the whole schedule to this many epochs."),
]
TrainLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Train on at most this many examples, class-balanced.")
]
TestLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Test on at most this many examples.")
]
CheckpointOption: TypeAlias = Annotated[
    CheckpointPlan,
    typer.Option(
        parser=parse_checkpoints,
        metavar="MINUTES",
        help="The longest time between two checkpoints; 0: after each step, off: only when "
        "interrupted.",
    ),
]
DeviceOption: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PrecisionOption: TypeAlias = Annotated[
    str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32 or bf16 (autocast).")
]
QuietOption: TypeAlias = Annotated[
    bool, typer.Option("--quiet", help="Print the result only, no progress.")
]
