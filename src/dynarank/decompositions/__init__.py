"""How a weight becomes factors and back: one decomposition a file, found by name."""

from __future__ import annotations

from dynarank.decompositions.base import (
    Decomposition,
    Factors,
    Geometry,
    LinAlgError,
    UnfitWeightError,
    apply,
    linear_map,
    output_shape,
    precise,
    pull_back,
    refactor_joined,
    swap_channels,
)
from dynarank.decompositions.cp import CP
from dynarank.decompositions.grouped import Grouped
from dynarank.decompositions.separable import Separable
from dynarank.decompositions.svd import SVD
from dynarank.decompositions.tucker import Tucker

__all__ = [
    "CP",
    "DECOMPOSITIONS",
    "SVD",
    "Decomposition",
    "Factors",
    "Geometry",
    "Grouped",
    "LinAlgError",
    "Separable",
    "Tucker",
    "UnfitWeightError",
    "apply",
    "get_decomposition",
    "linear_map",
    "output_shape",
    "precise",
    "pull_back",
    "refactor_joined",
    "swap_channels",
]

DECOMPOSITIONS: dict[str, Decomposition] = {
    decomposition.name: decomposition for decomposition in [SVD(), Tucker(), CP(), Separable()]
}


def get_decomposition(name: str, groups: int = 1) -> Decomposition:
    """The decomposition of this name, of each group of a grouped weight.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in DECOMPOSITIONS:
        raise ValueError(f"unknown decomposition {name!r}; known: {', '.join(DECOMPOSITIONS)}")
    decomposition = DECOMPOSITIONS[name]
    return decomposition if groups == 1 else Grouped(decomposition, groups)
