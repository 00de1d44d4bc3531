"""What a run depends on: a checkpoint of another setting or of other code is not one of it."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import dynarank

_TRAINING = Path(__file__).parents[1]
_HARNESS = ("extras", "narrow", "peers", "spectra", "trial", "witness")


def fingerprint(*parts: Any) -> str:
    """A short name of these plain data and of the code that runs depend on."""
    return digest(json.dumps([code(), *parts], sort_keys=True).encode())


@cache
def code() -> str:
    """A digest of the library, of the problems and of what of the harness trains."""
    files = [
        *sorted(Path(dynarank.__file__).parent.rglob("*.py")),
        *sorted((_TRAINING / "problems").glob("*.py")),
        *(_TRAINING / "harness" / f"{name}.py" for name in _HARNESS),
    ]
    return digest(b"".join(path.read_bytes() for path in files))


def digest(content: bytes) -> str:
    """A short name of this content."""
    return hashlib.sha256(content).hexdigest()[:12]
