"""The hardware, the versions and the commit that a run used."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from dynarank.cost.timing import cpu_model
from dynarank.files.version import __version__

__all__ = ["commit", "hardware", "started", "versions"]


def hardware(device: torch.device) -> str:
    """The name of the device, for a CPU with its instruction set and the number of threads.

    Two CPUs of one name need not have the same instructions, and without AVX-512 bf16 is slow.

    Example:
        >>> hardware(torch.device("cpu"))  # doctest: +SKIP
        'AMD EPYC, AVX512, 1 thread'
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_model()}, {instructions}, {threads} thread{'s' if threads != 1 else ''}"


def versions() -> dict[str, str]:
    """The versions of this package, of torch, numpy and Python."""
    found = {name: version(name) for name in ("torch", "numpy")}  # dynarank may not be installed
    return {"dynarank": __version__, **found, "python": platform.python_version()}


def started() -> str:
    """The time now, for the header of a run."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def commit() -> str | None:
    """The commit of the git checkout that contains this file; None outside of one."""
    here = Path(__file__)
    tracked = _git("ls-files", "--error-unmatch", here.name, cwd=here.parent)
    return (
        _git("describe", "--always", "--dirty", "--abbrev=12", cwd=here.parent) if tracked else None
    )


def _git(*arguments: str, cwd: Path) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
