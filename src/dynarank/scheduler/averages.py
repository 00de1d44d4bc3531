"""The averaged copies of a model (EMA, SWA) that follow a rank scheduler's changes of form."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast
from weakref import ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.wrappers import ddp_wrappers
from dynarank.forms import Change
from dynarank.layers import RankedLayer
from dynarank.surgery.average_edits import average_edits
from dynarank.surgery.copies import apart, copies_in
from dynarank.surgery.edit import Edit
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.sites import Site, survey

__all__ = ["Averages", "running_statistics"]

Statistics = Mapping[str, tuple[_BatchNorm, int]]  # by path, with the version of the running mean


class Averages:
    """Objects that hold averaged copies of one model, which is given without its wrappers.

    They are not kept alive: an average that nobody else has is not followed any more.
    """

    def __init__(self) -> None:
        self._followed: list[tuple[_Weak, list[_Weak]]] = []  # holders, and their copies then

    def add(self, model: nn.Module, ema: Any) -> None:
        """Have an average follow from now on, and bring it to the model's forms."""
        copies = _copies(model, ema)
        for one in copies:
            _check_apart(model, one)
        with ExitStack() as undo:
            with _renamed([ema], model, undo):
                _align(model, copies, undo)
            undo.pop_all()
        for one in copies:
            follow_loads(one)
        if not any(one is ema for one in self.holders):
            self._followed.append((_Weak(ema), list(map(_Weak, copies))))

    @property
    def holders(self) -> list[Any]:
        """Those that are alive; of one that is not, its copies."""
        found: list[Any] = []
        for holder, copies in self._followed:
            every = [holder()] if holder() is not None else [weak() for weak in copies]
            found += [one for one in every if one is not None]
        return found

    def copies(self, model: nn.Module) -> list[nn.Module]:
        """The averaged copies, each once, which their holders may have replaced meanwhile."""
        found = [one for ema in self.holders for one in copies_in(model, ema)]
        return list({id(one): one for one in found}.values())

    def align(self, model: nn.Module, undo: ExitStack) -> None:
        """Bring them to the forms that the model has."""
        with self.renamed(model, undo):
            _align(model, self.copies(model), undo)

    def renamed(self, model: nn.Module, undo: ExitStack) -> AbstractContextManager[None]:
        """A context of a change, after which lists of parameters' names have the new ones."""
        return _renamed(self.holders, model, undo)

    def take_statistics(self, model: nn.Module, before: Statistics) -> None:
        """Give them the running statistics of every BatchNorm of the model recalibrated since."""
        new = [(p, norm) for p, (norm, n) in before.items() if _version(norm) != n]
        for one in self.copies(model) if new else ():
            for path, norm in new:
                buffers = dict(norm.named_buffers(recurse=False))
                for name, buffer in one.get_submodule(path).named_buffers(recurse=False):
                    buffer.copy_(buffers[name])


class _Weak:
    """A weak reference that is pickled and copied with what it refers to; strong if need be."""

    def __init__(self, value: Any) -> None:
        try:
            self._get = ref(value)
        except TypeError:  # it has slots
            self._get = lambda: value

    def __call__(self) -> Any:
        return self._get()

    def __getstate__(self) -> dict[str, Any]:
        return {"value": self()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["value"])


def _check_apart(model: nn.Module, average: nn.Module) -> None:
    """Raise ValueError if an average cannot follow: sharded, or no copy of the values."""
    if any(map(is_dtensor, (*average.parameters(), *model.parameters()))):
        raise ValueError(
            "fully_shard shards the model or its average, which cannot follow changes of form "
            "then: make a new average after each change"
        )
    if dist.is_available() and dist.is_initialized() and ddp_wrappers(average.modules()):
        raise ValueError(
            "the average is a copy of a DistributedDataParallel wrapper, which would go on with "
            "old parameters: make it of the model inside, AveragedModel(model.module)"
        )
    own = {p.data_ptr() for p in model.parameters() if p.numel() and not p.is_meta}
    if any(p.numel() and not p.is_meta and p.data_ptr() in own for p in average.parameters()):
        raise ValueError(
            "the average shares memory with the model's parameters, so it averages nothing: make "
            "it of copy.deepcopy(model)"
        )


@contextmanager
def _renamed(holders: Sequence[Any], model: nn.Module, undo: ExitStack) -> Generator[None]:
    """Have lists of names that holders keep of their averages' parameters follow a change.

    Some average by name, and would leave out what has another name from now on.
    """
    before = [[_names(one) for one in copies_in(model, ema)] for ema in holders]
    yield
    for ema, every in zip(holders, before, strict=True):
        for old, one in zip(every, copies_in(model, ema), strict=True):
            new = _names(one)
            own: dict[str, Any] = getattr(ema, "__dict__", {})
            for name, value in list(own.items()) if old != new else ():
                if isinstance(value, set | list | tuple) and _is_all(value, old):
                    undo.callback(own.__setitem__, name, value)
                    own[name] = type(cast("list[Any]", value))(new)


def _is_all(kept: Iterable[Any], names: Sequence[str]) -> bool:
    found = list(kept)
    return len(found) == len(names) and all(name in names for name in found)


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _align(model: nn.Module, copies: Sequence[nn.Module], undo: ExitStack) -> None:
    """Bring copies to the forms that the model has."""
    sites = [site for site in survey(model) if site.form is not None] if copies else []
    for one in copies:
        pairs = ((site, one.get_submodule(site.module_paths[0])) for site in sites)
        found = [site for site, other in pairs if apart(site.module, other, site.spec.name)]
        for edit in average_edits(map(_as_it_is, found), [one]):
            edit.commit(undo)


def running_statistics(model: nn.Module) -> Statistics:
    """The BatchNorms that track statistics, as they are now."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {path: (m, _version(m)) for path, m in found.items() if m.running_mean is not None}


def _version(norm: _BatchNorm) -> int:
    mean: Tensor | None = norm.running_mean
    return -1 if mean is None or mean.is_inference() else mean._version


def _as_it_is(site: Site) -> Edit:
    assert site.form is not None
    layer, change = site.module, Change(site.path, site.form, site.form, 0.0)
    made_by = layer.made_by.get(site.spec.name, "") if isinstance(layer, RankedLayer) else ""
    return Edit(site, change, {}, {}, made_by=made_by)


def _copies(model: nn.Module, ema: Any) -> list[nn.Module]:
    if found := copies_in(model, ema):
        return found
    kind = type(ema).__name__
    if ema is model or (isinstance(ema, nn.Module) and model in set(ema.modules())):
        raise ValueError(f"this {kind} is the model itself or holds it, and no copy of it")
    raise TypeError(
        f"ranks.follow takes a copy of the model, or an object that holds one (AveragedModel), got "
        f"{kind}, in which none is found; tensors in lists or dictionaries cannot change form: "
        "average a copy.deepcopy of the model, with its parameters, frozen ones included"
    )
