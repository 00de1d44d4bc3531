"""What a user's data function may return, and the batches of it.

Two parts, training and test, each one of: a pair of tensors, a dict of tensors, a map-style
dataset, an iterable dataset, or a ``DataLoader``. The order of an epoch is a pure function of seed
and epoch, and so are the random transforms of an example, so that a run goes on at any step bit for
bit. Of a ``DataLoader`` with a standard sampler, the dataset, the collation and the batch size are
taken; one with a sampler of its own, and a stream, is iterated with seeded generators: to go on
there, its batches up to that step are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from dynarank.files.printable import printable
from dynarank.train.draws import epoch_generator
from dynarank.train.own_draws import GlobalState, kept_generators, seed_generators
from dynarank.train.recipe_error import RecipeError

__all__ = [
    "MapPart",
    "Part",
    "StreamPart",
    "TensorPart",
    "digest_of",
    "from_array",
    "make_parts",
    "plain",
]

_ORDER, _ITEM, _COLLATE, _STREAM, _LIMIT = 0, 1, 2, 3, 4  # independent random streams
_TESTS = ("test", "validation", "valid", "val", "dev")
_SIZE = 64
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch can do little with them
_DIGESTED = 256  # examples of a dataset that is read item by item
_WHAT = "(train, test): each a pair of tensors (x, y), a dict of tensors, a Dataset or a DataLoader"


class Part(Protocol):
    """The training or the test examples."""

    batch_size: int
    steps: int
    """The number of whole batches of an epoch; 0: it is not known."""

    @property
    def size(self) -> int | None:
        """The number of examples; None: it is not known."""
        ...

    def epoch(self, seed: int, epoch: int, start: int, *, once: bool = False) -> Iterator[Any]:
        """The batches of an epoch in random order, from the one at ``start`` on."""
        ...

    def ordered(self) -> Iterator[Any]:
        """All examples in their order, in batches, the last of which may be smaller."""
        ...

    def limit(self, count: int) -> Part:
        """A fixed choice of some examples."""
        ...

    def digest(self) -> Iterator[Tensor]:
        """What identifies the data."""
        ...


class _Indexed:
    """A part whose examples are reached by their indices.

    Args:
        size: the number of examples.
        batch_size: the number of examples of a batch.
        shuffle: whether an epoch has an order of its own.
    """

    def __init__(self, size: int, batch_size: int, shuffle: bool = True) -> None:
        self.size, self.batch_size, self.shuffle = size, batch_size, shuffle
        self.steps = size // batch_size

    def _order(self, seed: int, epoch: int, once: bool) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = epoch_generator(seed, _ORDER, 0 if once else epoch)
        return torch.randperm(self.size, generator=generator)

    def _chosen(self, count: int) -> Tensor:
        if not 1 <= count <= self.size:
            raise ValueError(
                f"{count} examples requested, but there are {self.size}; request 1 to {self.size}"
            )
        order = torch.randperm(self.size, generator=epoch_generator(0, _LIMIT, 0))
        return order[:count].sort().values


class TensorPart(_Indexed):
    """Examples in memory: tensors whose first dimension is that of the examples.

    Args:
        fields: a tuple or dict of tensors.
        batch_size: the number of examples of a batch.
    """

    def __init__(self, fields: Any, batch_size: int) -> None:
        super().__init__(len(tree_leaves(fields)[0]), batch_size)
        self.fields = fields

    def epoch(self, seed: int, epoch: int, start: int, *, once: bool = False) -> Iterator[Any]:
        """The batches of an epoch in random order, from the one at ``start`` on."""
        order, size = self._order(seed, epoch, once), self.batch_size
        for step in range(start, self.steps):
            yield self._rows(order[step * size : (step + 1) * size])

    def ordered(self) -> Iterator[Any]:
        """All examples in their order, in batches."""
        for indices in torch.arange(self.size).split(self.batch_size):
            yield self._rows(indices)

    def limit(self, count: int) -> TensorPart:
        """A fixed choice of some examples."""
        return TensorPart(self._rows(self._chosen(count)), self.batch_size)

    def digest(self) -> Iterator[Tensor]:
        """What identifies the data."""
        yield from tree_leaves(self.fields)

    def to(self, device: torch.device) -> TensorPart:
        """The same examples on a device."""
        moved = tree_map_only(Tensor, lambda x: x.to(device), self.fields)
        return TensorPart(moved, self.batch_size)

    def _rows(self, indices: Tensor) -> Any:
        return tree_map_only(Tensor, lambda x: x[indices.to(x.device)], self.fields)


class MapPart(_Indexed):
    """A dataset with ``__len__`` and ``__getitem__``.

    Args:
        dataset: the dataset.
        batch_size: the number of examples of a batch.
        collate: makes a batch of examples.
        workers: the number of processes that read.
        shuffle: whether an epoch has an order of its own.
        indices: the examples taken; None: all.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        *,
        workers: int = 0,
        shuffle: bool = True,
        indices: Tensor | None = None,
    ) -> None:
        super().__init__(len(dataset) if indices is None else len(indices), batch_size, shuffle)
        self.dataset, self.collate, self.workers = dataset, collate, workers
        self.indices = torch.arange(self.size) if indices is None else indices

    def epoch(self, seed: int, epoch: int, start: int, *, once: bool = False) -> Iterator[Any]:
        """The batches of an epoch in random order, from the one at ``start`` on."""
        order = self.indices[self._order(seed, epoch, once)]
        rows = order[: self.steps * self.batch_size].view(-1, self.batch_size)
        return self._read(_Batches(self.dataset, rows.tolist(), self.collate, (seed, epoch)), start)

    def ordered(self) -> Iterator[Any]:
        """All examples in their order, in batches."""
        rows = [part.tolist() for part in self.indices.split(self.batch_size)]
        return self._read(_Batches(self.dataset, rows, self.collate, (0, 0)), 0)

    def limit(self, count: int) -> MapPart:
        """A fixed choice of some examples."""
        return MapPart(
            self.dataset,
            self.batch_size,
            self.collate,
            workers=self.workers,
            shuffle=self.shuffle,
            indices=self.indices[self._chosen(count)],
        )

    def digest(self) -> Iterator[Tensor]:
        """What identifies the data."""
        yield torch.tensor(self.size)
        if callable(fingerprint := getattr(self.dataset, "fingerprint", None)):
            yield cast(Tensor, fingerprint())
        spread = torch.linspace(0, self.size - 1, min(self.size, _DIGESTED)).long()
        for index in self.indices[spread].tolist():
            yield from _fixed(list(digest_of(self._example(index))), self._example(index))

    def _example(self, index: int) -> Any:
        rows = [[index]]
        return next(self._read(_Batches(self.dataset, rows, list, (0, 0)), 0, workers=0))

    def _read(self, batches: _Batches, start: int, workers: int | None = None) -> Iterator[Any]:
        count = self.workers if workers is None else workers
        steps = range(start, len(batches.rows))
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=cast(Any, steps),
            collate_fn=_same,
            num_workers=count if len(steps) > 1 else 0,
            generator=torch.Generator(),  # otherwise one number is drawn from the global one
        )
        return iter(loader)


