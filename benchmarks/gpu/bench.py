"""What a part is given: device, sizes, deadline and rows; and how candidates are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.device import Device, Times
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import Sizes

__all__ = ["Bench", "spread"]

_WARM_UP = 2


@dataclass
class Bench:
    """What a part is given.

    Args:
        part: its name.
        device: the device.
        sizes: the sizes of everything.
        deadline: when the part has to end.
        record: where rows are written.
        data: a folder with texts; None: none is given.
    """

    part: str
    device: Device
    sizes: Sizes
    deadline: Deadline
    record: Record
    data: Path | None = None
    _failed: bool = field(default=False, init=False)

    def put(self, key: str, **values: Any) -> None:
        """Record values of a row, at once."""
        self.record.row(self.part, key, values)

    @contextmanager
    def attempt(self, key: str) -> Generator[None]:
        """Record what goes wrong in a row, in the row; the next one can go on.

        Raises:
            Exception: after an error that leaves the device of no use to this process.
        """
        if self._failed:  # only now is the error gone, which held tensors
            self.device.free()
            self._failed = False
        try:
            yield
        except torch.OutOfMemoryError:
            self._failed = True
            self.put(key, error="out of memory")
        except Exception as error:
            self._failed = True
            self.put(key, error=f"{type(error).__name__}: {error}"[:2000])
            if not self.device.usable():
                raise

    def alternate(
        self,
        steps: Mapping[str, Callable[[], object]],
        told: Callable[[str, Times], None],
        *,
        repeats: int | None = None,
        warm: bool = True,
        ahead: bool = False,
    ) -> None:
        """Time candidates that take turns, in another order each round, until the deadline.

        A candidate that fails is out, with its error in its row. One that has not been warmed up
        does two steps first.

        Args:
            steps: a step of each candidate, by its row's key.
            told: called with a key and all times so far.
            repeats: timed steps of a turn.
            warm: whether to warm up.
            ahead: whether the device shall not wait for Python.
        """
        left, found = dict(steps), {key: Times() for key in steps}
        for i in range(self.sizes.rounds):
            order = list(left)
            turn = i % max(1, len(order))
            for key in order[turn:] + order[:turn]:
                if self.deadline.passed:
                    return
                done = False
                with self.attempt(key):
                    if warm and not i:
                        self.device.times(left[key], _WARM_UP)
                    repeated = repeats or self.sizes.repeats
                    found[key] += self.device.times(left[key], repeated, ahead=ahead)
                    told(key, found[key])
                    done = True
                if not done:
                    del left[key]


def spread(times: Times) -> dict[str, Any]:
    """Median, least and largest of some times, in milliseconds, and how many there are.

    ``host_ms`` is the least until Python had asked for a step: where it is as large as ``ms``, the
    device waits for Python. It is too large where a step alone fills a GPU's queue, of about a
    thousand operations. ``ahead`` is whether all steps were asked for before the device began.
    """
    row: dict[str, Any] = {
        "ms": statistics.median(times.device) * 1e3,
        "ms_min": min(times.device) * 1e3,
        "ms_max": max(times.device) * 1e3,
        "n": len(times.device),
        "host_ms": min(times.host) * 1e3,
    }
    return row | {"ahead": all(times.ahead)} if times.ahead else row
