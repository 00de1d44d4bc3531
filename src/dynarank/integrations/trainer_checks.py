"""What the Trainer does that changes of form cannot follow: refused before the first step."""

from __future__ import annotations

from collections import defaultdict
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

from dynarank.surgery.moments import check_known
from dynarank.surgery.optimizer_state import Moments
from dynarank.surgery.own_references import innermost
from dynarank.surgery.state_layout import layout_of

__all__ = ["check_movable_states", "check_trainer"]

_SHARDS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # of accelerate's DistributedType


def check_trainer(args: Any, model: nn.Module) -> None:
    """Raise ValueError for arguments of the Trainer, or a model, under which no form can change."""
    from accelerate.state import AcceleratorState

    sharded = {"fsdp": args.fsdp, "deepspeed": args.deepspeed}
    how = [name for name, value in sharded.items() if value]
    how += [kind for kind in _SHARDS if not how and AcceleratorState().distributed_type == kind]
    if how:
        raise ValueError(
            f"the Trainer runs under {how[0]}, which keeps parameters and their states where a "
            "change of form cannot follow: leave it out (DDP works), or write the loop yourself, "
            "with FSDP2 (fully_shard) and dynarank.RankScheduler"
        )
    names = {cls.__name__ for cls in type(model).__mro__}
    if "PeftModel" in names or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model has PEFT adapters, of which the Trainer saves nothing else: use "
            "model.merge_and_unload() and a schedule with Adapted forms, such as "
            "schedules.constant(Adapted(8))"
        )


def check_movable_states(optimizer: Any, moments: Moments) -> None:
    """Raise ValueError for an optimizer whose state of a matrix cannot be moved.

    A step of a copy of it, on a matrix of zeros, shows what it keeps. What no step can be made of
    alone is checked after the first one.
    """
    for one in () if moments == "reset" else innermost(optimizer):
        if (state := _state_of_a_matrix(one)) is not None:
            try:
                check_known("any", [state], layout_of(one))
            except ValueError as error:
                raise ValueError(f"{type(one).__name__}: {error}") from None


def _state_of_a_matrix(optimizer: Any) -> dict[str, Any] | None:
    made, matrix = copy(optimizer), Parameter(torch.zeros(4, 4))
    matrix.grad = torch.zeros(4, 4)
    made.state = defaultdict(dict)
    made.param_groups = [{**optimizer.param_groups[0], "params": [matrix]}]
    try:
        made.step()
    except Exception:
        return None
    return dict(made.state[matrix])
