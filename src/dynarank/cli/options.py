"""Options shared by several commands."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from dynarank.decompositions.registry import decomposition_names
from dynarank.schedules.catalog import SCHEDULES

__all__ = [
    "BudgetOption",
    "DataOption",
    "DecompositionOption",
    "DeviceOption",
    "EpochsOption",
    "PrecisionOption",
    "RankOption",
    "ScheduleOption",
    "TestLimitOption",
    "TrainLimitOption",
]

RankOption: TypeAlias = Annotated[
    float | None, typer.Option(help="Override the recipe's rank: 16, or 0.25 of the outputs.")
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
    int | None, typer.Option(min=1, help="Scale the whole schedule to this many epochs.")
]
TrainLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Train on at most this many examples, class-balanced.")
]
TestLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Test on at most this many examples.")
]
DeviceOption: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PrecisionOption: TypeAlias = Annotated[
    str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32 or bf16 (autocast).")
]