def from_array(array: Any) -> Tensor:
    """An array of numbers as a tensor, also of a byte order or a type that torch has not."""
    kind = array.dtype.newbyteorder("=")
    kind = np.dtype(np.float64) if kind.kind == "f" and kind.itemsize > 8 else kind
    return torch.from_numpy(np.ascontiguousarray(array, kind))


def plain(batch: Any) -> Any:
    """A batch as tensors can be found in it: mappings (a tokenizer's output) become dicts."""
    if isinstance(batch, Mapping):
        named = cast("Mapping[Any, Any]", batch)
        return {name: plain(value) for name, value in named.items()}
    return batch


def _same(batch: Any) -> Any:
    return batch


class _Batches(Dataset[Any]):
    """The batches of an epoch as a dataset: its draws are seeded, and then given back.

    Args:
        dataset: the dataset of examples.
        rows: the indices of the examples of each batch.
        collate: makes a batch of examples.
        numbers: what the draws depend on besides the example: seed and epoch.
    """

    def __init__(
        self,
        dataset: Any,
        rows: Sequence[Sequence[int]],
        collate: Callable[[list[Any]], Any],
        numbers: tuple[int, int],
    ) -> None:
        self.dataset, self.rows, self.collate, self.numbers = dataset, rows, collate, numbers

    def __getitem__(self, step: int) -> Any:
        items: list[Any] = []
        with kept_generators():
            for index in self.rows[step]:
                seed_generators(_ITEM, *self.numbers, index)
                items.append(self.dataset[index])
            seed_generators(_COLLATE, *self.numbers, step)
            return self.collate(items)


