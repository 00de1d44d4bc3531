"""Save a whole training state into one folder, and load it: any form, any order, no pickle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any, Literal

from torch import nn

from dynarank.checkpoint.folder import read_folder
from dynarank.checkpoint.snapshot import restore, take
from dynarank.checkpoint.together import write_together
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.processes import processes_of
from dynarank.files.printable import printable

__all__ = ["load", "save"]

_PATIENCE = 30.0  # seconds until it is said that other processes have not come


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    extra: Any = None,
    random_states: bool = True,
) -> Path:
    """Save a training state into a folder, whole or not at all; one that is there is replaced.

    Tensors are stored as safetensors, everything else as JSON; nothing is pickled. A manifest with
    sizes and SHA-256 is written last, and the folder is renamed into place when all is on disk.

    Of several processes that train the model, all call it, with one folder on a file system that
    they share. The first writes what is alike in all, each its own random states and its pieces of
    what FSDP2 shards; if one fails, all raise. Any number of processes can load it.

    Args:
        folder: where; its parent is created.
        model: any model, ranked or not, also inside ``torch.compile``, DDP or FSDP2, with the
            gradients of an unfinished accumulation.
        optimizer: its optimizer, or several in a list.
        ranks: the :class:`RankScheduler`, or several.
        lr_scheduler: the LR scheduler, or several.
        ema: an averaged copy of the model: a module, a dictionary of tensors, or an object with
            ``state_dict`` and ``load_state_dict``.
        scaler: the ``GradScaler``.
        extra: what else the run needs: nested data with tensors, such as the epoch, or the
            ``get_state()`` of a generator. Of several processes, the first one's.
        random_states: whether to save the states of Python's, NumPy's and torch's generators.

    Returns:
        The folder.

    Raises:
        TypeError: something in a state is neither plain data nor a tensor; the message names it.
        OSError: it cannot be written; what was in the folder before is still there.
        DisagreementError: processes differ in the folder, or in the model's structure.
        PeerError: it failed in another process; the message says how.

    Example:
        >>> import tempfile
        >>> model = dr.factorize(nn.Sequential(nn.Linear(8, 8)), rank=2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> place = tempfile.mkdtemp() + "/last"
        >>> folder = dr.save(place, model=model, optimizer=optimizer, extra={"epoch": 3})
        >>> fresh = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.AdamW(fresh.parameters())
        >>> dr.load(folder, model=fresh, optimizer=optimizer)
        {'epoch': 3}
        >>> fresh[0].form
        LowRank(rank=2, decomposition='svd')
    """
    folder, processes = Path(folder), processes_of(*model.modules())
    with said_if_alone("dr.save"):
        processes.agree("the checkpoint to save", os.path.realpath(folder))
    contents = processes.attempt(
        "copying the training state",
        lambda: take(
            model=model,
            optimizer=optimizer,
            ranks=ranks,
            lr_scheduler=lr_scheduler,
            ema=ema,
            scaler=scaler,
            extra=extra,
            random_states=random_states,
            processes=processes,
        ),
    )
    write_together(folder, contents, processes)
    return folder


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Any = None,
    ranks: Any = None,
    lr_scheduler: Any = None,
    ema: Any = None,
    scaler: Any = None,
    random_states: bool = True,
    verify: Literal["full", "size"] = "full",
) -> Any:
    """Load a training state that :func:`save` wrote: the structure first, then the values.

    The model is brought to the saved forms, whatever it has now, and new parameters take the old
    ones' places in the optimizer. Parameters and states are matched by name, so the optimizer may
    have been made before or after, of the plain or of the ranked model.

    Of several processes that train the model, all call it: each reads what it needs, however many
    processes wrote it, and if one fails, nothing has changed in any. Each gets the random states
    of the process of its number; a warning says so if there were more or fewer.

    Args:
        folder: a folder written by :func:`save`, or one checkpoint of a run (``step-…``).
        model: a model built as the saved one was, plain or ranked; on any device, also inside
            ``torch.compile``, DDP or FSDP2.
        optimizer: the optimizer or optimizers; None: their states are not loaded. So for each of
            the others.
        ranks: see :func:`save`.
        lr_scheduler: see :func:`save`.
        ema: see :func:`save`.
        scaler: see :func:`save`.
        random_states: whether to restore the states of the random generators, if they were saved.
        verify: ``"full"`` checks every file's SHA-256, ``"size"`` its size only.

    Returns:
        What was saved as ``extra``.

    Raises:
        DamagedFileError: a file is missing, cut, or not what was written; nothing has changed.
        ValueError: it is the state of another model, optimizer, average or LR scheduler; nothing
            has changed. So whatever else one of the objects raises.
    """
    trained = optimizer is not None or any(map(is_dtensor, model.parameters()))
    processes = processes_of(*model.modules(), training=trained)
    with said_if_alone("dr.load"):
        processes.agree("the checkpoint to load", os.path.realpath(folder))
    contents = read_folder(Path(folder), verify=verify, processes=processes)
    try:
        return restore(
            contents,
            model=model,
            optimizer=optimizer,
            ranks=ranks,
            lr_scheduler=lr_scheduler,
            ema=ema,
            scaler=scaler,
            random_states=random_states,
            processes=processes,
        )
    except (LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the state in {printable(str(folder), 500)} does not fit what it is loaded into "
            f"({printable(why)}): use a folder that dr.save wrote, with what was given to it"
        ) from error


@contextmanager
def said_if_alone(name: str) -> Generator[None]:
    """Say, after a while, that other processes have not made the same call yet."""
    text = (
        f"{name} waits for the other processes that train this model: every process calls it; what "
        "one does by itself belongs into dynarank.distributed.independent()"
    )
    timer = Timer(_PATIENCE, warnings.warn, [text, RuntimeWarning])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
