"""The process that measures: one part after the other, each with its share of the time."""

from __future__ import annotations

import faulthandler
import importlib
import sys
import time
import traceback
from argparse import Namespace

import torch

from benchmarks.gpu.arguments import parser
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clocks import summary, watched
from benchmarks.gpu.deadline import Deadline
from benchmarks.gpu.device import Device, device_of
from benchmarks.gpu.facts import facts
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import FULL, TOY
from benchmarks.gpu.timetable import GRACE, allowance

__all__ = ["measure"]

_LAST = 0.03  # of the time, for a last step that takes longer, and to end


def measure(options: Namespace) -> None:
    """Run the parts that are asked for; what they find is in the record, whatever happens.

    Raises:
        SystemExit: after an error that leaves the device of no use to this process.
    """
    record, device = Record(options.out), device_of(options.device)
    record.about(toy=options.toy, **facts(device))
    end = Deadline((options.end - time.time()) * (1 - _LAST))
    parts: list[str] = options.parts
    for i, name in enumerate(parts):
        seconds = allowance(name, parts[i + 1 :], end.left)
        if end.left < 1:
            return
        _part(name, seconds, record, device, options)
        if not device.usable():
            sys.exit(3)


def _part(name: str, seconds: float, record: Record, device: Device, options: Namespace) -> None:
    """Run a part; if it does not end, the whole process does, with a trace of where it was."""
    begun, deadline = time.monotonic(), Deadline(seconds)
    sizes = TOY if options.toy else FULL
    bench = Bench(name, device, sizes, deadline, record, options.data)
    record.part(name, status="running", seconds_allowed=seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    status: dict[str, str] = {"status": "done"}
    clocks: list[dict[str, str]] = []
    try:
        torch.manual_seed(0)
        with watched(device) as clocks:
            importlib.import_module(f"benchmarks.gpu.parts.{name}").run(bench)
        status = {"status": "out of time"} if deadline.passed else status
    except Exception as error:
        traceback.print_exc()
        status = {"status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        faulthandler.cancel_dump_traceback_later()
    spent = time.monotonic() - begun
    record.part(name, **status, seconds=spent, clocks=summary(clocks))
    print(f"{name}: {status['status']}, {spent:.1f} s", file=sys.stderr, flush=True)
    if device.usable():
        device.free()


def _main() -> None:
    found = parser()
    found.add_argument("--end", type=float, required=True)
    torch.backends.cudnn.benchmark = True
    measure(found.parse_args())


if __name__ == "__main__":
    _main()