class StreamPart:
    """A ``DataLoader`` that is iterated as it is, with the generators seeded for each epoch.

    Args:
        loader: the loader.
        batch_size: the number of examples of its batches, if known.
        steps: the number of batches of an epoch; 0: all.
    """

    def __init__(self, loader: DataLoader[Any], batch_size: int, steps: int) -> None:
        self.loader, self.batch_size, self.steps = loader, batch_size, steps
        self.size = None

    def epoch(self, seed: int, epoch: int, start: int, *, once: bool = False) -> Iterator[Any]:
        """The batches of an epoch in random order, from the one at ``start`` on."""
        read = 0
        for batch in self._seeded(seed, 0 if once else epoch):
            if read >= self.steps:
                return
            if read >= start:
                yield batch
            read += 1
        if read < self.steps:
            raise RecipeError(
                f"the training data ended after {read} batches of an epoch of {self.steps}; lower "
                "steps_per_epoch"
            )

    def ordered(self) -> Iterator[Any]:
        """All examples in their order, in batches."""
        return self._seeded(0, 0)

    def limit(self, count: int) -> StreamPart:
        """A fixed choice of some examples."""
        raise RecipeError(
            f"{count} examples were asked for of data that is read by a DataLoader with a sampler "
            "of its own, or as a stream; limit it in the data function, or set steps_per_epoch"
        )

    def check_end(self, most: int) -> None:
        """Raise an error if the batches do not end; those of a known number are not read.

        Raises:
            RecipeError: there are more than ``most``.
        """
        try:
            if len(self.loader) and not isinstance(self.loader.dataset, IterableDataset):
                return
        except TypeError:  # no __len__
            pass
        if next(islice(self._seeded(0, 0), most, None), None) is not None:
            raise RecipeError(
                f"the test part has not ended after {most:,} batches, but all of it is read after "
                "each epoch; end it, or take the first of it in the data function (islice)"
            )

    def digest(self) -> Iterator[Tensor]:
        """What identifies the data."""
        first, again = next(self._seeded(0, 0), ()), next(self._seeded(0, 0), ())
        yield from _fixed(list(digest_of(first)), again)

    def _seeded(self, seed: int, epoch: int) -> Iterator[Any]:
        """The batches; the global generators are those of the data while one is read, only."""
        inside, batches = None, iter(())
        while True:
            outside = GlobalState()
            try:
                if inside is None:
                    seed_generators(_STREAM, seed, epoch)
                    self._set_epoch(seed, epoch)
                    batches = iter(self.loader)
                else:
                    inside.restore()
                batch = next(batches)
                inside = GlobalState()
            except StopIteration:
                return
            finally:
                outside.restore()
            yield batch

    def _set_epoch(self, seed: int, epoch: int) -> None:
        """Seed what holds a generator of its own."""
        loader: Any = self.loader
        holders = (loader, loader.sampler, loader.batch_sampler, loader.dataset)
        for number, holder in enumerate(holders):
            generator = getattr(holder, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(epoch_generator(seed, _STREAM + number, epoch).initial_seed())
            if callable(set_epoch := getattr(holder, "set_epoch", None)):
                set_epoch(epoch)


def _fixed(values: list[Tensor], again: Any) -> Iterator[Tensor]:
    """The values that are the same when they are read again; of others, their shapes.

    A generator of the data's own (``numpy.random.default_rng()``) is not seeded by us: what it
    draws identifies no data, and a run could never go on.
    """
    other = list(digest_of(again))
    for index, value in enumerate(values):
        same = index < len(other) and value.dtype == other[index].dtype
        same = same and torch.equal(_bytes(value), _bytes(other[index]))
        yield value if same else torch.tensor(value.shape)


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().reshape(-1).view(torch.uint8)  # NaN is as itself


def digest_of(batch: Any) -> Iterator[Tensor]:
    """All values of a batch as tensors."""
    for leaf in tree_leaves(plain(batch)):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = from_array(leaf)
        if isinstance(leaf, Tensor):
            yield leaf.reshape(-1) if not leaf.is_sparse else leaf.to_dense().reshape(-1)
        elif hasattr(leaf, "tobytes"):  # a picture of Pillow
            yield torch.frombuffer(bytearray(cast("Any", leaf).tobytes()), dtype=torch.uint8)
        else:
            yield torch.frombuffer(bytearray(repr(leaf).encode() or b" "), dtype=torch.uint8)


def make_parts(
    made: Any, who: str, batch_size: int, *, workers: int = 0, steps: int | None = None
) -> tuple[Part, Part]:
    """The training and the test part of what a data function returned.

    Args:
        made: what it returned.
        who: its name, for messages.
        batch_size: the number of examples of a batch; 0: that of the loader, or 64.
        workers: the number of processes that read datasets.
        steps: the number of batches of an epoch of a stream.

    Raises:
        RecipeError: it is something else, or a part is empty.
    """
    train, test = _pair(made, who)
    first = _part(train, f"{who}: the training part", batch_size, workers)
    own = isinstance(test, DataLoader)  # any batch size will do
    second = _part(test, f"{who}: the test part", 0 if own else first.batch_size, workers)
    if isinstance(first, StreamPart):
        first = _with_steps(first, who, steps)
    elif steps is not None:
        raise RecipeError(f"{who}: steps_per_epoch is for streams, an epoch is all of this data")
    return first, second


def _pair(made: Any, who: str) -> tuple[Any, Any]:
    if isinstance(made, Mapping):
        named = cast("Mapping[str, Any]", made)
        test = next((named[name] for name in _TESTS if name in named), None)
        if named.get("train") is None or test is None:
            listed = ", ".join(map(str, named)) or "nothing"
            raise RecipeError(
                f"{who} must return a dict with train and test (or validation), it has {listed}"
            )
        return named["train"], test
    if isinstance(made, tuple | list) and len(cast("list[Any]", made)) == 2:
        return cast("tuple[Any, Any]", tuple(cast("list[Any]", made)))
    raise RecipeError(f"{who} must return {_WHAT}; it returned {_shown(made)}")


def _part(value: Any, who: str, batch_size: int, workers: int) -> Part:
    if isinstance(value, DataLoader):
        part = _of_loader(cast("DataLoader[Any]", value), who, batch_size)
    elif isinstance(value, IterableDataset):
        size = batch_size or _SIZE
        part = StreamPart(DataLoader(value, size, num_workers=workers), size, 0)
    elif (fields := _fields(value, who)) is not None:
        part = TensorPart(fields, batch_size or _SIZE)
    elif hasattr(value, "__len__") and hasattr(value, "__getitem__") and not _is_array(value):
        part = MapPart(value, batch_size or _SIZE, workers=workers)
    else:
        raise RecipeError(f"{who} must be one of {_WHAT}; it is {_shown(value)}")
    if part.size == 0:
        raise RecipeError(f"{who} is empty")
    return part


def _of_loader(loader: DataLoader[Any], who: str, batch_size: int) -> Part:
    """The part of a loader: its dataset if its sampler is a standard one, else itself."""
    own = loader.batch_size
    if own is not None and batch_size not in (0, own):
        raise RecipeError(
            f"{who} is a DataLoader with batches of {own}, but batch_size is {batch_size}; leave "
            "batch_size out, or let the data function take it as an argument"
        )
    sampler, standard = loader.sampler, loader.batch_sampler
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(cast(Any, loader.dataset))
    )
    if own is None or not whole or type(standard) is not BatchSampler:
        return StreamPart(loader, own or batch_size or _SIZE, 0)
    return MapPart(
        loader.dataset,
        own,
        cast(Any, loader.collate_fn),
        workers=loader.num_workers,
        shuffle=type(sampler) is RandomSampler,
    )


