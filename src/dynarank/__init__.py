"""dynarank: dynamic-rank training for PyTorch.

Layers are low-rank where that is enough, full-rank while it matters, and low-rank again:

>>> import torch, dynarank as dr
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
>>> model = dr.factorize(model, rank=2)         # W = up @ down
>>> model = dr.inflate(model)                   # one full-rank W again, the same function
>>> model = dr.deflate(model, to="adapted")     # W frozen, a zero-output adapter trains
>>> model = dr.merge(model)                     # plain modules again
"""

from typing import TYPE_CHECKING

from dynarank.files.lazy_names import lazy_names
from dynarank.files.version import __version__ as __version__

if TYPE_CHECKING:
    from dynarank import schedules
    from dynarank.allocation import rules
    from dynarank.allocation.within_budget import plan_within
    from dynarank.checkpoint.save import load, save
    from dynarank.decompositions import UnfitWeightError
    from dynarank.export.peft import from_peft, to_peft
    from dynarank.export.plain import to_plain
    from dynarank.factors import regularizers
    from dynarank.forms import Adapted, FullRank, LowRank, Rank, Within
    from dynarank.monitors.calibration import calibrate
    from dynarank.monitors.spectral import SpectralMonitor
    from dynarank.planning.estimate import estimate
    from dynarank.planning.fit_schedule import fit_schedule
    from dynarank.planning.headroom import headroom
    from dynarank.recording.recorder import Recorder
    from dynarank.scheduler.batch_norm import BatchNormRecalibration
    from dynarank.scheduler.lr_rewarmup import LRRewarmup
    from dynarank.scheduler.rank_scheduler import RankScheduler
    from dynarank.scheduler.truncation import ActivationAwareTruncation
    from dynarank.surgery.check import check
    from dynarank.surgery.sites import current_plan, survey
    from dynarank.surgery.verbs import apply_plan, deflate, factorize, inflate, merge

__all__ = [
    "ActivationAwareTruncation",
    "Adapted",
    "BatchNormRecalibration",
    "FullRank",
    "LRRewarmup",
    "LowRank",
    "Rank",
    "RankScheduler",
    "Recorder",
    "SpectralMonitor",
    "UnfitWeightError",
    "Within",
    "apply_plan",
    "calibrate",
    "check",
    "current_plan",
    "deflate",
    "estimate",
    "factorize",
    "fit_schedule",
    "from_peft",
    "headroom",
    "inflate",
    "load",
    "merge",
    "plan_within",
    "regularizers",
    "rules",
    "save",
    "schedules",
    "survey",
    "to_peft",
    "to_plain",
]

_HOMES = {
    "ActivationAwareTruncation": "scheduler.truncation",
    "Adapted": "forms",
    "BatchNormRecalibration": "scheduler.batch_norm",
    "FullRank": "forms",
    "LRRewarmup": "scheduler.lr_rewarmup",
    "LowRank": "forms",
    "Rank": "forms",
    "RankScheduler": "scheduler.rank_scheduler",
    "Recorder": "recording.recorder",
    "SpectralMonitor": "monitors.spectral",
    "UnfitWeightError": "decompositions",
    "Within": "forms",
    "apply_plan": "surgery.verbs",
    "calibrate": "monitors.calibration",
    "check": "surgery.check",
    "current_plan": "surgery.sites",
    "deflate": "surgery.verbs",
    "estimate": "planning.estimate",
    "factorize": "surgery.verbs",
    "fit_schedule": "planning.fit_schedule",
    "from_peft": "export.peft",
    "headroom": "planning.headroom",
    "inflate": "surgery.verbs",
    "load": "checkpoint.save",
    "merge": "surgery.verbs",
    "plan_within": "allocation.within_budget",
    "regularizers": "factors.regularizers",
    "rules": "allocation.rules",
    "save": "checkpoint.save",
    "schedules": "schedules",
    "survey": "surgery.sites",
    "to_peft": "export.peft",
    "to_plain": "export.plain",
}
"""The module of each public name; it is imported when the name is first asked for."""

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
