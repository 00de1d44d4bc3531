"""The cost of a model under a plan: parameters, FLOPs, memory and time."""

from dynarank.cost.flops import Flops, LayerUse, ModelUse, count_flops, trace
from dynarank.cost.schedule import PhaseCost, ScheduleCost, cost_schedule

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