def _with_steps(part: StreamPart, who: str, steps: int | None) -> StreamPart:
    """A stream with the number of its steps."""
    try:
        there = len(part.loader)
    except TypeError:  # no __len__
        if steps is None:
            raise RecipeError(
                f"{who}: the training part is a stream without a length; set steps_per_epoch"
            ) from None
        there = steps
    if steps is not None and steps > there:
        raise RecipeError(f"{who}: steps_per_epoch is {steps}, but there are {there} batches")
    return StreamPart(part.loader, part.batch_size, steps or there)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _fields(value: Any, who: str) -> Any:
    """The tensors of a part in memory; None if it is none."""
    if type(value) is TensorDataset:
        value = tuple(value.tensors)
    if type(value) is dict:
        named = cast("dict[str, Any]", value)
        held: list[Any] = list(named.values())
    elif isinstance(value, tuple | list):
        held = list(cast("list[Any]", value))
    else:
        return None
    if not held or not all(map(_is_array, held)):
        if type(value) is dict or (isinstance(value, tuple) and any(map(_is_array, held))):
            raise RecipeError(f"{who} must have tensors only, it is {_shown(value)}")
        return None
    tensors = [_tensor(one, who) for one in held]
    if len({len(one) for one in tensors}) > 1:
        shapes = ", ".join(str(tuple(one.shape)) for one in tensors)
        raise RecipeError(f"{who}: its tensors must have as many examples each, they are {shapes}")
    return dict(zip(value, tensors, strict=True)) if type(value) is dict else tuple(tensors)


def _tensor(value: Any, who: str) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise RecipeError(f"{who} has an array of {value.dtype}; numbers are required")
        value = from_array(value)
        value = value.float() if value.dtype == torch.float64 else value
    value = value.long() if value.dtype in _UNSIGNED else value
    if value.ndim == 0:
        raise RecipeError(f"{who} has a tensor without dimensions; the first is of the examples")
    return cast(Tensor, value.detach())


def _shown(value: Any) -> str:
    """What a value is, in few words."""
    if _is_array(value):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        held = cast("list[Any]", value)
        return f"a {type(value).__name__} of {len(held)} ({', '.join(map(_shown, held[:4]))})"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, list(cast('dict[Any, Any]', value))[:8]))}"
    return f"a {type(value).__name__} ({printable(repr(value))[:80]})"
