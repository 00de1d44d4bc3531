"""Accelerate: ``save_state`` and ``load_state`` keep the rank scheduler, and bring the forms.

Accelerate knows models, optimizers and LR schedulers. Its hooks write a folder ``dynarank`` for the
rank scheduler beside their files, and load it before them, so that weights and optimizer states
find the forms that they are of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet, ref

from torch import nn

from dynarank.checkpoint.folder import Contents, read_folder, write_folder
from dynarank.checkpoint.tree import flatten, unflatten
from dynarank.distributed.unwrap import unwrapped
from dynarank.files.reading import DamagedFileError
from dynarank.integrations.accelerate_files import (
    check_optimizer,
    check_pickled,
    check_weights,
    checksums,
    numbered,
)
from dynarank.integrations.accelerate_fsdp2 import blank_states, without_states
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.sinks.extras import import_extra

__all__ = ["Attachment", "attach"]

_FOLDER = "dynarank"
_NAME = re.compile(_FOLDER + r"(_\d+){0,2}")
_REFUSED = {
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
    "FSDP": "FSDP version 1",
}


class Attachment:
    """One rank scheduler that an accelerator keeps; :meth:`remove` ends it."""

    def __init__(self, keeper: _Keeper, ranks: RankScheduler) -> None:
        self._keeper, self._ranks = keeper, ref(ranks)

    def remove(self) -> None:
        """From now on the accelerator saves and loads without this rank scheduler."""
        if (ranks := self._ranks()) is not None:
            self._keeper.forget(ranks)


def attach(accelerator: Any, ranks: RankScheduler) -> Attachment:
    """``accelerator.save_state`` and ``load_state`` keep a rank scheduler and its forms.

    The state is written into a folder ``dynarank`` beside Accelerate's files (``dynarank_1`` for
    the accelerator's second model), as JSON and safetensors. ``load_state`` reads it first: the
    model and its optimizer are brought to the saved forms, whatever they have now, and the run goes
    on as if it had not stopped. Several models may have a rank scheduler each.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        ranks: the rank scheduler of a model that the accelerator prepares; with FSDP2, made after
            ``accelerator.prepare``.

    Returns:
        A handle; its ``remove()`` takes the rank scheduler off again.

    Raises:
        ImportError: Accelerate is not installed; the message has the command that installs it.
        TypeError: it is no accelerator, or no rank scheduler.
        ValueError: the accelerator trains by DeepSpeed, Megatron-LM or FSDP version 1. Later, by
            ``save_state`` and ``load_state``: the model is not the accelerator's, or the folder is
            damaged, of another run, or was saved without ``attach``. Nothing has changed then.

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> ranks = dr.RankScheduler(model, optimizer, dr.schedules.dynamic_rank(8), 100)
        >>> handle = attach(accelerator, ranks)
        >>> folder = accelerator.save_state(getfixture("tmp_path"))
        >>> sorted(path.name for path in folder.iterdir())
        ['dynarank', 'model.safetensors', 'optimizer.bin', 'random_states_0.pkl']
        >>> accelerator.load_state(folder)
    """
    package = import_extra("accelerate", "accelerate", "dynarank.integrations.accelerate")
    for given, kind in ((accelerator, package.Accelerator), (ranks, RankScheduler)):
        if not isinstance(given, kind):
            name = type(given).__name__
            raise TypeError(f"attach(accelerator, ranks) takes a {kind.__name__}, got a {name}")
    _check_kind(accelerator)
    if accelerator.is_fsdp2 and not any(unwrapped(m) is ranks.model for m in accelerator._models):
        raise ValueError(
            "with FSDP2 the order is accelerator.prepare(model, optimizer), RankScheduler, attach: "
            "this accelerator has not prepared the model of the rank scheduler"
        )
    keeper = _keeper_of(accelerator) or _Keeper(accelerator)
    keeper.add(ranks)
    return Attachment(keeper, ranks)


def _check_kind(accelerator: Any) -> None:
    """Raise ValueError for what trains in buffers of its own."""
    kind = str(accelerator.distributed_type.value)
    if kind in _REFUSED and not accelerator.is_fsdp2:
        raise ValueError(
            f"the accelerator trains by {_REFUSED[kind]}, which keeps parameters in flat buffers "
            "that cannot follow a change of form: use DDP or FSDP2 (fsdp_version=2)"
        )
    if accelerator.is_fsdp2 and "FULL" in str(accelerator.state.fsdp_plugin.state_dict_type):
        raise ValueError(
            "the FSDP plugin has state_dict_type='FULL_STATE_DICT', and what it saves of a model "
            "with factors cannot be loaded again: use 'SHARDED_STATE_DICT', or dr.save and dr.load"
        )


def _keeper_of(accelerator: Any) -> _Keeper | None:
    """The one that has been registered with an accelerator."""
    hooks = accelerator._save_model_state_pre_hook.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((one for one in owners if isinstance(one, _Keeper)), None)


@dataclass(frozen=True)
class _Entry:
    """A rank scheduler, the number of its model in the accelerator, and its folder's name."""

    ranks: RankScheduler
    number: int
    name: str


