"""How is a weight factored? As a chain of smaller weights, by a decomposition known by its name.

``base`` says what a decomposition is, ``svd`` is the one to read first, and
``register_decomposition`` adds one. Pure tensor functions: they know no modules or optimizers.
"""

from dynarank.decompositions.base import Decomposition
from dynarank.decompositions.geometry import Factors, Geometry
from dynarank.decompositions.numerics.linalg import LinAlgError, UnfitWeightError, precise
from dynarank.decompositions.registry import (
    decomposition_names,
    get_decomposition,
    register_decomposition,
)

__all__ = [
    "Decomposition",
    "Factors",
    "Geometry",
    "LinAlgError",
    "UnfitWeightError",
    "decomposition_names",
    "get_decomposition",
    "precise",
    "register_decomposition",
]
