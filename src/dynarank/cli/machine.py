"""The device and precision of a command, from its options."""

from __future__ import annotations

import torch

from dynarank.files.nearest import did_you_mean
from dynarank.train.loop import Machine
from dynarank.train.recipes import RecipeError

__all__ = ["choose_machine"]

_PRECISIONS = ("auto", "fp32", "bf16")


def choose_machine(
    device: str,
    precision: str,
    compile: bool = False,
    measure: bool = False,
    noise: bool = False,
) -> Machine:
    """The machine that ``--device``, ``--precision`` and ``--compile`` ask for.

    Raises:
        RecipeError: an unusable device or an unknown precision.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()  # the meta device has no values
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if precision not in _PRECISIONS:
        hint = did_you_mean(precision, _PRECISIONS)
        raise RecipeError(f"precision is auto, fp32 or bf16, got {precision!r}{hint}")
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" else "fp32"
    return Machine(chosen, precision, compile, measure, noise)
