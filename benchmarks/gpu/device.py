"""The device that is measured: its timer and its memory reader, which is all that differs."""

from __future__ import annotations

import gc
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

__all__ = ["CPU", "CUDA", "Device", "Times", "device_of"]

_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
_SPIN = 60_000_000  # cycles: 30 ms at 2 GHz


@dataclass
class Times:
    """What some calls took, in seconds.

    Args:
        device: from the end of one call to that of the next, on the device.
        host: until a call had asked the device for all that it does.
        ahead: for each group of calls, whether all were asked for before the first began.
    """

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    ahead: list[bool] = field(default_factory=list)

    def __iadd__(self, other: Times) -> Times:
        self.device += other.device
        self.host += other.host
        self.ahead += other.ahead
        return self


class Device:
    """A device, with what its timer and its memory reader have in common."""

    kind: str

    @property
    def torch(self) -> torch.device:
        """The device, as tensors are made on it."""
        return torch.device(self.kind)

    def autocast(self) -> torch.autocast:
        """Bf16 autocast."""
        return torch.autocast(self.kind, torch.bfloat16)

    def now(self) -> float:
        """The time in seconds, once all that was asked of the device is done."""
        self.wait()
        return time.perf_counter()

    def free(self) -> None:
        """Free what nothing refers to."""
        gc.collect()

    def wait(self) -> None:
        """Wait until all that was asked of the device is done."""

    def usable(self) -> bool:
        """Whether it still works: after some errors CUDA refuses all work of a process."""
        try:
            torch.ones(2, device=self.torch).sum().item()
        except RuntimeError:
            return False
        return True

    def times(self, step: Callable[[], object], repeats: int, *, ahead: bool = False) -> Times:
        """The times of ``repeats`` calls.

        Args:
            step: the call.
            repeats: how often.
            ahead: ask for all of them before the device begins, so that it never waits for Python.
        """
        raise NotImplementedError

    def reset_peak(self) -> None:
        """Begin to measure the peak memory."""
        raise NotImplementedError

    def peak(self) -> int:
        """The peak memory since, in bytes."""
        raise NotImplementedError

    def allocated(self) -> int:
        """The memory of all tensors now, in bytes."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What it is."""
        raise NotImplementedError

    def clocks(self) -> dict[str, str]:
        """Its clocks now, if they can be read."""
        return {}


class CPU(Device):
    """The CPU, to try the code: its memory is that of the process, whose peak never falls."""

    kind = "cpu"

    def times(self, step: Callable[[], object], repeats: int, *, ahead: bool = False) -> Times:
        """The time of each call on the clock; nothing can be asked of it in advance."""
        found = [_clocked(step) for _ in range(repeats)]
        return Times(found, list(found), [False] * ahead)

    def reset_peak(self) -> None:
        """Nothing: the peak cannot be reset."""

    def peak(self) -> int:
        """The peak memory of the process."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def allocated(self) -> int:
        """Not known: 0."""
        return 0

    def about(self) -> dict[str, Any]:
        """Only that it is one."""
        return {"name": "CPU"}


class CUDA(Device):
    """The current CUDA device."""

    kind = "cuda"

    def wait(self) -> None:
        """Wait for all kernels."""
        torch.cuda.synchronize()

    def free(self) -> None:
        """Free what nothing refers to, and the memory that the allocator keeps."""
        super().free()
        torch.cuda.empty_cache()

    def times(self, step: Callable[[], object], repeats: int, *, ahead: bool = False) -> Times:
        """The time between events around each call, in which the GPU may wait for Python.

        With ``ahead`` it spins first, for as long as it should take to ask for all calls.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        self.wait()
        if ahead:
            torch.cuda._sleep(_SPIN)
        events[0].record()
        host: list[float] = []
        for event in events[1:]:
            host.append(_clocked(step))
            event.record()
        in_time = [not events[0].query()] if ahead else []
        self.wait()
        pairs = pairwise(events)
        return Times([one.elapsed_time(other) / 1e3 for one, other in pairs], host, in_time)

    def reset_peak(self) -> None:
        """Begin to measure the peak of the allocator."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """The peak of the allocator: tensors, without what it keeps beside them."""
        self.wait()
        return torch.cuda.max_memory_allocated()

    def allocated(self) -> int:
        """The memory of all tensors."""
        return torch.cuda.memory_allocated()

    def about(self) -> dict[str, Any]:
        """Name, memory, versions of CUDA and cuDNN, and the driver."""
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "memory": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(),
            **self.clocks(),
        }

    def clocks(self) -> dict[str, str]:
        """Clocks, power, temperature and driver, as ``nvidia-smi`` has them; empty without it."""
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return {}
        values = ran.stdout.partition("\n")[0].split(",")
        return dict(zip(_QUERY.split(","), (value.strip() for value in values), strict=False))


def _clocked(step: Callable[[], object]) -> float:
    """The seconds of a call."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def device_of(name: str) -> Device:
    """The device of a name, ``cpu`` or ``cuda``.

    Raises:
        RuntimeError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU; --toy --device cpu tries the code without one")
    return {"cpu": CPU, "cuda": CUDA}[name]()
