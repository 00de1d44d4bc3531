"""Optional packages: imported where they are used, and an error that names the extra if missing."""

from __future__ import annotations

import importlib
import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

__all__ = ["import_extra", "install_command"]

_PACKAGE = Path(__file__).parents[1]


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of dynarank that installs it.
        user: what needs it: the subject of the message.

    Raises:
        ImportError: the package is not installed; the message has the command that installs it.

    Example:
        >>> import_extra("not_there.metrics", "text", "Correlation")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ImportError: Correlation needs `not_there`, which is not installed: pip install ...
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        raise ImportError(
            f"{user} needs `{package}`, which is not installed: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The command that installs an extra of dynarank, from where dynarank itself is from.

    A checkout is installed in place, as it is used now; what came from a folder, an archive or a
    repository comes from there again; all else from the package index.
    """
    if (root := _checkout()) is not None:
        place = "." if root == Path.cwd() else root
        return f"pip install -e {shlex.quote(f'{place}[{extra}]')}"
    return f"pip install {shlex.quote(_requirement(extra))}"


def _checkout() -> Path | None:
    """The folder of the sources that are running, if it is one that pip can install."""
    root = _PACKAGE.parents[1]
    is_one = _PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file()
    return root if is_one else None


def _requirement(extra: str) -> str:
    """What pip is to install: by name, or from where it was installed (PEP 610)."""
    try:
        origin = json.loads(distribution("dynarank").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    url, vcs = origin.get("url", ""), origin.get("vcs_info")
    if url.startswith("file:") and not vcs:
        return f"{url2pathname(urlsplit(url).path)}[{extra}]"
    if url:
        revision = f"@{vcs['commit_id']}" if vcs else ""
        return f"dynarank[{extra}] @ {vcs['vcs'] + '+' if vcs else ''}{url}{revision}"
    return f"dynarank[{extra}]"
