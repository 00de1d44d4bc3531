"""The processes that train one model together, what they agree on, and how an error reaches all.

Each decision that a process takes by itself may differ from the others' (an SVD with one thread and
with two is not equal in bits), so it is taken once and told, or compared. Small objects travel in a
gloo group of their own, beside the gradients' group: a process that does something else there is
found, and not mistaken for one that averages gradients.
"""

from __future__ import annotations

import operator
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynarank.distributed.fsdp2 import sharing_ranks
from dynarank.distributed.wrappers import data_parallel_groups

__all__ = [
    "DisagreementError",
    "PeerError",
    "Processes",
    "independent",
    "is_independent",
    "processes_among",
    "processes_of",
]

_T = TypeVar("_T")
_TOLD = "told_to_all_processes"
_INDEPENDENT: ContextVar[bool] = ContextVar("independent", default=False)
# By default group, and by the ranks of the members: groups, for as long as torch keeps them. gloo's
# threads end with the last reference to a group; a process that ends before may be aborted (_wait).
_MADE: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[tuple[Any, ...], Any]] = (
    weakref.WeakKeyDictionary()
)
_LAST: deque[Any] = deque(maxlen=2)  # collective calls: this thread's, and one of another


class PeerError(RuntimeError):
    """Raised in all other processes when one of them fails, or does not come."""


class DisagreementError(ValueError):
    """Raised in all processes when they differ in what must be alike."""


