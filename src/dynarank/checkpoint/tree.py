"""Nested data with tensors in it, as JSON and a table of tensors, and back; nothing is pickled.

A dictionary with string keys, a list and a JSON value stay what they are. Everything else becomes a
dictionary with one key that begins with ``$``: ``{"$tensor": "state/0/exp_avg"}`` names an entry of
the table, ``{"$tuple": [...]}`` is a tuple. What has no such tag is refused, by its place in the
data; reading makes only the types listed here, whatever a file says.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["flatten", "unflatten"]

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if type(v) is torch.dtype}
_READ_ERRORS = TypeError, LookupError, ValueError, AttributeError, ArithmeticError, RuntimeError
_EXACT = 2**63  # integers in JSON beyond this are not read alike everywhere


def flatten(data: Any, name: str = "data") -> tuple[Any, dict[str, Tensor]]:
    """Split nested data into JSON values and the tensors in it, detached but not copied.

    Args:
        data: dictionaries, lists, tuples, sets, numbers, strings, bytes, tensors, NumPy arrays,
            dtypes, devices, sizes, counters and deques, nested in any way.
        name: what an error calls it.

    Returns:
        The JSON values, and the tensors by the place in the data where each first stands.

    Raises:
        TypeError: something else is in it, or a tensor without values (meta) or of a layout that
            cannot be stored (sparse, quantized); the message says where.

    Example:
        >>> flatten({"step": 3, "sizes": (torch.zeros(2), None)})[0]
        {'step': 3, 'sizes': {'$tuple': [{'$tensor': 'sizes/0'}, None]}}
    """
    writer = _Writer(name)
    return writer.value(data, ()), writer.tensors


def unflatten(data: Any, tensors: Mapping[str, Tensor], name: str = "data") -> Any:
    """The inverse of :func:`flatten`; a tensor that stood in two places is one object again.

    Raises:
        ValueError: an unknown tag, a tensor that is missing, a value of the wrong type.
    """
    try:
        return _read(data, tensors)
    except (
        TypeError,
        LookupError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{name} does not hold what was saved: {error}") from error


class _Writer:
    """Collects the tensors while it turns data into JSON values."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._open: set[int] = set()  # containers around the current value

    def value(self, data: Any, place: tuple[str, ...]) -> Any:
        if data is None or type(data) in (bool, str):
            return data
        if type(data) is int:
            return data if abs(data) < _EXACT else {"$int": hex(data)}
        if type(data) is float:
            return data if math.isfinite(data) else {"$float": str(data)}
        if isinstance(data, Tensor):
            return {"$tensor": self._tensor(data, place)}
        if (tagged := self._scalar(data)) is not None:
            return tagged
        if id(data) in self._open:
            raise TypeError(f"{self._at(place)} contains itself")
        self._open.add(id(data))
        try:
            return self._container(data, place)
        finally:
            self._open.discard(id(data))

    def _scalar(self, data: Any) -> Any:
        if isinstance(data, bytes | bytearray):
            return {"$bytes": b64encode(data).decode()}
        if isinstance(data, complex):
            return {"$complex": [self.value(data.real, ()), self.value(data.imag, ())]}
        if isinstance(data, torch.dtype):
            return {"$dtype": str(data).removeprefix("torch.")}
        if isinstance(data, torch.device):
            return {"$device": str(data)}
        if isinstance(data, torch.Size):
            return {"$size": list(data)}
        if isinstance(data, int | float | str):  # of a subclass: its plain value
            kind = int if isinstance(data, int) else float if isinstance(data, float) else str
            return self.value(kind(data), ())
        return None

    def _container(self, data: Any, place: tuple[str, ...]) -> Any:
        if isinstance(data, Counter):
            return {"$counter": self._items(cast(dict[Any, Any], data), place)}
        if isinstance(data, Mapping):
            found = cast(Mapping[Any, Any], data)
            if all(type(key) is str and not key.startswith("$") for key in found):
                return {key: self.value(one, (*place, key)) for key, one in found.items()}
            return {"$items": self._items(found, place)}
        for tag, kind in (("", list), ("$tuple", tuple), ("$deque", deque)):
            if isinstance(data, kind) and not hasattr(data, "_fields"):
                parts = enumerate(cast(list[Any], data))
                values = [self.value(one, (*place, str(i))) for i, one in parts]
                extra = [data.maxlen] if isinstance(data, deque) else []
                return {tag: [*extra, values] if extra else values} if tag else values
        if isinstance(data, set | frozenset):
            members = sorted(cast(set[Any], data), key=repr)
            tag = "$frozenset" if isinstance(data, frozenset) else "$set"
            return {tag: [self.value(one, place) for one in members]}
        if type(data).__module__ == "numpy":
            return self._numpy(data, place)
        raise TypeError(
            f"{self._at(place)} is of the type {type(data).__module__}.{type(data).__qualname__}, "
            "which cannot be saved: give its state as plain data and tensors, for example by its "
            "state_dict() or get_state()"
        )

    def _items(self, data: Mapping[Any, Any], place: tuple[str, ...]) -> list[Any]:
        pairs = data.items()
        return [[self.value(k, place), self.value(v, (*place, str(k)))] for k, v in pairs]

    def _numpy(self, data: Any, place: tuple[str, ...]) -> Any:
        if data.dtype.hasobject:
            raise TypeError(f"{self._at(place)} is a NumPy array of Python objects")
        if data.ndim == 0 and type(data.item()).__module__ != "numpy":  # as of a long double
            return self.value(data.item(), place)
        try:
            tensor = torch.from_numpy(data.copy())
        except (TypeError, ValueError) as error:  # strings, another byte order
            raise TypeError(f"{self._at(place)}: {error}") from None
        return {"$array": self._tensor(tensor, place)}

    def _tensor(self, tensor: Tensor, place: tuple[str, ...]) -> str:
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise TypeError(f"{self._at(place)} is a {kind} tensor, which cannot be saved")
        if (known := self._seen.get(id(tensor))) is not None:
            return known[0]
        # Lone surrogates are no UTF-8, which a file's names are.
        stem = ("/".join(place) or self.name).encode("utf-8", "backslashreplace").decode()
        name = stem
        number = 1
        while name in self.tensors:  # {"a/b": x, "a": {"b": y}}
            number += 1
            name = f"{stem}#{number}"
        self._seen[id(tensor)] = name, tensor
        self.tensors[name] = tensor.detach()
        return name

    def _at(self, place: tuple[str, ...]) -> str:
        return "".join([self.name, *(f"[{part!r}]" for part in place)])


def _read(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_read(one, tensors) for one in cast(list[Any], data)]
    if not isinstance(data, dict):
        return data
    found = cast(dict[str, Any], data)
    if len(found) == 1 and next(iter(found)).startswith("$"):
        ((tag, value),) = found.items()
        if tag in ("$tensor", "$array"):
            tensor = tensors[value]
            return tensor if tag == "$tensor" or tensor.is_meta else tensor.numpy()
        if tag not in _TAGS:
            raise ValueError(f"unknown tag {tag!r}")
        return _TAGS[tag](_read(value, tensors))
    return {key: _read(one, tensors) for key, one in found.items()}


_TAGS: dict[str, Callable[[Any], Any]] = {
    "$int": lambda v: int(v, 16),
    "$float": float,
    "$complex": lambda v: complex(*v),
    "$bytes": lambda v: b64decode(v, validate=True),
    "$dtype": lambda v: _DTYPES[v],
    "$device": torch.device,
    "$size": lambda v: torch.Size(v),
    "$tuple": tuple,
    "$deque": lambda v: deque(v[1], v[0]),
    "$set": set,
    "$frozenset": frozenset,
    "$items": lambda v: dict(v),
    "$counter": lambda v: Counter(dict(v)),
}
