"""Layers with weights in one of the three forms, and how they are executed.

``ranked`` is the module to read first, ``linear`` the simplest layer; ``register_layer`` adds your
own.
"""

from dynarank.files.lazy_names import lazy_names
from dynarank.layers.execution import Call, Execution, Flops, choose_execution, executions
from dynarank.layers.ranked import RankedLayer, effective, own_parameters
from dynarank.layers.registry import class_obstacle, ranked_class, readers, register_layer
from dynarank.layers.weight import WeightSpec

__all__ = [
    "Call",
    "Execution",
    "Flops",
    "RankedLayer",
    "WeightSpec",
    "choose_execution",
    "class_obstacle",
    "effective",
    "executions",
    "own_parameters",
    "ranked_class",
    "readers",
    "register_layer",
]

__getattr__, __dir__ = lazy_names(__name__)
