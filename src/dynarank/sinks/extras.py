"""Optional packages: imported where they are used, and an error that names the extra if missing."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["import_extra"]


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of dynarank that installs it.
        user: what needs it: the subject of the message.

    Raises:
        ImportError: the package is not installed; the message names the extra.

    Example:
        >>> import_extra("not_there.metrics", "text", "Pearson correlation")
        Traceback (most recent call last):
        ImportError: Pearson correlation needs `not_there`, which is not installed: pip install 'dynarank[text]'
    """  # noqa: E501
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise ImportError(
            f"{user} needs `{package}`, which is not installed: pip install 'dynarank[{extra}]'"
        ) from error
