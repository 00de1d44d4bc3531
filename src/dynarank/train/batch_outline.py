"""What the inputs of a network are like, as plain data: enough to make some like them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["outline", "stand_in"]

_PLAIN = (bool, int, float, str, type(None))


def outline(inputs: Any) -> Any:
    """The shapes and dtypes of inputs, nested as they are; None if there is anything else in them.

    Example:
        >>> outline({"words": torch.tensor([[2, 7]])})
        {'named': {'words': {'shape': [1, 2], 'dtype': 'int64', 'below': 8}}}
    """
    if isinstance(inputs, Tensor):
        return _of_tensor(inputs)
    if isinstance(inputs, Mapping):
        named = {str(k): outline(v) for k, v in cast("Mapping[Any, Any]", inputs).items()}
        return None if None in named.values() else {"named": named}
    if type(inputs) in (tuple, list):
        listed = [outline(one) for one in inputs]
        return None if None in listed else {"listed": listed}
    return {"value": inputs} if isinstance(inputs, _PLAIN) else None


def _of_tensor(x: Tensor) -> dict[str, Any]:
    told = {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
    whole = not x.is_floating_point() and not x.is_complex()
    return {**told, "below": int(x.max()) + 1} if whole and x.numel() else told


def stand_in(told: Any) -> Any:
    """Inputs of this outline: normal numbers, or whole numbers in the same range.

    What is only 0 or 1, as a mask, is 1 everywhere. The values are always the same.

    Example:
        >>> x = stand_in(outline((torch.zeros(2, 3), torch.tensor([5]))))
        >>> x[0].shape, x[1].shape
        (torch.Size([2, 3]), torch.Size([1]))
    """
    return _made(told, torch.Generator().manual_seed(0))


def _made(told: Any, generator: torch.Generator) -> Any:
    if told is None:
        return None
    if "named" in told:
        return {name: _made(one, generator) for name, one in told["named"].items()}
    if "listed" in told:
        return tuple(_made(one, generator) for one in told["listed"])
    if "value" in told:
        return told["value"]
    shape, dtype, below = told["shape"], getattr(torch, told["dtype"]), told.get("below")
    if below is None:
        return torch.randn(shape, generator=generator).to(dtype)
    if below <= 2:
        return torch.full(shape, below - 1).to(dtype)
    return torch.randint(0, below, shape, generator=generator).to(dtype)
