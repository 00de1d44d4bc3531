"""Hardware, versions and settings of a run."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dynarank
from benchmarks.gpu.device import Device

__all__ = ["facts"]

_ROOT = Path(__file__).parents[2]


def facts(device: Device) -> dict[str, Any]:
    """The conditions of a run."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "device": _tried(device.about),
        "cpu": {"model": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "dynarank": dynarank.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "source_sha256": _digest(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32_convolutions": _tried(lambda: torch.backends.cudnn.allow_tf32),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
    }


def _tried(read: Callable[[], Any]) -> Any:
    """What is read, or why it cannot be: no fact is worth the run."""
    try:
        return read()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _commit() -> str | None:
    """The commit, if there are git and a repository."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def _digest() -> str:
    """A digest of the code, which says what ran where there is no commit."""
    found = hashlib.sha256()
    for path in sorted([*(_ROOT / "src").rglob("*.py"), *Path(__file__).parent.rglob("*.py")]):
        found.update(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]
