"""The share of each global batch that one of several processes trains on.

DDP averages gradients over N processes. With ``n_p`` of the ``n`` terms of a batch's mean loss on
process ``p``, its loss counts ``N n_p / n``-fold, so that the average is the gradient of the whole
batch's loss, also where N does not divide the batch. What the terms are (examples, targets, tokens
that follow) is found by the gradients of parts of a batch.

Every process draws the whole batch, in the order of a run in one process, and takes its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynarank.distributed.processes import Processes
from dynarank.layers.running import preserve_state
from dynarank.train.loss_mean import errors_of_mean
from dynarank.train.recipe_error import RecipeError
from dynarank.train.task import Task

__all__ = ["Share", "Shares", "count_examples", "rows_of"]

_MOST = 2e-2  # of gradients; bf16 parameters give 4e-3, a small term for balanced experts 6e-3
_LIKE = 1e-5  # rounding in float32
_ALL_LOOKED_AT, _LAST_LOOK = 16, 1024  # batches
_CANDIDATES = 256  # examples
_ALONE = "train it in one process, without torchrun"
_FIRST = (
    "the first batch of an epoch (dynarank splits it: let every process read all data in one order)"
)


@dataclass(frozen=True)
class Share:
    """What a process has of a batch.

    Args:
        batch: its examples; where none falls to it, the whole batch.
        of_loss: its part of the batch's mean loss.
        of_score: its part of the batch's mean score.
    """

    batch: Any
    of_loss: float
    of_score: float


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

    def of(self, model: nn.Module, batch: Any) -> Share:
        """This process's share of a batch.

        Raises:
            RecipeError: the loss of the batch is no mean over its examples.
        """
        self._batches += 1
        if self._rules is None or self._doubtful(batch):
            self._rules = self._holding(model, batch)
        share, rule = self._share(batch, self._processes.rank), self._rules[0]
        part = self._part(share, batch, rule) if share is not None else 0.0
        if not part:
            return Share(batch, 0.0, 0.0)
        scored = self._part(share, batch, rule if self._task.metric.name == "loss" else 0)
        return Share(share, part, scored)

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

    def _share(self, batch: Any, rank: int) -> Any:
        """A process's rows, to which all others' are equal in number or differ by one; or None."""
        size, count = self._processes.size, count_examples(batch)
        start, stop = rank * count // size, (rank + 1) * count // size
        return rows_of(batch, slice(start, stop)) if start < stop else None

    def _part(self, share: Any, batch: Any, rule: int) -> float:
        """The part of the batch's terms that are the share's."""
        return self._task.loss_terms(share)[rule] / (self._task.loss_terms(batch)[rule] or 1)

    def _doubtful(self, batch: Any) -> bool:
        """Whether the ways to count that may hold differ on this batch.

        Later only at batches 16, 32, 64 and so on: where examples have equal lengths or no
        gradient, a way that does not hold looks as if it did.
        """
        if self._batches.bit_count() == 1:
            return self._batches <= _LAST_LOOK
        if self._batches > _ALL_LOOKED_AT or len(rules := self._rules or []) == 1:
            return False
        shares = [self._share(batch, rank) for rank in range(self._processes.size)]
        parts = [[self._part(s, batch, rule) for s in shares if s is not None] for rule in rules]
        return any(found != parts[0] for found in parts)

    def _holding(self, model: nn.Module, batch: Any) -> list[int]:
        """The ways to count by which the loss is the mean of two parts' losses; closest first.

        Raises:
            RecipeError: there is none.
        """
        rules = self._rules or list(range(len(self._task.loss_terms(batch))))
        if self._rules is None:  # what fails on a whole batch, does not fail since it is split
            with preserve_state(model, training=False, grad=False):
                self._task.loss(model, batch)
        if (some := self._some(batch)) is None:
            return rules
        whole, *parts = some
        weights = [[self._part(part, whole, rule) for part in parts] for rule in rules]
        errors = errors_of_mean(self._guarded(model), model, whole, parts, weights)
        if errors is None:
            return rules
        found = dict(zip(rules, errors, strict=True))
        first, *others = sorted(rules, key=found.__getitem__)
        if found[first] > _MOST:
            raise RecipeError(
                f"the loss of a batch is no mean over its examples (the gradients of two parts of "
                f"it, by their numbers of targets, miss its own by {found[first]:.0%}), so that "
                f"{self._processes.size} processes would train on another loss; {_ALONE}, or "
                "average it over examples"
            )
        near = max(_LIKE, 3 * found[first])
        return [first, *(rule for rule in others if found[rule] <= near)]

    def _guarded(self, model: nn.Module) -> Callable[[Any], Tensor]:
        """The loss of some examples of a batch."""

        def loss(some: Any) -> Tensor:
            try:
                return self._task.loss(model, some)[0]
            except (ValueError, RuntimeError, IndexError, TypeError) as error:
                raise RecipeError(
                    f"a batch cannot be split among {self._processes.size} processes: its tensors "
                    f"were cut along their first dimension to {count_examples(some)} examples, "
                    f"and the model or the loss failed ({error}); {_ALONE}"
                ) from error

        return loss

    def _some(self, batch: Any) -> tuple[Any, Any, Any] | None:
        """As many examples of a batch as a process trains on, and two parts of them.

        Those with the fewest terms of the loss are in the one, those with the most in the other;
        None: not even two have any.
        """
        count = count_examples(batch)
        size = max(2, -(-count // self._processes.size))
        candidates = range(min(count, max(size, _CANDIDATES)))
        terms = {i: self._task.loss_terms(rows_of(batch, [i])) for i in candidates}
        order = sorted((i for i in candidates if all(terms[i])), key=lambda i: terms[i][0])
        if len(order) < 2:
            return None
        size = min(size, len(order))
        few, many = order[: size - size // 2], order[len(order) - size // 2 :]
        return rows_of(batch, [*few, *many]), rows_of(batch, few), rows_of(batch, many)


def rows_of(batch: Any, rows: slice | Sequence[int]) -> Any:
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
            some = cast("list[Any]", value)
            return some[rows] if isinstance(rows, slice) else [some[i] for i in rows]
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