@dataclass(frozen=True)
class _Failure:
    """What a process tells in place of a value, whatever the others are about to tell."""

    what: str
    error: str


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together; one process alone agrees with itself.

    Args:
        group: the process group that tensors travel in; None: there is one process.
        control: a gloo group of the same members, for small objects.
    """

    group: Any = None
    control: Any = None

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process among them."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def backend(self, device: torch.device) -> str | None:
        """What carries the tensors of a device: ``"gloo"``, ``"nccl"``; None: there is one process.

        Example:
            >>> Processes().backend(torch.device("cpu"))
        """
        return None if self.group is None else self.group._get_backend(device).name()

    @property
    def members(self) -> frozenset[int]:
        """Their global ranks."""
        return frozenset(map(self.global_rank, range(self.size)))

    def global_rank(self, number: int) -> int:
        """The global rank of one of them."""
        if self.group is not None:
            return dist.get_global_rank(self.group, number)
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0

    def gather(self, what: str, value: _T) -> list[_T]:
        """The value of every process, by number; all must call it for the same ``what``.

        Raises:
            PeerError: a process has ended, has failed, or does not come within the group's
                time-out.
            DisagreementError: a process is about something else.

        Example:
            >>> Processes().gather("the step", 3)
            [3]
        """
        if self.group is None:
            return [value]
        try:
            found = self._gathered((what, value))
        except RuntimeError as error:
            raise _absent(what, self.size, error) from error
        if failed := [(n, one) for n, (_, one) in enumerate(found) if type(one) is _Failure]:
            others = f" (and {len(failed) - 1} others)" if len(failed) > 1 else ""
            number, one = failed[0]
            raise _told(PeerError(f"{one.what} failed in process {number}{others}: {one.error}"))
        _check_alike("what processes do next", [one for one, _ in found])
        return [one for _, one in found]

    def agree(self, what: str, value: Any) -> None:
        """Check that plain data is the same in all processes.

        Raises:
            DisagreementError: it is not; the message names the first difference, in all processes.

        Example:
            >>> Processes().agree("the schedule", {"rank": 4})
        """
        _check_alike(what, self.gather(what, value))

    def from_first(self, what: str, value: _T) -> _T:
        """The first process's value."""
        return self.gather(what, value)[0]

    def attempt(
        self, what: str, function: Callable[[], _T], alike: Callable[[_T], Any] | None = None
    ) -> _T:
        """Call a function in every process; if it fails in one, it has failed in all.

        Args:
            what: what the function does.
            function: it may exchange things itself.
            alike: plain data of what it returned, which must be the same in all processes.

        Raises:
            Exception: what the function raised here.
            PeerError: it raised in another process only.
            DisagreementError: the data differ.

        Example:
            >>> Processes().attempt("adding", lambda: 1 + 1)
            2
        """
        if self.group is None:
            return function()
        made, told, error = None, None, None
        try:
            made = function()
            told = None if alike is None else alike(made)
        except Exception as raised:
            if _is_told(raised):  # the others do not wait to hear of it
                raise
            error = raised
            told = _Failure(what, f"{type(error).__name__}: {error}")
        try:
            _check_alike(what, self.gather(what, told))
        except (PeerError, DisagreementError):
            if error is None:
                raise
        if error is not None:
            raise _told(error)
        return cast(_T, made)

    def beside(self) -> Processes:
        """The same processes for a thread beside this one, whose calls come in an order of theirs.

        All must call it.
        """
        if self.group is None:
            return self
        ranks = dist.get_process_group_ranks(self.group)
        wait = _timeout(dist.group.WORLD)
        group = dist.new_group(ranks, wait, "gloo", use_local_synchronization=True)
        return Processes(self.group, group)

    def by_first(self, what: str, function: Callable[[], _T]) -> _T:
        """What a function returns in the first process, which alone calls it.

        Raises:
            Exception: what the function raised, in the first process; in the others PeerError.

        Example:
            >>> Processes().by_first("adding", lambda: 1 + 1)
            2
        """
        with independent():
            made = self.attempt(what, function if self.rank == 0 else lambda: cast(_T, None))
        return self.from_first(what, made)

    def send(self, tensors: Iterable[Tensor], owner: int) -> None:
        """Give these tensors, in place, the values that they have in the owner's process."""
        for tensor in tensors if self.group is not None else ():
            sent = self._sent(tensor.detach())
            if sent.numel():  # as bytes: no backend has every dtype
                flat = sent.view(-1).view(torch.uint8)
                how: dict[str, Any] = {"group": self.group, "group_src": owner, "async_op": True}
                _wait(dist.broadcast(flat, **how))
            if owner != self.rank:
                tensor.detach().copy_(sent)

    def sum(self, tensor: Tensor) -> None:
        """Give a tensor, in place, the sum of its values in all processes."""
        if self.group is not None:
            sent = self._sent(tensor)
            _wait(dist.all_reduce(sent, group=self.group, async_op=True))
            tensor.copy_(sent)

    def _gathered(self, value: Any) -> list[Any]:
        """The objects of all, as ``dist.all_gather_object`` finds them."""
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        length = torch.tensor([own.numel()], device="cpu")
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        _wait(dist.all_gather(lengths, length, self.control, async_op=True))
        padded = own.new_zeros(int(max(lengths)))
        padded[: own.numel()] = own
        rows = [torch.empty_like(padded) for _ in lengths]
        _wait(dist.all_gather(rows, padded, self.control, async_op=True))
        pairs = zip(rows, lengths, strict=True)
        return [pickle.loads(row[: int(size)].numpy().tobytes()) for row, size in pairs]

    def _sent(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy, that the group's backend can send."""
        nccl = tensor.device.type == "cpu" and dist.get_backend(self.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device
        return tensor.to(device).contiguous()


def processes_of(*modules: nn.Module, training: bool = True) -> Processes:
    """The processes that train the model of which these are modules.

    They are those of the wrappers around the modules (DDP, FSDP2), wherever these are; else, if a
    model is trained and a process group is initialized, those of the default group: a loop that
    averages gradients by hand.

    Args:
        modules: of the model, whose wrappers are looked for.
        training: whether the model is trained, and not a copy that one process has for itself.
    """
    members = members_of(*modules, training=training)
    if len(members) == 1:
        return Processes()
    ranks = {g: frozenset(dist.get_process_group_ranks(g)) for g in data_parallel_groups(modules)}
    group = next((group for group, r in ranks.items() if r == members), None)
    return Processes(group or _group(members, None), _group(members, "gloo"))


def members_of(*modules: nn.Module, training: bool = True) -> frozenset[int]:
    """The global ranks of :func:`processes_of`, found without any communication."""
    if not (dist.is_available() and dist.is_initialized()):
        return frozenset([0])
    if _INDEPENDENT.get():
        return frozenset([dist.get_rank()])
    groups, sharing = data_parallel_groups(modules), sharing_ranks(modules)
    ranks = [*(frozenset(dist.get_process_group_ranks(group)) for group in groups), *sharing]
    if ranks:
        return reduce(operator.or_, ranks)
    return frozenset(range(dist.get_world_size()) if training else [dist.get_rank()])


def processes_among(ranks: frozenset[int]) -> Processes:
    """The processes of these global ranks."""
    if len(ranks) == 1:
        return Processes()
    return Processes(_group(ranks, None), _group(ranks, "gloo"))


@contextmanager
def independent() -> Generator[None]:
    """Within it, this process changes its models by itself, whatever process group there is.

    For processes that share a process group and train different models.

    Example:
        >>> with independent():
        ...     model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
    """
    token = _INDEPENDENT.set(True)
    try:
        yield
    finally:
        _INDEPENDENT.reset(token)


def is_independent() -> bool:
    """Whether this is within :func:`independent`."""
    return _INDEPENDENT.get()


def _group(members: Iterable[int], backend: str | None) -> Any:
    """A process group of these members, made once."""
    world, ranks = dist.group.WORLD, tuple(sorted(members))
    if backend is None and len(ranks) == dist.get_world_size():
        return world
    made = _MADE.setdefault(world, weakref.WeakValueDictionary())
    if (group := made.get((*ranks, backend))) is None:
        how: dict[str, Any] = {"backend": backend, "use_local_synchronization": True}
        try:
            group = dist.new_group(list(ranks), timeout=_timeout(world), **how)
        except RuntimeError as error:
            raise _absent("a process group", len(ranks), error) from error
        made[(*ranks, backend)] = group
    return group


def _wait(work: Any) -> None:
    """Wait for a collective call, and keep it until those that follow.

    gloo's threads drop it a little after it is done. As its last owner they would free its tensors
    by themselves, for which they need the interpreter's lock: a process that has begun to end by
    then is aborted (torch 2.13).
    """
    work.wait()
    _LAST.append(work)


def _timeout(group: Any) -> timedelta | None:
    """How long the group's own operations wait; None if it does not say."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if (found := getattr(options, "_timeout", None)) is not None:
            return found
    return None


def _absent(what: str, size: int, error: RuntimeError) -> Exception:
    """The error of a process that waits in vain."""
    return _told(
        PeerError(
            f"{what}: not all of {size} processes came ({error}). One has ended, or is about "
            "something else: every process must make the same calls in the same order; "
            "what one does by itself belongs into dynarank.distributed.independent()"
        )
    )


def _told(error: Exception) -> Exception:
    """Mark an error that is raised in all processes."""
    setattr(error, _TOLD, True)
    return error


def _is_told(error: BaseException | None) -> bool:
    """Whether all processes know of the error, or of one that caused it."""
    return error is not None and (getattr(error, _TOLD, False) or _is_told(error.__cause__))


def _check_alike(what: str, values: Sequence[Any]) -> None:
    """Raise DisagreementError, naming the first difference, unless all values are equal."""
    for rank, value in enumerate(values):
        if value != values[0]:
            place, first, other = _difference(values[0], value)
            text = (
                f"the processes differ in {what}{place}: {first!r} in process 0, {other!r} in "
                f"process {rank}. Nothing has changed; give every process the same model, "
                "schedule and options; processes that train "
                "different models do so within dynarank.distributed.independent()"
            )
            raise _told(DisagreementError(text))


def _difference(one: Any, other: Any, place: str = "") -> tuple[str, Any, Any]:
    """The first place at which nested data differs, and both values there."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        a, b = cast(Mapping[Any, Any], one), cast(Mapping[Any, Any], other)
        for key in dict.fromkeys([*a, *b]):
            if key not in a or key not in b or a[key] != b[key]:
                return _difference(a.get(key), b.get(key), f"{place}[{key!r}]")
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        rows, others = cast(Sequence[Any], one), cast(Sequence[Any], other)
        for i in range(max(len(rows), len(others))):
            pair = [values[i] if i < len(values) else None for values in (rows, others)]
            if pair[0] != pair[1]:
                return _difference(pair[0], pair[1], f"{place}[{i}]")
    return place, one, other
