"""Access to the tensors that ``torch.save`` wrote, without running code from the file.

A file is read with ``weights_only=True`` and mapped, so that a tensor's bytes come into memory when
they are used. They would stay as long as the mapping: the file is mapped again in between.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError
from dynarank.monitors.stored_tensor import StoredTensor, dtype_name

__all__ = ["TorchFile"]

# Where a checkpoint keeps the model, most frequent first.
_MODELS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights", "ema")
_DEPTH = 3  # {"checkpoint": {"model": {"state_dict": ...}}}
_REMAPPED = 64 << 20  # bytes read from a mapping until the next
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
           torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # fmt: skip


class TorchFile:
    """One file of ``torch.save``: the tensors of its model by name, in their order.

    The model is the file's dictionary, or one in it: ``state_dict``, ``model`` and the like. Where
    there are several others, such as ``encoder`` and ``decoder``, they come before the names.

    Args:
        path: the file.

    Raises:
        DamagedFileError: it cannot be read without running code from it, or not at all, or there is
            no dictionary of tensors in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found, self._read = self._load(), 0
        first = {_memory(tensor): name for name, tensor in reversed(self._found.items())}
        self.tensors = {
            name: _stored(tensor, first[_memory(tensor)]) for name, tensor in self._found.items()
        }

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Read a tensor, or one entry of its first dimension; 8-bit floats come in fp32."""
        if self._read > _REMAPPED:
            self._found, self._read = {}, 0  # unmap first
            self._found = self._load()
        tensor = self._found[name].detach()
        self._read += tensor.nbytes
        tensor = tensor if index is None else tensor[index]
        return tensor.float() if _is_small_float(tensor.dtype) else tensor

    def _load(self) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storages
            loaded = _loaded(self.path)
        if _is_optimizer(loaded):
            raise DamagedFileError(
                self.path,
                "it is the state of an optimizer",
                "name the file of the model that was saved with it",
            )
        if not (found := _model(loaded)):
            raise DamagedFileError(
                self.path,
                "it holds no dictionary of tensors",
                "save the model's: torch.save(model.state_dict(), FILE)",
            )
        return found


def _loaded(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)  # as torch before 1.6 wrote
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle may fail anywhere
        problem = f"it is not a complete file of torch.save: {printable(str(error).split('. ')[0])}"
        raise DamagedFileError(path, problem) from error


def _refused(path: Path, told: str) -> DamagedFileError:
    if found := re.search(r"(?:GLOBAL|class|function) ([\w.]+)", told):
        problem = (
            f"it holds more than tensors, {printable(found[1])}, and loading that could run code"
        )
        return DamagedFileError(
            path, problem, "save its tensors alone: torch.save(model.state_dict(), FILE)"
        )
    reason = told.rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines() or [""]
    return DamagedFileError(
        path,
        f"it is not a file of tensors: {printable(reason[0])}",
        "save it by torch.save(model.state_dict(), FILE) or as safetensors",
    )


def _model(data: Any, depth: int = _DEPTH) -> dict[str, Tensor]:
    """The tensors of the model in what a file holds: of a known key, its own, or of other keys."""
    if not isinstance(data, Mapping):
        return {}
    entries = cast("Mapping[Any, Any]", data)
    own = {str(name): value for name, value in entries.items() if isinstance(value, Tensor)}
    if not depth or _is_optimizer(entries):
        return own
    for key in _MODELS:
        if found := _model(entries.get(key), depth - 1):
            return found
    if any(tensor.ndim > 1 for tensor in own.values()):
        return own
    others = {
        str(key): found
        for key, value in entries.items()
        if "optim" not in str(key) and not _is_optimizer(value)
        if (found := _model(value, depth - 1))
    }
    weights = {
        key: found for key, found in others.items() if any(t.ndim > 1 for t in found.values())
    }
    others = weights or others
    if len(others) > 1:
        return {f"{key}.{name}": t for key, found in others.items() for name, t in found.items()}
    return next(iter(others.values()), own)


def _is_optimizer(data: Any) -> bool:
    return isinstance(data, Mapping) and "param_groups" in data


def _memory(tensor: Tensor) -> object:
    """What tensors that are one and the same have in common."""
    if tensor.layout is not torch.strided or tensor.is_quantized or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _stored(tensor: Tensor, first: str) -> StoredTensor:
    plain = tensor.layout is torch.strided and not tensor.is_quantized
    kind = (
        dtype_name(tensor.dtype) if plain else "sparse" if not tensor.is_quantized else "quantized"
    )
    dtype = tensor.dtype if plain and tensor.dtype in _FLOATS else None
    return StoredTensor(tuple(tensor.shape), dtype, kind, first)


def _is_small_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1
