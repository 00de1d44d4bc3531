"""A training state copied out of its objects, and put back: structure first, then values.

Legend of the parts: ``model`` and ``optimizer`` are tables of tensors, ``structure`` says of which
forms the weights are, ``state`` holds the rest (schedulers, random states, what the user adds).
Of several processes the first has all that is alike in them. Each has its pieces of what is
sharded; each but the first has a part ``process-…`` with its random states, and with its gradients
if they are its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from dynarank.checkpoint.folder import Contents
from dynarank.checkpoint.gradients import differing, gradients_of, set_gradients
from dynarank.checkpoint.named_state import load_named_state, named_state, place_parameters
from dynarank.checkpoint.own_parts import OwnParts, own_part
from dynarank.checkpoint.random_states import random_states as read_random_states
from dynarank.checkpoint.random_states import set_random_states
from dynarank.checkpoint.shards import shard_of
from dynarank.checkpoint.structure import restore_structure, structure_of
from dynarank.checkpoint.tree import flatten, unflatten
from dynarank.checkpoint.values import fits, keep_optimizer, load_modules, load_other
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.fsdp2 import reshard
from dynarank.distributed.processes import Processes, processes_of
from dynarank.distributed.unwrap import check_wrappers, unwrapped
from dynarank.files.json_data import dump_json
from dynarank.layers import RankedLayer
from dynarank.surgery.loading import follow_loads
from dynarank.surgery.optimizer_signature import sign_states

__all__ = ["restore", "take"]

_Pairs: TypeAlias = list[tuple[Any, Any]]  # objects, and their saved states
_Modules: TypeAlias = list[tuple[nn.Module, Any, Any]]  # with their states and structures
_LARGE = ("model", "optimizer", "ema", "gradients")  # of tensors that may be sharded
_PARTS = (*_LARGE, "state", "random", "extra")


def take(
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    extra: Any = None,
    random_states: bool = True,
    processes: Processes | None = None,
) -> Contents:
    """Copy a training state: whatever happens to the objects afterwards, the copy stays.

    Arguments and errors are those of :func:`dynarank.save`; all of ``processes``, by default those
    that train the model, must call it.
    """
    processes = processes_of(*model.modules()) if processes is None else processes
    check_wrappers(model)
    model = unwrapped(model)
    parts: dict[str, Any] = {"model": model.state_dict()}  # first: FSDP2 shards what it gathered
    gradients = gradients_of(model, processes)
    others = {"ranks": ranks, "lr_scheduler": lr_scheduler, "scaler": scaler}
    parts |= {
        "optimizer": [named_state(one, model) for one in _all(optimizer)],
        "ema": [one if isinstance(one, Mapping) else one.state_dict() for one in _all(ema)],
        "gradients": gradients,
        "state": {name: [one.state_dict() for one in _all(v)] for name, v in others.items()},
        "random": read_random_states() if random_states else None,
        "extra": extra,
    }
    structure: dict[str, Any] = {"model": structure_of(model)}
    structure["ema"] = [_structure_of(one) for one in _all(ema)]
    _agree("the structure of the model", structure["model"], processes)
    contents = Contents(data={"structure": structure | _count(processes)})
    for name, part in parts.items():
        _put(contents, name, part, processes)
    _agree("the sharded tensors to save", [*contents.shards], processes)
    ours = {
        "random": parts["random"],
        "gradients": gradients if differing(gradients, processes) else None,
        "buffers": differing(_buffers(model, parts["model"]), processes),
    }
    if processes.rank == 0:
        return contents
    own = Contents(shards=contents.shards)
    _put(own, own_part(processes.rank), ours, processes)
    return own


def _agree(what: str, value: Any, processes: Processes) -> None:
    """Raise DisagreementError if plain data differs between processes: all is compared then."""
    digest = hashlib.sha256(dump_json(value).encode()).hexdigest()
    if len({*processes.gather(f"a hash of {what}", digest)}) > 1:
        processes.agree(what, value)


def _buffers(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers that are saved: each process counts its own batches."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = {n: t for n, t in state.items() if isinstance(t, Tensor) and n not in parameters}
    return {name: tensor for name, tensor in tensors.items() if not is_dtensor(tensor)}


def _count(processes: Processes) -> dict[str, int]:
    return {"processes": processes.size} if processes.size > 1 else {}


def _put(contents: Contents, name: str, part: Any, processes: Processes) -> None:
    """Copy a part of the state into the contents, without what the first process copies for all."""
    contents.data[name], found = flatten(part, name)
    for key, value in found.items():
        if is_dtensor(value) and processes.size > 1 and value.numel():
            contents.shards[f"{name}/{key}"] = shard_of(value)
        elif processes.rank == 0 or name not in _PARTS:
            whole = cast(Any, value).full_tensor() if is_dtensor(value) else value
            contents.tensors.setdefault(name, {})[key] = whole.to("cpu", copy=True)


def restore(
    contents: Contents,
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    random_states: bool = True,
    processes: Processes | None = None,
) -> Any:
    """Put a copied state back into a model and its companions; returns what was given as extra.

    Arguments and errors are those of :func:`dynarank.load`; all of ``processes``, by default those
    that train the model, must call it.
    """
    processes = processes_of(*model.modules()) if processes is None else processes
    check_wrappers(model)
    model = unwrapped(model)
    reshard(model.modules())
    given = {"optimizer": optimizer, "ranks": ranks, "lr_scheduler": lr_scheduler}
    given |= {"ema": ema, "scaler": scaler}
    with ExitStack() as undo:
        undo.callback(set_random_states, read_random_states())
        loaded = processes.attempt(
            "loading the state", lambda: _restore(contents, model, given, processes, undo)
        )
        fit = processes.gather("whether the values fit", loaded.fit())
        states = loaded.own.random() if random_states else None
        processes.attempt("loading the values", lambda: loaded.write(states, all(fit), undo))
        undo.pop_all()
    _follow([model, *(one for one in _all(ema) if isinstance(one, nn.Module))], optimizer)
    if random_states and optimizer is not None:
        loaded.own.warn_of_others()
    return loaded.extra


@dataclass(frozen=True)
class _Loaded:
    """What is left to load when all else is: values that are written in place."""

    modules: _Pairs  # the model first
    averages: _Pairs  # those that are no modules
    own: OwnParts
    extra: Any

    def fit(self) -> bool:
        """Whether no value can be refused."""
        return all(fits(one, state) for one, state in (*self.modules, *self.averages))

    def write(self, random: dict[str, Any] | None, fit: bool, undo: ExitStack) -> None:
        for one, state in self.averages:
            load_other("ema", one, state, undo, keep=not fit)
        load_modules(self.modules, undo, keep=not fit)
        model = self.modules[0][0]
        set_gradients(model, self.own.gradients(model))
        if random is not None:
            set_random_states(random)


def _restore(
    contents: Contents,
    model: nn.Module,
    given: Mapping[str, Any],
    processes: Processes,
    undo: ExitStack,
) -> _Loaded:
    """Load everything but values that are written in place; ``undo`` can take it back."""
    outlines = {name: contents.outline(name) for name in _LARGE}
    parts = {
        name: unflatten(contents.data[name], outlines.get(name) or contents.read(name), name)
        for name in _PARTS
    }
    pairs, modules = _paired(model, given, parts, contents)
    for one, state in pairs["ranks"]:
        one.load_state_dict(state, undo=undo)
    for one, _, known in modules:
        if known is not None:
            restore_structure(one, known, _all(given["optimizer"]) if one is model else (), undo)
    for one, state in pairs["optimizer"]:
        place_parameters(one, model, state, undo)
    likes = _likes(model, parts, pairs, modules, outlines)
    for name in _LARGE:
        parts[name] = unflatten(contents.data[name], contents.read(name, likes), name)
    own = OwnParts(contents, parts, processes)
    parts["model"] = {**parts["model"], **own.buffers()}
    pairs, modules = _paired(model, given, parts, contents)
    for one, state in pairs["optimizer"]:
        keep_optimizer(one, undo)
        load_named_state(one, state)
    for name in ("lr_scheduler", "scaler"):
        for one, state in pairs[name]:
            load_other(name, one, state, undo)
    return _Loaded([(one, state) for one, state, _ in modules], pairs["ema"], own, parts["extra"])


def _paired(
    model: nn.Module, given: Mapping[str, Any], parts: Mapping[str, Any], contents: Contents
) -> tuple[dict[str, _Pairs], _Modules]:
    """The objects with their states, and the modules with their structures too."""
    saved = {**parts["state"], "optimizer": parts["optimizer"], "ema": parts["ema"]}
    pairs = {name: _pairs(name, one, saved[name]) for name, one in given.items()}
    structure = contents.data["structure"]
    averages = zip(pairs["ema"], structure["ema"], strict=False)
    modules: _Modules = [(model, parts["model"], structure["model"])]
    modules += [(*pair, known) for pair, known in averages if isinstance(pair[0], nn.Module)]
    pairs["ema"] = [pair for pair in pairs["ema"] if not isinstance(pair[0], nn.Module)]
    return pairs, modules


def _likes(
    model: nn.Module,
    parts: Mapping[str, Any],
    pairs: Mapping[str, _Pairs],
    modules: _Modules,
    outlines: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """By the name of a stored tensor: the sharded one as which a piece of it is to be read."""
    if not any(is_dtensor(p) for one, *_ in modules for p in one.parameters()):
        return {}
    names = {id(t): f"{part}/{name}" for part, row in outlines.items() for name, t in row.items()}
    found: list[tuple[Any, Any]] = [(state, one.state_dict()) for one, state, _ in modules]
    own = dict(model.named_parameters())
    found.append((parts["gradients"], own))
    for one, state in pairs["ema"]:
        found.append((state, one if isinstance(one, Mapping) else one.state_dict()))
    for _, state in pairs["optimizer"]:
        for name, entries in state["state"].items():
            if isinstance(entries, Mapping) and name in own:
                found.append((entries, dict.fromkeys(cast(Any, entries), own[name])))
    return {names[id(t)]: like for one, other in found for t, like in _sharded(one, other)}


def _sharded(saved: Any, own: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors in two states alike of which the second one's is sharded."""
    if isinstance(saved, Tensor):
        if isinstance(own, Tensor) and is_dtensor(own) and saved.shape == own.shape:
            yield saved, own
    elif isinstance(saved, Mapping) and isinstance(own, Mapping):
        table, other = cast(Mapping[Any, Any], saved), cast(Mapping[Any, Any], own)
        for key in table.keys() & other.keys():
            yield from _sharded(table[key], other[key])
    elif isinstance(saved, list | tuple) and isinstance(own, list | tuple):
        for one, other in zip(cast(Sequence[Any], saved), cast(Sequence[Any], own), strict=False):
            yield from _sharded(one, other)


def _follow(models: Sequence[nn.Module], optimizer: Any) -> None:
    """From now on ranked models take states of other forms, and optimizers sign theirs."""
    for one in models:
        if any(isinstance(module, RankedLayer) for module in one.modules()):
            follow_loads(one)
            sign_states(one, _all(optimizer) if one is models[0] else ())


def _all(value: Any) -> list[Any]:
    """The objects of one kind: several may be given, as a list or tuple."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _pairs(name: str, given: Any, saved: Sequence[Any]) -> _Pairs:
    """Each given object with its saved state."""
    objects = _all(given)
    if objects and len(objects) != len(saved):
        raise ValueError(
            f"{name}=: {len(objects)} given, the checkpoint holds the state of {len(saved)}; give "
            f"what was given to save{'' if saved else ', or leave ' + name + ' out'}"
        )
    return list(zip(objects, saved, strict=False))


def _structure_of(average: Any) -> dict[str, Any] | None:
    return structure_of(average) if isinstance(average, nn.Module) else None
