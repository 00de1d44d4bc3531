"""dynarank: dynamic-rank training for PyTorch.

Layers are low-rank where that is enough, full-rank while it matters, and low-rank again:

>>> import torch, dynarank as dr
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> model = dr.factorize(model, rank=2)         # W = up @ down
>>> model = dr.inflate(model)                   # one full-rank W again, the same function
>>> model = dr.deflate(model, to="adapted")     # W frozen, a zero-output adaptor trains
>>> model = dr.merge(model)                     # plain modules again
"""

from dynarank import gradients as gradients
from dynarank import ranking as ranking
from dynarank import regularizers, schedules
from dynarank.budget import plan_within
from dynarank.calibration import calibrate
from dynarank.decompositions import UnfitWeightError
from dynarank.factor_rates import FactorRates
from dynarank.forms import Adapted, FullRank, LowRank, Rank
from dynarank.initialization import initialize_factors
from dynarank.monitors import SpectralMonitor
from dynarank.scheduler import RankScheduler
from dynarank.surgery import apply_plan, deflate, factorize, inflate, merge
from dynarank.survey import current_plan, survey

__all__ = [
    "Adapted",
    "FactorRates",
    "FullRank",
    "LowRank",
    "Rank",
    "RankScheduler",
    "SpectralMonitor",
    "UnfitWeightError",
    "apply_plan",
    "calibrate",
    "current_plan",
    "deflate",
    "factorize",
    "inflate",
    "initialize_factors",
    "merge",
    "plan_within",
    "regularizers",
    "schedules",
    "survey",
]
