"""What data tells a network of a user's own: the size of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from dynarank.train.own_parts import MapPart, Part, StreamPart, TensorPart

__all__ = ["TARGETS", "data_facts", "split_batch", "targets_in_memory"]

TARGETS = ("labels", "label", "targets", "target", "y")
"""The keys of a dict that say that its value is the target."""


def split_batch(batch: Any) -> tuple[Any, Any]:
    """The inputs of the forward pass, and the target.

    Example:
        >>> split_batch([1, 2]), split_batch((1, 2, 3)), split_batch({"x": 1, "labels": 2})
        ((1, 2), ((1, 2), 3), ({'x': 1}, 2))
    """
    if isinstance(batch, Mapping):
        named = cast("Mapping[str, Any]", batch)
        key = next((name for name in TARGETS if name in named), None)
        rest = {name: value for name, value in named.items() if name != key}
        return rest, named[key] if key is not None else None
    if isinstance(batch, tuple | list):
        held = cast("list[Any]", batch)
        if len(held) == 1:
            return held[0], held[0]
        return held[0] if len(held) == 2 else tuple(held[:-1]), held[-1]
    return batch, batch


def targets_in_memory(*parts: Part) -> list[Tensor]:
    """The targets of the parts that are in memory."""
    found = [split_batch(part.fields)[1] for part in parts if isinstance(part, TensorPart)]
    return [target for target in found if isinstance(target, Tensor)]


def data_facts(batch: Any, train: Part) -> dict[str, int]:
    """``inputs``, ``channels`` and ``classes``, as far as they are known.

    Args:
        batch: a batch.
        train: the training examples.

    Example:
        >>> x, y = torch.zeros(6, 3, 8, 8), torch.arange(6)
        >>> data_facts((x, y), TensorPart((x, y), 2))
        {'inputs': 192, 'channels': 3, 'classes': 6}
    """
    inputs, target = split_batch(batch)
    found: dict[str, int] = {}
    if isinstance(inputs, dict) and len(cast("dict[str, Any]", inputs)) == 1:
        (inputs,) = cast("dict[str, Any]", inputs).values()
    if isinstance(inputs, Tensor) and inputs.ndim > 1:
        found |= {"inputs": inputs[0].numel(), "channels": inputs.shape[1]}
    if (classes := _classes(target, train)) is not None:
        found["classes"] = classes
    return found


def _classes(target: Any, train: Part) -> int | None:
    """The number of classes, or of real numbers to predict."""
    if isinstance(target, Tensor) and target.is_floating_point():
        return target.shape[1] if target.ndim > 1 else 1
    if isinstance(train, TensorPart):
        held = targets_in_memory(train)
        return _highest(held[0]) if held else None
    if isinstance(train, MapPart):
        return _of_dataset(train.dataset)
    return _of_dataset(train.loader.dataset) if isinstance(train, StreamPart) else None


def _of_dataset(dataset: Any) -> int | None:
    """The number of classes that a dataset, or the one that it is a part of, tells."""
    if isinstance(names := getattr(dataset, "classes", None), list | tuple):
        return len(cast("list[Any]", names))
    if isinstance(dataset, TensorDataset):
        return _highest(dataset.tensors[-1])
    if isinstance(dataset, list | tuple):
        return _highest([split_batch(item)[1] for item in cast("list[Any]", dataset)])
    for name in ("targets", "labels", "y"):
        if (found := _highest(getattr(dataset, name, None))) is not None:
            return found
    parts = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    known = [_of_dataset(part) for part in parts if part is not None]
    return max((one for one in known if one is not None), default=None)


def _highest(labels: Any) -> int | None:
    """One more than the highest of some whole numbers; None: they are something else."""
    try:
        values = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError, RuntimeError):
        return None
    if values.is_floating_point() or values.is_complex() or not values.numel():
        return None
    return int(values.max()) + 1
