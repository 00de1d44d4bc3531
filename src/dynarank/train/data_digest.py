"""The digest of a task's data: runs on other data are another experiment."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dynarank.train.task import Task

__all__ = ["data_digest"]

_PARTS = ("data", "train", "test")  # the attributes of a task that hold its data
_known: WeakKeyDictionary[Task, str] = WeakKeyDictionary()


def data_digest(task: Task) -> str:
    """The SHA-256 of all tensors of a task's data, wherever they were read from.

    It is computed once for each task.

    Example:
        >>> from dynarank.train.recipes import load_recipe
        >>> from dynarank.train.tasks import make_task
        >>> cpu = torch.device("cpu")
        >>> one, two = (make_task(load_recipe("digits"), seed=seed, device=cpu) for seed in (0, 1))
        >>> data_digest(one) == data_digest(two)
        True
    """
    if task in _known:
        return _known[task]
    digest = hashlib.sha256()
    for part in _PARTS:
        for tensor in _tensors(getattr(task, part, None)):
            digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
    _known[task] = digest.hexdigest()
    return _known[task]


def _tensors(part: object) -> Iterator[Tensor]:
    """All tensors of nested data, in a fixed order."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors(item)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(part, Mapping):
        for key in sorted(part, key=str):  # pyright: ignore
            yield from _tensors(part[key])  # pyright: ignore
    elif hasattr(part, "__dict__"):
        yield from _tensors(vars(part))
