"""The versions that pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any


@cache
def project() -> dict[str, Any]:
    """Return the project's table."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["project"]


def python() -> str:
    """Return the oldest version of Python."""
    return project()["requires-python"].removeprefix(">=")


def versions(package: str) -> list[str]:
    """Return the oldest version of a package of the extras, and those that are left out."""
    extras = project()["optional-dependencies"].values()
    (found,) = {one for extra in extras for one in extra if re.match(rf"{package}\b[^-]", one)}
    return re.findall(r"[\d.]+", found)
