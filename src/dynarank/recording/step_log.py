"""What a loop logs step by step, read from the device many steps at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepLog", "as_number", "kept"]

Kept = float | Tensor


def kept(name: str, value: Any) -> Kept:
    """A logged value: a number, or a copy of a tensor of one, which is not read yet.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(
                f"{name} is a number or a tensor of one, got a tensor of {tuple(value.shape)}; "
                f"give {name}.mean()"
            )
        # Copied, since a loop may add to it; a device is not waited for.
        return value.detach().reshape(()).clone() if value.device.type != "cpu" else value.item()
    if isinstance(value, bool) or not isinstance(value, Real | float):
        item = getattr(value, "item", None)  # of NumPy
        value = item() if callable(item) else value
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is a number or a tensor of one, got {value!r}")
    return float(value)


def as_number(name: str, value: Any) -> float | None:
    """A value now; None stays None."""
    if value is None:
        return None
    found = kept(name, value)
    return float(found.item()) if isinstance(found, Tensor) else found


class StepLog:
    """The values of steps that are not written yet, and the losses of the epoch.

    Several logs of one step count as one, with the mean of their losses: those of the parts of a
    batch, where gradients are accumulated.
    """

    def __init__(self) -> None:
        self._pending: dict[int, list[Mapping[str, Kept]]] = {}
        self._epoch: list[float] = []
        self._warned = False

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, step: int, values: Mapping[str, Kept]) -> None:
        """Keep the values of a step."""
        self._pending.setdefault(step, []).append(values)

    def take(self, last: int | None = None) -> list[tuple[int, dict[str, float]]]:
        """Read what is pending, up to a step: its values, ``loss`` and ``lr`` among them."""
        steps = [step for step in self._pending if last is None or step <= last]
        logs = [(step, one) for step in steps for one in self._pending.pop(step)]
        tensors = [v for _, one in logs for v in one.values() if isinstance(v, Tensor)]
        read = iter(_read(tensors))
        merged: dict[int, dict[str, float]] = {}
        losses: dict[int, list[float]] = {}
        for step, one in logs:
            found = {n: next(read) if isinstance(v, Tensor) else v for n, v in one.items()}
            merged.setdefault(step, {}).update(found)
            losses.setdefault(step, []).extend([found["loss"]] if "loss" in found else [])
        for step, some in losses.items():
            if some:
                merged[step]["loss"] = sum(some) / len(some)
                self.lost(step, merged[step]["loss"])
        return list(merged.items())

    def lost(self, step: int, loss: float) -> None:
        """Count the loss of a step in the epoch's mean."""
        self._epoch.append(loss)
        if not math.isfinite(loss) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the loss of step {step:,} is {loss}: try a lower learning rate",
                RuntimeWarning,
                stacklevel=4,
            )

    def held(self, step: int) -> list[Mapping[str, Kept]]:
        """Take out what was logged for a step."""
        return self._pending.pop(step, [])

    def restart(self, step: int, values: list[Mapping[str, Kept]]) -> None:
        """Begin again with the values of a step; nothing may be pending."""
        self._pending, self._epoch = {step: values} if values else {}, []

    def mean_loss(self) -> float | None:
        """The mean loss of the epoch's steps, which then ends; None if none was logged."""
        losses, self._epoch = self._epoch, []
        return sum(losses) / len(losses) if losses else None


def _read(tensors: Sequence[Tensor]) -> list[float]:
    """The values of scalars, with one transfer from each device for each dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(index)
    found: dict[int, float] = {}
    for places in alike.values():
        found.update(zip(places, torch.stack([tensors[i] for i in places]).tolist(), strict=True))
    return [float(found[index]) for index in range(len(tensors))]
