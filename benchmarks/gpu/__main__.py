"""``python -m benchmarks.gpu --out DIR``: all parts, in a process of their own.

If that process ends before all parts are done (it was killed, or the GPU failed), the part that was
running is recorded as stopped, and another process goes on with the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

from benchmarks.gpu.arguments import parser
from benchmarks.gpu.record import Record
from benchmarks.gpu.tables import tables

__all__ = ["main"]

_ROOT = Path(__file__).parents[2]
_ENDED = ("done", "out of time")
_LEAST = 5.0  # seconds that are worth another process


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for and print the tables; 1 if a part failed, was stopped or left out."""
    begun, options = time.time(), _options(arguments)
    end, left, record = begun + 60 * options.minutes, list(options.parts), Record(options.out)
    while left and end - time.time() > _LEAST:
        code = _process(options, left, end)
        record = Record(options.out)
        for name in list(record.running()):
            record.part(name, status="stopped", error=f"its process ended with {code}")
        if left[0] not in record.data["parts"]:  # nor will another process begin it
            record.about(error=f"the process that measures ended with {code}")
            break
        left = [name for name in left if name not in record.data["parts"]]
    record.about(seconds=time.time() - begun)
    print(tables(options.out))
    return int(not _whole(record, options.parts))


def _options(arguments: list[str] | None) -> Namespace:
    """The arguments; what is left of a start that failed is removed."""
    found = parser()
    options = found.parse_args(arguments)
    if options.device == "cpu" and not options.toy:
        found.error("a CPU takes hours for these sizes: give --toy too")
    if Record(options.out).data["parts"]:
        found.error(f"{options.out} has results already")
    (options.out / "results.json").unlink(missing_ok=True)
    return options


def _whole(record: Record, parts: list[str]) -> bool:
    """Whether each part ran to its end, or to that of its time."""
    found = record.data["parts"]
    ended = [name in found and found[name]["status"] in _ENDED for name in parts]
    return all(ended) and "error" not in record.data["about"]


def _process(options: Namespace, parts: list[str], end: float) -> int | str:
    """Run parts in a process; its exit code."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--out", str(options.out)]
    command += ["--device", options.device, "--parts", ",".join(parts), "--end", str(end)]
    command += ["--toy"] * options.toy
    command += ["--data", str(options.data)] if options.data else []
    paths = [str(_ROOT / "src"), str(_ROOT), os.environ.get("PYTHONPATH", "")]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        seconds = max(1.0, end - time.time())
        return subprocess.run(command, env=known, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return "a kill at the end of the time"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the process that measures ends too
    sys.exit(main())
