"""Faster passes on the meta device: an operation is run once for each combination of shapes.

Most of PyTorch's kernels for this device are Python code, and slow. A recurrent layer calls the
same few with the same shapes in every time step, a deep model in every block.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["RememberedMetaResults"]

_VALUES = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout,
           torch.memory_format)  # fmt: skip
_IN_PLACE = "the first argument"


class RememberedMetaResults(TorchDispatchMode):
    """Within it, an operation on meta tensors is run once for each combination of arguments.

    Later calls return new tensors of the same shape, strides and dtype. Views, operations of other
    libraries, and those with arguments other than plain values and meta tensors, run every time.

    Example:
        >>> x = torch.empty(4, 3, device="meta")
        >>> with RememberedMetaResults() as remembered:
        ...     first, second = x.sigmoid(), x.sigmoid()
        >>> second.shape, second is first, len(remembered.results)
        (torch.Size([4, 3]), False, 1)
    """

    supports_higher_order_operators = True  # they run every time

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        key = _key(func, args, named)
        if key in self.results:
            known = self.results[key]
            return args[0] if known is _IN_PLACE else _made(known)
        found = func(*args, **named)
        if key is not None and (known := _to_remember(func, found, key, args, named)):
            self.results[key] = known
        return found


def _key(func: Any, args: Any, named: dict[str, Any]) -> Any:
    """What the result follows from; None: it has to be run."""
    if not _is_function(func):
        return None
    try:
        return func, _described(args), _described(tuple(named.items()))
    except TypeError:
        return None


@cache
def _is_function(func: Any) -> bool:
    """Whether an operation returns new tensors, or its first argument with other values."""
    if func.namespace != "aten":
        return False
    schema = func._schema
    if any(str(one.type) != "Tensor" for one in schema.returns):
        return False
    if not schema.is_mutable:
        return all(one.alias_info is None for one in schema.returns)
    written = [bool(one.alias_info and one.alias_info.is_write) for one in schema.arguments]
    in_place = written[0] and sum(written) == len(schema.returns) == 1
    return in_place and torch.Tag.inplace_view not in func.tags


def _described(value: Any) -> Any:
    kind = type(value)
    if kind in (tuple, list):
        return kind, *map(_described, value)
    if kind in _VALUES:
        return kind, value
    if kind not in (Tensor, nn.Parameter) or not _is_meta(value):
        raise TypeError(kind)
    return Tensor, value.shape, value.stride(), value.dtype


def _is_meta(x: Tensor) -> bool:
    return x.is_meta and x.layout == torch.strided


def _made(known: Any) -> Any:
    """New tensors as described."""
    kind, *parts = known
    if kind is Tensor:
        shape, strides, dtype = parts
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return None if kind is type(None) else kind(map(_made, parts))


def _to_remember(func: Any, found: Any, key: Any, args: Any, named: dict[str, Any]) -> Any:
    """The description of new tensors, or that it is the first argument; else None."""
    if func._schema.is_mutable:  # a few kernels enlarge it by broadcasting
        _, (_, before, *_), _ = key
        return _IN_PLACE if _described(args[0]) == before else None
    results, given = _tensors(found), _tensors((args, named))
    memory = [x.untyped_storage()._cdata for x in results]
    others = {x.untyped_storage()._cdata for x in given}
    new = len(others | set(memory)) == len(others) + len(memory)
    return _described(found) if new and all(map(_is_meta, results)) else None


def _tensors(values: Any) -> list[Any]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]
