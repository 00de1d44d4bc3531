"""Joining the processes that torchrun has started, also after it has restarted them.

torchrun keeps one store through all restarts (``TORCHELASTIC_USE_AGENT_STORE``), in which a new
process finds the addresses of dead ones and waits for them. Seen with torch 2.13: groups that the
first attempt made hang, or fail, in a later one; here each attempt has keys of its own.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["init_process_group"]


def init_process_group(
    backend: str | None = None, *, timeout: timedelta | None = None, **options: Any
) -> None:
    """``torch.distributed.init_process_group`` in a process that torchrun may restart.

    Args:
        backend: as torch's; None: gloo for CPUs and NCCL for GPUs.
        timeout: as torch's.
        options: torch's other ones.

    Raises:
        ValueError: the variables that torchrun sets are missing.

    Example:
        >>> init_process_group("gloo")  # doctest: +SKIP
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.TCPStore(*place, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
        options |= {
            "store": dist.PrefixStore(attempt, store),  # pyright: ignore[reportPrivateImportUsage]
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
        }
    dist.init_process_group(backend, timeout=timeout, **options)
