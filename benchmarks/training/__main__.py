"""Run what is missing of the experiments, say how far they are, or write the tables.

python -m benchmarks.training run --data DIR             # all experiments, two processes
python -m benchmarks.training run mlp_256 --data DIR --minutes 9
python -m benchmarks.training status
python -m benchmarks.training write                      # docs/evidence.md and its pictures

Every run is recorded when it ends, and what is recorded is not run again. It can be killed at any
time: runs of more than a minute go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing")
    run.add_argument("experiments", nargs="*", help="their names; default: all, small ones first")
    run.add_argument("--data", type=Path, default=os.environ.get("DYNARANK_DATA"),
                     help="the folder of the data sets; default: DYNARANK_DATA")  # fmt: skip
    run.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    run.add_argument("--minutes", type=float, default=float("inf"),
                     help="stop after this time; unfinished runs go on next time")  # fmt: skip
    run.add_argument("--arms", nargs="+", default=[], metavar="PATTERN",
                     help="only these arms, such as 'decay*' 'full rank'")  # fmt: skip
    run.add_argument("--scratch", type=Path, default=ROOT / "build" / "evidence",
                     help="where unfinished runs are kept")  # fmt: skip
    run.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "training" / "results",
                     help="where the records are; default: those of the repository")  # fmt: skip
    commands.add_parser("status", help="how many runs each experiment has, and how many it needs")
    commands.add_parser("write", help="write docs/evidence.md and its pictures from the records")
    given = parser.parse_args()
    if given.command == "run":
        if given.data is None:
            parser.error("run needs the data sets: --data DIR or DYNARANK_DATA")
        sys.exit(start(given))
    from benchmarks.training.harness import evidence

    evidence.status() if given.command == "status" else evidence.write()


def start(given: argparse.Namespace) -> int:
    """Run the workers; the exit status is that of the first that failed, or 0."""
    from benchmarks.training.harness.experiment import get, names

    for name in (chosen := given.experiments or list(names())):
        get(name)  # a wrong name is an error before any run
    code = "import sys; from benchmarks.training.__main__ import work; work(sys.argv[1:])"
    folders = [str(path.resolve()) for path in (given.data, given.scratch, given.results)]
    arguments = [*folders, str(60 * given.minutes), json.dumps(given.arms), *chosen]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    workers = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(given.workers)]
    try:
        return max(abs(worker.wait()) for worker in workers)
    finally:
        for worker in workers:
            worker.kill()


def work(arguments: list[str]) -> None:
    """Be one worker."""
    *folders, seconds, arms = arguments[:5]
    data, scratch, results = map(Path, folders)
    import torch

    from benchmarks.training.harness.worker import Worker

    torch.set_num_threads(1)
    deadline = time.monotonic() + float(seconds)
    worker = Worker(arguments[5:], data, scratch, results, deadline, json.loads(arms))
    worker.work()
    sys.exit(1 if worker.left_out else 0)


if __name__ == "__main__":
    main()
