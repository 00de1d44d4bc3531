"""What several processes find out about files: the finding of one holds for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from dynarank.checkpoint.manifest import NewerFormatError
from dynarank.distributed.processes import Processes
from dynarank.files.reading import DamagedFileError

__all__ = ["ALONE", "in_all"]

_T = TypeVar("_T")
ALONE = Processes()


def in_all(processes: Processes, what: str, function: Callable[[], _T]) -> _T:
    """Call a function in every process; a file that one cannot read, none can.

    Raises:
        Exception: of damaged, missing and newer files, that of the first process which met one, in
            all; of everything else as :meth:`Processes.attempt`.
    """

    def call() -> tuple[_T | None, Exception | None]:
        try:
            return function(), None
        except (DamagedFileError, NewerFormatError, FileNotFoundError) as error:
            return None, error

    made, error = processes.attempt(what, call)
    for found in processes.gather(what, error):
        if found is not None:
            raise error or found
    return cast(_T, made)
