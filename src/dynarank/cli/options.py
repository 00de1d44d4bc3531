"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

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
    float | None, typer.Option(help="Instead of the recipe's: 16, or 0.25 of the outputs.")
]
DecompositionOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Instead of the recipe's: svd, tucker, cp or separable.")
]
BudgetOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Dynamic rank within this share of full-rank's training FLOPs, such as 0.62: rank, "
        "ending and transition points are found."
    ),
]
ScheduleOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Schedules, separated by commas: {', '.join(SCHEDULES)}. Default: the recipe's."
    ),
]
DataOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Folder (or .npz) of the data set; 'hub' fetches it by name; default: "
        "$DYNARANK_DATA. digits and text-gpt need none."
    ),
]
EpochsOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Scale the whole schedule to this many epochs.")
]
TrainLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Train on so many examples only, class-balanced.")
]
TestLimitOption: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Test on so many examples only.")
]
DeviceOption: TypeAlias = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PrecisionOption: TypeAlias = Annotated[
    str, typer.Option(help="auto (bf16 on CUDA, else fp32), fp32 or bf16 (autocast).")
]
