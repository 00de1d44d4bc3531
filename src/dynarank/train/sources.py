"""Where data sets come from: the error where one is not there, and the hub.

The hub is read through ``datasets``, which downloads a set or has it in its cache.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from dynarank.sinks.extras import import_extra

__all__ = ["DataError", "hub_splits"]


class DataError(ValueError):
    """A data set is absent, incomplete or damaged; the message says what to do."""


@contextmanager
def hub_splits(what: str, files: str, *name: str) -> Generator[Any]:
    """The splits of a data set of the hub; what goes wrong inside the block too is one error.

    Args:
        what: the data set in words: the message begins with it.
        files: what a folder could hold instead.
        name: the hub's name of it, and of its part if it has parts.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be had, or is not as it should be.
    """
    datasets = import_extra("datasets", "data", f"{what} from the hub")
    try:
        yield datasets.load_dataset(*name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"{what} was asked for from the hub as {', '.join(map(repr, name))}, which failed: "
            f"{error!r}; try again, or name a folder that holds {files}"
        ) from error
