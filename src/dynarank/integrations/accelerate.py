"""Accelerate: ``save_state`` and ``load_state`` keep the rank scheduler, and bring the forms.

Accelerate knows models, optimizers and LR schedulers. Its hooks write a folder ``dynarank`` for the
rank scheduler beside their files, and load it before them, so that weights and optimizer states
find the forms that they are of.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import ref
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from dynarank.checkpoint.folder import Contents, read_folder, write_folder
from dynarank.checkpoint.tree import flatten, unflatten
from dynarank.distributed.unwrap import unwrapped
from dynarank.files.reading import DamagedFileError
from dynarank.files.tensors import TensorFile
from dynarank.layers.form_entry import KEY
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.sinks.extras import import_extra

__all__ = ["Attachment", "attach"]

_FOLDER = "dynarank"
_WEIGHTS = "model.safetensors", "pytorch_model.bin"
_WAY_OUT = "use another checkpoint"
_NAME = re.compile(_FOLDER + r"(_\d+)?(\.\d+)?")
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


def _keeper_of(accelerator: Any) -> _Keeper | None:
    """The one that has been registered with an accelerator."""
    hooks = accelerator._save_model_state_pre_hook.values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((one for one in owners if isinstance(one, _Keeper)), None)


class _Keeper:
    """Saves and loads the rank schedulers of one accelerator, all or none."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._attached: list[ref[RankScheduler]] = []
        self._prepared: set[int] = set()  # the rank schedulers whose models were prepared
        self._handles = [
            accelerator.register_save_state_pre_hook(self.save),
            accelerator.register_load_state_pre_hook(self.load),
        ]

    def add(self, ranks: RankScheduler) -> None:
        if all(one() is not ranks for one in self._attached):
            self._attached.append(ref(ranks))
        self._note_prepared()

    def forget(self, ranks: RankScheduler) -> None:
        self._attached = [one for one in self._attached if one() not in (None, ranks)]
        self._prepared.discard(id(ranks))
        if not self._attached:
            for handle in self._handles:
                handle.remove()

    def save(self, models: Sequence[nn.Module], weights: Any, folder: str) -> None:
        """Write each rank scheduler's state; called before Accelerate writes its own."""
        for name, ranks in self._named():
            self._write(Path(folder) / name, ranks)

    def load(self, models: Sequence[nn.Module], folder: str) -> None:
        """Bring the rank schedulers and models to the saved states, before Accelerate loads."""
        if not (named := dict(self._named())):
            return
        place = Path(folder)
        processes = next(iter(named.values())).processes
        states = processes.attempt(f"reading {place}", lambda: _read(place, [*named]))
        with ExitStack() as undo:
            for name, ranks in named.items():
                with _named_in_errors(place / name):
                    ranks.load_state_dict(states[name], undo=undo)
            fits = lambda: self._check_files(models, place)  # noqa: E731
            processes.attempt(f"reading {place}", fits)
            undo.pop_all()

    def _check_files(self, models: Sequence[nn.Module], folder: Path) -> None:
        """Raise ValueError if Accelerate's own files are damaged, or of other models."""
        for number, model in enumerate(models):
            saved, state = _shapes(folder, number), model.state_dict()
            for name, shape in saved.items():
                own = state.get(name)
                if isinstance(own, Tensor) and not name.endswith(KEY) and own.shape != shape:
                    raise ValueError(
                        f"{folder}: {name!r} has the shape {tuple(shape)} in the saved model, and "
                        f"{tuple(own.shape)} in this one: load the state of the same model"
                    )
        for number in range(len(self.accelerator._optimizers) if models else 0):
            _check_whole(folder / _numbered("optimizer.bin", number))

    def _write(self, folder: Path, ranks: RankScheduler) -> None:
        data, tensors = flatten(ranks.state_dict(), "the rank scheduler's state")
        config, state = self.accelerator.project_configuration, self.accelerator.state
        writes = state.is_local_main_process if config.save_on_each_node else state.is_main_process
        contents = Contents({"tensors": tensors} if tensors else {}, {"ranks": data})
        write = lambda: write_folder(folder, contents) if writes else None  # noqa: E731
        ranks.processes.attempt(f"writing {folder}", write)

    def _named(self) -> Iterator[tuple[str, RankScheduler]]:
        """The rank schedulers that are alive, by the number of their model."""
        models = self._note_prepared()
        seen: dict[int, int] = {}
        for ranks in (one for each in self._attached if (one := each()) is not None):
            place = next((i for i, model in enumerate(models) if model is ranks.model), None)
            if place is None and id(ranks) in self._prepared:
                continue  # accelerator.free_memory() has let go of it
            if place is None:
                raise ValueError(
                    "the model of an attached rank scheduler is not one that this accelerator has "
                    "prepared, so it would not be saved: give it to accelerator.prepare, or "
                    "remove() what attach returned"
                )
            count = seen[place] = seen.get(place, -1) + 1
            yield _FOLDER + (f"_{place}" if place else "") + (f".{count}" if count else ""), ranks

    def _note_prepared(self) -> list[nn.Module]:
        models = [unwrapped(model) for model in self.accelerator._models]
        alive = [one for each in self._attached if (one := each()) is not None]
        self._prepared |= {id(one) for one in alive if any(one.model is m for m in models)}
        return models


def _numbered(name: str, number: int) -> str:
    """The name of a file of Accelerate's for one of several objects."""
    return name.replace(".", f"_{number}.") if number else name


def _read(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The state of each rank scheduler that was saved in a folder.

    Raises:
        ValueError: there are others than these, or a file is damaged.
    """
    found = sorted(path.name for path in folder.glob(f"{_FOLDER}*") if _NAME.fullmatch(path.name))
    if found != sorted(names):
        raise ValueError(
            f"{folder} has the rank schedulers {found}, this accelerator {sorted(names)}: attach "
            "the same rank schedulers before save_state and load_state"
            + ("" if found else "; it was saved without attach(accelerator, ranks)")
        )
    return {name: _state(folder / name) for name in names}


def _state(folder: Path) -> Any:
    contents = read_folder(folder)
    if "ranks" not in contents.data:
        raise DamagedFileError(folder, "it has no ranks.json", _WAY_OUT)
    return unflatten(contents.data["ranks"], contents.tensors.get("tensors", {}), f"{folder}")


@contextmanager
def _named_in_errors(folder: Path) -> Generator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _shapes(folder: Path, number: int) -> Mapping[str, torch.Size]:
    """The shapes of a model's saved tensors; of their values nothing is read."""
    safe, path = (folder / _numbered(name, number) for name in _WEIGHTS)
    if safe.exists():
        return {name: one.shape for name, one in TensorFile(safe).outlines.items()}
    _check_whole(path)
    from accelerate.utils.other import load  # names the classes that are safe

    state = load(path, map_location="cpu", mmap=True)
    return {name: one.shape for name, one in state.items() if isinstance(one, Tensor)}


def _check_whole(path: Path) -> None:
    """Raise DamagedFileError unless a file is as torch.save wrote it; it reads any bits itself."""
    try:
        with ZipFile(path) as file:
            damaged = file.testzip() if torch.serialization.get_crc32_options() else None
    except (OSError, BadZipFile) as error:
        raise DamagedFileError(path, f"{error}", _WAY_OUT) from error
    if damaged is not None:
        raise DamagedFileError(path, f"{damaged} has changed since it was written", _WAY_OUT)
