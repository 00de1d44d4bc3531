"""Sources of data sets: the error for missing data, text files, and the Hugging Face hub.

The hub is read through ``datasets``, which downloads data sets and caches them.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynarank.files.printable import printable
from dynarank.files.reading import read_bytes
from dynarank.sinks.extras import import_extra

__all__ = ["DataError", "hub_splits", "read_utf8"]

_MAX_BYTES = 512 << 20  # of a text file; the largest, QQP of GLUE, takes 52 MB


class DataError(ValueError):
    """Raised if a data set is missing, incomplete or damaged; the message says what to do."""


def read_utf8(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file, with its line ends as they are.

    Args:
        path: the file, or a link to it.
        encoding: ``utf-8``, or ``utf-8-sig`` if a byte order mark may precede the text.

    Raises:
        DataError: it is missing, not a regular file, not UTF-8, or larger than any such data set.
    """
    try:
        return read_bytes(path.resolve(), _MAX_BYTES).decode(encoding)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise DataError(f"{path} could not be read as UTF-8: {printable(str(error))}") from error


@contextmanager
def hub_splits(what: str, files: str, *name: str) -> Generator[Any]:
    """A context with the splits of a hub data set; errors inside it are raised as DataError.

    Args:
        what: the data set in words, for the error message.
        files: the files that a folder could contain instead, for the error message.
        name: the hub's name of the data set, and of its configuration if it has several.

    Raises:
        ImportError: if the ``data`` extra is not installed.
        DataError: if the data set cannot be loaded, or is malformed.
    """
    datasets = import_extra("datasets", "data", f"{what} from the hub")
    try:
        yield datasets.load_dataset(*name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"loading {what} from the hub as {', '.join(map(repr, name))} failed: {error!r}; try "
            f"again, or pass a folder with {files}"
        ) from error
