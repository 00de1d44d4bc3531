"""Accelerate's own files, checked before one of them is loaded: it loads one after the other.

It writes them one after the other too, into a folder that may hold those of an older save, and its
weights have no checksum. So one of each tensor is kept beside the rank scheduler's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import TensorFile
from dynarank.layers.form_entry import KEY

__all__ = ["check_optimizer", "check_pickled", "check_weights", "checksums", "numbered"]

_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_WAY_OUT = "use another checkpoint"


def numbered(name: str, number: int) -> str:
    """The name of Accelerate's file for one of several objects.

    Example:
        >>> numbered("optimizer.bin", 0), numbered("optimizer.bin", 1)
        ('optimizer.bin', 'optimizer_1.bin')
    """
    return name.replace(".", f"_{number}.") if number else name


def checksums(state: Mapping[str, Any]) -> dict[str, int]:
    """The sum of the bits of each tensor of a model's state, as integers: any one bit changes it.

    Example:
        >>> checksums({"weight": torch.ones(2, 2)}) == {"weight": 4 * 0x3F800000}
        True
    """
    dense = {n: t for n, t in state.items() if isinstance(t, Tensor) and _is_dense(t)}
    return {name: _checksum(tensor) for name, tensor in dense.items()}


def check_weights(folder: Path, number: int, model: nn.Module, known: Mapping[str, int]) -> None:
    """Check the saved weights of one of several models.

    Args:
        folder: the folder that ``save_state`` wrote.
        number: of the model.
        model: as it is; its forms are those of the saved run.
        known: the :func:`checksums` when it was saved.

    Raises:
        ValueError: they are of another model.
        DamagedFileError: the file is missing or cut, or of another save.
    """
    path, saved, read = _opened(folder, number)
    state = model.state_dict()
    if saved and saved.keys().isdisjoint(state):
        raise ValueError(
            f"{path} has tensors named {min(saved)!r}, the model {min(state)!r}: load it into the "
            "same model, in as many processes (DDP puts 'module.' before each name)"
        )
    for name, outline in saved.items():
        own = state.get(name)
        if isinstance(own, Tensor) and not name.endswith(KEY) and own.shape != outline.shape:
            raise ValueError(
                f"{path}: {name!r} has the shape {tuple(outline.shape)}, and {tuple(own.shape)} in "
                "this model: load the state of the same model"
            )
        if name in known and _checksum(read(name)) != known[name]:
            why = f"its {name!r} is not the one that was saved with the rank scheduler"
            raise DamagedFileError(path, why, _WAY_OUT)


def check_optimizer(path: Path, optimizer: Any) -> None:
    """Check a saved state of an optimizer; raises as :func:`check_weights`."""
    with suppress(UnpicklingError):
        saved, own = len(_read(path)["param_groups"]), len(optimizer.param_groups)
        if saved != own:
            raise ValueError(
                f"{path} has {saved} parameter groups, the optimizer {own}: make the optimizer of "
                "the same groups as in the saved run"
            )


def check_pickled(paths: Iterable[Path]) -> None:
    """Raise DamagedFileError unless files are as torch.save wrote them."""
    for path in paths:
        with suppress(UnpicklingError):  # classes that only the user's load_kwargs allow
            _read(path)


def _read(path: Path) -> Any:
    """What torch.save wrote; tensors are mapped, and all checksums compared, as torch does not."""
    from accelerate.utils.other import load  # names the classes that are safe

    try:
        with ZipFile(path) as file:
            if torch.serialization.get_crc32_options() and (damaged := file.testzip()):
                raise DamagedFileError(path, f"{damaged} has changed since it was saved", _WAY_OUT)
        return load(path, map_location="cpu", mmap=True)
    except FileNotFoundError as error:
        raise DamagedFileError(path, "it is missing", _WAY_OUT) from error
    except (OSError, RuntimeError, BadZipFile) as error:
        raise DamagedFileError(path, str(error), _WAY_OUT) from error


def _opened(
    folder: Path, number: int
) -> tuple[Path, Mapping[str, Tensor], Callable[[str], Tensor]]:
    """A model's file, its tensors (those of a safetensors file without values), and one of them."""
    path = folder / numbered(_SAFE, number)
    if path.exists():
        file = TensorFile(path)
        return path, file.outlines, lambda name: file.read(name, ())
    path = folder / numbered(_PICKLED, number)
    state = _read(path)
    tensors = {name: one for name, one in state.items() if isinstance(one, Tensor)}
    return path, tensors, lambda name: tensors[name]


def _checksum(tensor: Tensor) -> int:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.detach().resolve_neg().contiguous().view(-1).view(_INTEGERS[real.itemsize])
    return int(bits.sum(dtype=torch.int64))


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not (tensor.is_meta or tensor.is_quantized)
