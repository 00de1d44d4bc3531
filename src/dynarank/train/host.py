"""What a run was computed by: the machine and the code."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

__all__ = ["commit", "hardware"]


def hardware(device: torch.device) -> str:
    """The name of the processor that computes, and of a CPU its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the checkout this file is tracked in, if it is in one."""
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
