"""The cost of a model under a plan: parameters, FLOPs, memory and time."""

from dynarank.cost.flops import Flops, LayerUse, ModelUse, count_flops, trace
from dynarank.cost.schedule import PhaseCost, ScheduleCost, cost_schedule
from dynarank.files.lazy_names import lazy_names

__all__ = [
    "Flops",
    "LayerUse",
    "ModelUse",
    "PhaseCost",
    "ScheduleCost",
    "cost_schedule",
    "count_flops",
    "trace",
]

__getattr__, __dir__ = lazy_names(__name__)