class _Keeper:
    """Saves and loads the rank schedulers of one accelerator, all or none."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._attached: list[ref[RankScheduler]] = []
        self._prepared: WeakSet[RankScheduler] = WeakSet()  # those whose models were prepared
        self._handles = [accelerator.register_save_state_pre_hook(self.save)]
        if accelerator.is_fsdp2:  # it loads sharded weights before the hooks
            accelerator.load_state = self._load_state
        else:
            self._handles.append(accelerator.register_load_state_pre_hook(self.load))

    def add(self, ranks: RankScheduler) -> None:
        if all(one() is not ranks for one in self._attached):
            self._attached.append(ref(ranks))
        self._models()

    def forget(self, ranks: RankScheduler) -> None:
        self._attached = [one for one in self._attached if one() not in (None, ranks)]
        if self._handles and not self._attached:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            vars(self.accelerator).pop("load_state", None)

    def save(self, models: Sequence[nn.Module], weights: Sequence[Any], folder: str) -> None:
        """Write each rank scheduler's state; called before Accelerate writes its own files."""
        _check_kind(self.accelerator)
        for one in self._entries():
            data, tensors = flatten(one.ranks.state_dict(), "the rank scheduler's state")
            own = weights[one.number] if one.number < len(weights) else {}  # other hooks take some
            parts = {"ranks": data, "weights": checksums(own)}
            parts["without_states"] = without_states(one.ranks.model, one.ranks.optimizer)
            contents = Contents({"ranks": tensors}, parts)
            write = partial(self._write, place := Path(folder) / one.name, contents)
            one.ranks.processes.attempt(f"writing {place}", write)

    def _write(self, folder: Path, contents: Contents) -> None:
        """Write it in the process that writes Accelerate's files."""
        state, config = self.accelerator.state, self.accelerator.project_configuration
        if state.is_local_main_process if config.save_on_each_node else state.is_main_process:
            write_folder(folder, contents)

    def load(self, models: Sequence[nn.Module], folder: str) -> None:
        """Bring the rank schedulers and models to the saved states, before Accelerate loads."""
        with ExitStack() as undo:
            self._bring(models, Path(folder), undo)
            undo.pop_all()

    def _load_state(self, input_dir: Any = None, *args: Any, **more: Any) -> None:
        """``Accelerator.load_state``, after the rank schedulers and the forms; all or nothing."""
        load = partial(type(self.accelerator).load_state, self.accelerator)
        naming = self.accelerator.project_configuration.automatic_checkpoint_naming
        if input_dir is None and naming:
            made = (Path(self.accelerator.project_dir) / "checkpoints").iterdir()
            input_dir = max(made, key=lambda path: int(path.name.rpartition("_")[2]))
        if input_dir is None:
            return load(input_dir, *args, **more)  # which says what is wrong
        with ExitStack() as undo:
            found = self._bring((), Path(input_dir).expanduser(), undo)
            with ExitStack() as blank:
                for entry, one in found:
                    own = entry.ranks.model, entry.ranks.optimizer
                    blank.enter_context(blank_states(*own, one["without_states"], undo))
                load(input_dir, *args, **more)
            undo.pop_all()

    def _bring(
        self, models: Sequence[nn.Module], folder: Path, undo: ExitStack
    ) -> list[tuple[_Entry, dict[str, Any]]]:
        """Load the states of the rank schedulers, and check what Accelerate is going to load."""
        if not (entries := self._entries()):
            return []
        _check_kind(self.accelerator)
        attempt = entries[0].ranks.processes.attempt
        read = partial(_read, folder, [one.name for one in entries])
        found = list(zip(entries, attempt(f"reading {folder}", read), strict=True))
        for one, parts in found:
            try:
                one.ranks.load_state_dict(parts["ranks"], undo=undo)
            except ValueError as error:
                raise ValueError(f"{folder / one.name}: {error}") from error
        known = {one.number: parts["weights"] for one, parts in found}
        attempt(f"reading {folder}", partial(self._check_files, models, folder, known))
        return found

    def _check_files(
        self, models: Sequence[nn.Module], folder: Path, known: Mapping[int, Mapping[str, int]]
    ) -> None:
        """Raise ValueError if Accelerate's own files are damaged, or of another save or model."""
        own = self.accelerator
        for number, one in enumerate(() if own.is_fsdp2 else own._optimizers):
            check_optimizer(folder / numbered("optimizer.bin", number), one)
        names = [numbered("scheduler.bin", i) for i in range(len(own._schedulers))]
        names += ["scaler.pt"] if own.scaler is not None else []
        random = f"random_states_{own.process_index}.pkl"
        names += [random] if (folder / random).exists() else []  # not if there were fewer processes
        check_pickled(folder / name for name in names)
        last = [*own._load_model_state_pre_hook.values()][-1:]
        for number, model in enumerate(models if last == [self.load] else ()):  # or others load it
            check_weights(folder, number, model, known.get(number, {}))

    def _entries(self) -> list[_Entry]:
        """The rank schedulers of the accelerator's models, in the order of the models."""
        models, entries = self._models(), list[_Entry]()
        for ranks in self._alive():
            number = next((i for i, model in enumerate(models) if model is ranks.model), None)
            if number is not None:
                others = sum(one.number == number for one in entries)
                numbers = [number, others] if others else [number] if number else []
                entries.append(_Entry(ranks, number, "_".join(map(str, [_FOLDER, *numbers]))))
            elif ranks not in self._prepared:  # else accelerator.free_memory() has let go of it
                raise ValueError(
                    "the model of an attached rank scheduler is none of those that this "
                    "accelerator has prepared, so it would not be saved: give it to "
                    "accelerator.prepare first, or remove() what attach returned"
                )
        return sorted(entries, key=lambda one: one.number)

    def _models(self) -> list[nn.Module]:
        models = [unwrapped(model) for model in self.accelerator._models]
        self._prepared.update(r for r in self._alive() if any(r.model is m for m in models))
        return models

    def _alive(self) -> list[RankScheduler]:
        return [ranks for one in self._attached if (ranks := one()) is not None]


def _read(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What was saved with each rank scheduler.

    Raises:
        ValueError: there are others than these, or a file is damaged.
    """
    found = sorted(path.name for path in folder.glob(f"{_FOLDER}*") if _NAME.fullmatch(path.name))
    if found != sorted(names):
        none = "" if found else ": it was saved without attach(accelerator, ranks)"
        raise ValueError(
            f"{folder} has the rank schedulers {found}, this accelerator {sorted(names)}{none}; "
            "attach the same ones as before save_state"
        )
    return [_parts(folder / name) for name in names]


def _parts(folder: Path) -> dict[str, Any]:
    contents = read_folder(folder)
    if contents.data.keys() != {"ranks", "weights", "without_states"}:
        why = f"it has {[*contents.data]} and not the state of a rank scheduler"
        raise DamagedFileError(folder, why, "use another checkpoint")
    ranks = unflatten(contents.data["ranks"], contents.tensors.get("ranks", {}), f"{folder}")
    return {**contents.data, "ranks": ranks}
