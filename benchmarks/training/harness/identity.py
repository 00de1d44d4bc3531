"""What a run depends on: a checkpoint of another setting or of other code is not one of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import dynarank

_TRAINING = Path(__file__).parents[1]
_HARNESS = ("extras", "narrow", "pace", "peers", "spectra", "trial", "witness")


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


def commit() -> str | None:
    """The commit of the code; "changed" if a tracked file differs, but for records and docs."""
    root = _TRAINING.parents[1]
    if (head := _git("rev-parse", "--short=12", "HEAD", cwd=root)) is None:
        return None
    paths = (".", ":!benchmarks/*/results/*", ":!docs/*", ":!*.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *paths, cwd=root)
    return f"{head}, changed" if changed else head


def _git(*arguments: str, cwd: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def digest(content: bytes) -> str:
    """A short name of this content."""
    return hashlib.sha256(content).hexdigest()[:12]
