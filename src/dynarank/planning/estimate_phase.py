"""What a phase, and a layer in it, costs: for estimates, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from dynarank.cost.dry_run import DryRun
from dynarank.cost.flops import Flops, LayerUse, ModelUse, share_of
from dynarank.cost.schedule import PhaseCost
from dynarank.cost.step_memory import StepMemory
from dynarank.form_data import form_to_data
from dynarank.forms import Form, FullRank, LowRank, Rank, form_name

__all__ = ["PhaseEstimate", "break_even", "layer_data", "phase_data", "weight_data"]


@dataclass(frozen=True)
class PhaseEstimate:
    """What a phase costs.

    Args:
        cost: its steps, forms, parameters, and FLOPs as the layers need them.
        memory: the memory of a step.
        counted: the FLOPs of a step as FlopCounterMode counts them on a meta copy; None: not
            counted. They are more than those of the layers if the model reads a weight itself,
            which is then computed from its factors.
        measured: the measured time and peak memory of a step; None: not measured.
    """

    cost: PhaseCost
    memory: StepMemory
    counted: Flops | None = None
    measured: DryRun | None = None

    @property
    def flops(self) -> Flops:
        """The FLOPs of a step: as counted, else as the layers need them."""
        return self.counted or self.cost.flops

    @property
    def extra_flops(self) -> int:
        """The training FLOPs of a step that are not the layers': the model reads their weights."""
        return self.flops.training - self.cost.flops.training

    @property
    def all_reduced_bytes(self) -> int:
        """The gradients that DDP all-reduces in the phase, of one process; of a step if no run."""
        return self.memory.gradients * self.cost.phase.steps

    @property
    def start(self) -> int:
        """The first step."""
        return self.cost.phase.start

    @property
    def stop(self) -> int:
        """The step after the last."""
        return self.cost.phase.stop

    @property
    def forms(self) -> dict[str, int]:
        """The number of scheduled layers by form."""
        return dict(Counter(map(form_name, self.cost.plan.values())))


def break_even(use: LayerUse) -> dict[str, int | None]:
    """The largest ranks at which a weight's factors have no more parameters, and no more FLOPs.

    Of an SVD; None for FLOPs if the layer has none, as an embedding.

    Example:
        >>> import torch
        >>> from dynarank.cost.flops import trace
        >>> use = trace(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(2, 64))
        >>> break_even(use.layers["0"])
        {'parameters': 32, 'flops': 25}
    """
    form = use.spec.resolve(LowRank(Rank(1.0)))
    assert isinstance(form, LowRank)
    full = use.flops(FullRank()).training
    low, high = 0, use.spec.decomposition(form).limit(use.shape)
    while low < high:
        middle = (low + high + 1) // 2
        enough = use.flops(LowRank(middle, execution="factored")).training <= full
        low, high = (middle, high) if enough else (low, middle - 1)
    return {"parameters": form.resolved_rank, "flops": low if full else None}


def weight_data(path: str, use: LayerUse) -> dict[str, Any]:
    """A layer's weight, as plain data."""
    return {"layer": path, "shape": list(use.shape), "break_even_rank": break_even(use)}


def layer_data(use: LayerUse, path: str, form: Form) -> dict[str, Any]:
    """What a layer costs in a form, as plain data."""
    trained, entries = use.parameters(form)
    flops, full = use.flops(form), use.flops(FullRank())
    return {
        "layer": path,
        **form_to_data(use.spec.resolve(form)),
        "trainable_parameters": trained,
        "total_parameters": entries,
        "training_flops": flops.training,
        "relative_training_flops": share_of(flops.training, full.training),
    }


def phase_data(use: ModelUse, full: Flops, one: PhaseEstimate) -> dict[str, Any]:
    """What a phase costs, as plain data; ``full`` are the FLOPs of a step at full rank."""
    cost, measured = one.cost, one.measured
    return {
        "start_step": one.start,
        "stop_step": one.stop,
        "forms": one.forms,
        "trainable_parameters": cost.trainable_parameters,
        "total_parameters": cost.total_parameters,
        "forward_flops": one.flops.forward,
        "training_flops": one.flops.training,
        "relative_forward_flops": share_of(one.flops.forward, full.forward),
        "relative_training_flops": share_of(one.flops.training, full.training),
        "estimated_ranks": cost.estimated,
        "memory": one.memory.to_dict(),
        "all_reduced_bytes_per_step": one.memory.gradients,
        "all_reduced_bytes": one.all_reduced_bytes,
        "measured": measured and {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes},
        "layers": [layer_data(use.layers[path], path, form) for path, form in cost.plan.items()],
    }
