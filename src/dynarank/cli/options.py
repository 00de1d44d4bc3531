"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

__all__ = ["DecompositionOption", "RankOption"]

RankOption: TypeAlias = Annotated[
    float | None, typer.Option(help="Instead of the recipe's: 16, or 0.25 of the outputs.")
]
DecompositionOption: TypeAlias = Annotated[
    str | None, typer.Option(help="Instead of the recipe's: svd, tucker, cp or separable.")
]
