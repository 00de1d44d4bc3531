"""A device called cuda on a machine without one: its tensors are the CPU's, with a tag.

Within :func:`pretended_cuda`, ``device="cuda"`` works for whatever is called by torch's Python API,
and what a GPU refuses raises here too: a CPU tensor with dimensions among CUDA tensors. Indices may
be on the CPU, and so may what is copied. ``torch.cuda`` is replaced by what :class:`Calls` notes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # what is first imported within the context would see what is replaced
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Calls", "MixedDevicesError", "pretended_cuda"]

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
_COPIES = {"copy_", "set_", "to", "__set__", "_has_compatible_shallow_copy_type"}
_INDEX = {"__getitem__", "__setitem__"}


class MixedDevicesError(RuntimeError):
    """Tensors of two devices in one function."""


class _Tagged(TorchFunctionMode):
    """Gives tensors a device by their storage, and checks that those of a function agree."""

    def __init__(self) -> None:
        super().__init__()
        self._tags: dict[int, tuple[StorageWeakRef, torch.device]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(func, args, dict(kwargs or {}))

    def _run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if name == "__get__" and owner in (Tensor.device, Tensor.is_cuda):
            known = self._tag(args[0]) or _CPU
            return known if owner is Tensor.device else known == _CUDA
        if name == "__deepcopy__":  # its memo refers to whole models
            self._put(result := func(*args), self._tag(args[0]) or _CPU)
            return result
        if name.startswith("linalg_"):
            driver = kwargs.pop("driver", None)  # which only a GPU has
            assert driver in (None, "gesvd", "gesvdj", "gesvda")
        if func in _device_constructors() and kwargs.get("device") is None:
            kwargs["device"] = torch.utils._device.CURRENT_DEVICE or _CPU
        given = tree_leaves((args, kwargs))
        tensors = [value for value in given if isinstance(value, Tensor)]
        self._check(name, tensors)
        asked = next((device for value in given if (device := _named(value))), None)
        if asked == _CUDA:
            args, kwargs = tree_map(lambda v: _CPU if _named(v) == _CUDA else v, (args, kwargs))
        result = func(*args, **kwargs)
        known = [tag for one in tensors if (tag := self._tag(one)) not in (None, asked)]
        if asked and known and any(result is one for one in tensors):
            result = result.clone()  # to another device: no longer the same storage
        self._put(result, asked or (_CUDA if _CUDA in known else _CPU))
        return result

    def _check(self, name: str, tensors: list[Tensor]) -> None:
        tags = {self._tag(one) for one in tensors if one.ndim} - {None}
        indexed = name in _INDEX and self._tag(tensors[0]) == _CUDA
        if len(tags) > 1 and not indexed and name not in _COPIES:
            raise MixedDevicesError(f"{name}: {[(one.shape, self._tag(one)) for one in tensors]}")

    def _tag(self, tensor: Tensor) -> torch.device | None:
        """The device of a tensor; None for what autograd has made, which is not seen."""
        if tensor.is_meta:
            return torch.device("meta")
        ref, device = self._tags.get(tensor.untyped_storage()._cdata, (None, None))
        return None if ref is None or ref.expired() else device

    def _put(self, result: Any, device: torch.device) -> None:
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and not one.is_meta:
                storage = one.untyped_storage()
                self._tags[storage._cdata] = StorageWeakRef(storage), device


def _named(value: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu", "meta"):
        value = torch.device(value)
    if isinstance(value, torch.device):
        return _CUDA if value.type == "cuda" else value
    return None


class _Generator(torch.Generator):
    """A generator for the device, which is the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


class Calls:
    """The functions of ``torch.cuda`` that are used, with a list of their calls."""

    def __init__(self) -> None:
        self.names: list[str] = []
        fixed = {
            "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None,
            "max_memory_allocated": 2_000_000, "memory_allocated": 1_000_000,
            "_sleep": None, "is_available": True, "is_bf16_supported": True, "set_rng_state": None,
            "get_device_properties": SimpleNamespace(
                name="pretended", total_memory=1, multi_processor_count=1, major=9, minor=0
            ),
        }  # fmt: skip
        self.functions: dict[str, Any] = {k: self._noting(k, v) for k, v in fixed.items()}
        self.functions["get_rng_state"] = lambda device=0: torch.get_rng_state()
        self.functions["Event"] = self._event

    def _noting(self, name: str, value: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.names.append(name)
            return value

        return call

    def _event(self, enable_timing: bool = False) -> Any:
        assert enable_timing, "an event without a time"
        event, at = SimpleNamespace(), list[float]()

        def record() -> None:
            self.names.append("record")
            at[:] = [time.perf_counter()]

        def elapsed_time(other: Any) -> float:
            assert self.names[-1] in ("synchronize", "elapsed_time"), "read before it is over"
            self.names.append("elapsed_time")
            return 1e3 * (other.at[0] - at[0])

        event.record, event.elapsed_time, event.at = record, elapsed_time, at
        event.query = lambda: self._noting("query", self.names[-1] == "synchronize")()
        return event


@contextmanager
def pretended_cuda() -> Generator[Calls]:
    """A context with a pretended GPU."""
    calls = Calls()
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    autocast = torch.autocast
    replaced = {
        "is_autocast_enabled": lambda device="cuda": enabled("cpu"),
        "get_autocast_dtype": lambda device="cuda": dtype("cpu"),
        "autocast": lambda device, kind: autocast("cpu", kind),
        "Generator": _Generator,
    }
    with ExitStack() as stack:
        for name, value in calls.functions.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch, name, value))
        stack.enter_context(_Tagged())
        yield calls
