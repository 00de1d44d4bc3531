"""The share of each global batch that one of several processes trains on.

DDP averages gradients over N processes. With ``n_p`` of the ``n`` terms of a batch's mean loss on
process ``p``, its loss counts ``N n_p / n``-fold, so that the average is the gradient of the whole
batch's loss, also where N does not divide the batch.

Every process draws the whole batch, in the order of a run in one process, and takes its rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.distributed.processes import Processes
from dynarank.layers.running import preserve_state
from dynarank.train.recipe_error import RecipeError
from dynarank.train.task import Task

__all__ = ["Shares", "count_examples", "rows_of"]

# Relative errors of the mean of the shares' losses. At the start of training all examples may have
# nearly one loss (log V of V tokens), so that the mean says little of how they are counted: only
# what float32 allows tells.
_CLOSE = 1e-3  # in bf16, or with a small term that is no mean, such as one of balanced experts
_EXACT = 1e-5  # in float32
_ALONE = "train it in one process, without torchrun"
_FIRST = (
    "the first batch of an epoch (dynarank splits it: let every process read all data in one order)"
)


class Shares:
    """Splits the batches of a task among processes.

    Args:
        task: the task, the same in all processes.
        processes: the processes.
        size: the number of examples of a batch.

    Raises:
        RecipeError: a batch has not an example for each process.
    """

    def __init__(self, task: Task, processes: Processes, size: int) -> None:
        if size < processes.size:
            raise RecipeError(
                f"a batch of {size} cannot be split among {processes.size} processes (the batch "
                "size of a recipe is that of all together); raise --batch-size, or start fewer"
            )
        self._task, self._processes = task, processes
        self._rules: list[int] | None = None  # of the task's ways to count, those that may hold
        self._batches = 0

    def of(self, model: nn.Module, batch: Any) -> tuple[Any, float]:
        """This process's share of a batch, and its part of the batch's mean loss.

        Where nothing of a batch falls to this process, it is the whole batch, and the part is 0.

        Raises:
            RecipeError: the loss of the batch is no mean over its examples.
        """
        self._batches += 1
        if self._rules is None or self._doubtful(batch):
            self._rules = self._holding(model, batch)
        rank, size, count = self._processes.rank, self._processes.size, count_examples(batch)
        share = _share(batch, rank, size, count)
        part = self._part(share, batch, self._rules[0]) if share is not None else 0.0
        return (share, part) if part else (batch, 0.0)

    def agreed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; of the first, all processes must have the same.

        Raises:
            DisagreementError: they have not.
        """
        first = next(batches, None)
        self._processes.agree(_FIRST, None if first is None else _digest(first))
        if first is not None:
            yield first
            yield from batches

    def _part(self, share: Any, batch: Any, rule: int) -> float:
        """The part of the batch's terms that are the share's."""
        return self._task.loss_terms(share)[rule] / (self._task.loss_terms(batch)[rule] or 1)

    def _shares(self, batch: Any) -> list[Any]:
        count, size = count_examples(batch), self._processes.size
        shares = [_share(batch, rank, size, count) for rank in range(size)]
        return [share for share in shares if share is not None]

    def _doubtful(self, batch: Any) -> bool:
        """Whether the ways to count that may hold differ on this batch.

        Also at batches 2, 4, 8, and so on: where examples have equal lengths or losses, one that
        does not hold looks as if it did.
        """
        if self._batches.bit_count() == 1:
            return True
        if len(rules := self._rules or []) == 1:
            return False
        shares = self._shares(batch)
        parts = [[self._part(share, batch, rule) for share in shares] for rule in rules]
        return any(found != parts[0] for found in parts)

    def _holding(self, model: nn.Module, batch: Any) -> list[int]:
        """The ways to count by which the mean of the shares' losses is the batch's; closest first.

        Raises:
            RecipeError: there is none.
        """
        rules = self._rules or list(range(len(self._task.loss_terms(batch))))
        shares = self._shares(batch)
        with preserve_state(model, training=False, grad=False):
            whole, again = self._loss(model, batch), self._loss(model, batch)
            try:
                losses = [self._loss(model, share) for share in shares]
            except (ValueError, RuntimeError, IndexError, TypeError) as error:
                raise RecipeError(
                    f"a batch cannot be split among {self._processes.size} processes: its tensors "
                    f"of {count_examples(batch)} examples were cut along their first dimension, "
                    f"and the model or the loss failed ({error}); {_ALONE}"
                ) from error
        if whole != again or not math.isfinite(whole):  # it draws numbers: nothing to compare
            return rules[:1]
        found = {rule: self._mean(losses, shares, batch, rule) for rule in rules}
        rules = sorted(rules, key=lambda rule: abs(found[rule] - whole))
        exact = _near(found[rules[0]], whole, _EXACT) and not _coarse(model)
        near = [r for r in rules if _near(found[r], whole, _EXACT if exact else _CLOSE)]
        if not near:
            raise RecipeError(
                f"the loss of a batch is no mean over its examples ({whole:g}, but "
                f"{found[rules[0]]:g} by the shares of {self._processes.size} processes), so that "
                f"they would train on another loss; {_ALONE}, or average it over examples"
            )
        return near

    def _mean(self, losses: list[float], shares: list[Any], batch: Any, rule: int) -> float:
        parts = [self._part(share, batch, rule) for share in shares]
        return sum(loss * part for loss, part in zip(losses, parts, strict=True) if part)

    def _loss(self, model: nn.Module, batch: Any) -> float:
        return self._task.loss(model, batch)[0].item()


