"""Decompositions of a weight into a chain of smaller weights, registered by name.

``base`` defines the interface, ``svd`` is the one to read first, and ``register_decomposition``
adds your own. All are pure tensor functions, independent of modules and optimizers.
"""

from typing import TYPE_CHECKING

from dynarank.files.lazy_names import lazy_names

if TYPE_CHECKING:
    from dynarank.decompositions.base import Decomposition
    from dynarank.decompositions.geometry import Factors, Geometry
    from dynarank.decompositions.numerics.linalg import (
        LinAlgError,
        UnfitWeightError,
        all_finite,
        precise,
    )
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
    "all_finite",
    "decomposition_names",
    "get_decomposition",
    "precise",
    "register_decomposition",
]

_LINALG, _REGISTRY = "numerics.linalg", "registry"
_HOMES = {
    "Decomposition": "base",
    "Factors": "geometry",
    "Geometry": "geometry",
    "LinAlgError": _LINALG,
    "UnfitWeightError": _LINALG,
    "all_finite": _LINALG,
    "decomposition_names": _REGISTRY,
    "get_decomposition": _REGISTRY,
    "precise": _LINALG,
    "register_decomposition": _REGISTRY,
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