def _near(found: float, whole: float, tolerance: float) -> bool:
    return math.isclose(found, whole, rel_tol=tolerance, abs_tol=1e-3 * tolerance)


def _coarse(model: nn.Module) -> bool:
    """Whether parameters are of less precision than float32."""
    return any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())


def _share(batch: Any, rank: int, size: int, count: int) -> Any:
    """A process's rows, to which all others' are equal in number or differ by one; None: none."""
    start, stop = rank * count // size, (rank + 1) * count // size
    return rows_of(batch, slice(start, stop)) if start < stop else None


def rows_of(batch: Any, rows: slice) -> Any:
    """Some examples of a batch: those rows of each tensor and of each list of plain values.

    What has another length is of no single example, and stays.

    Example:
        >>> batch = {"x": torch.arange(4), "name": list("abcd"), "scale": 2.0}
        >>> rows_of(batch, slice(1, 3))
        {'x': tensor([1, 2]), 'name': ['b', 'c'], 'scale': 2.0}
    """
    count = count_examples(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows] if value.ndim and len(value) == count else value
        if isinstance(value, list) and len(value) == count and not any(_tensors(value)):
            return cast("list[Any]", value)[rows]
        return _rebuilt(value, cut)

    return cut(batch)


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container with a function applied to each of its values; anything else as it is."""
    if isinstance(value, Mapping):
        return {k: function(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: function(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list | tuple):
        found = [function(one) for one in cast("list[Any]", value)]
        kind = cast("Any", type(value))
        return kind(*found) if hasattr(kind, "_fields") else kind(found)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch that are of several examples."""
    found: list[Tensor] = []

    def look(one: Any) -> Any:
        if isinstance(one, Tensor) and one.ndim:
            found.append(one)
        return _rebuilt(one, look)

    look(value)
    yield from found


def count_examples(batch: Any) -> int:
    """The number of examples of a batch: the length of its first tensor.

    Raises:
        RecipeError: it has none.
    """
    if (first := next(_tensors(batch), None)) is None:
        raise RecipeError(
            f"a batch ({type(batch).__name__}) holds no tensor whose first dimension is that of "
            f"the examples, so it cannot be split among processes; {_ALONE}"
        )
    return len(first)


def _digest(batch: Any) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(batch):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]
