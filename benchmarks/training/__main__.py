"""Run what is missing of the experiments, say how far they are, show or write the tables.

  python -m benchmarks.training run mlp_table           # minutes, no download
  python -m benchmarks.training run mlp_256 --data DIR --minutes 9
  python -m benchmarks.training status                  # how far each is
  python -m benchmarks.training table mlp_table         # its table, here
  python -m benchmarks.training calibration --data DIR  # FLOPs besides the steps
  python -m benchmarks.training write                   # the tables of the docs

To repeat a table from nothing, give run, status, calibration and table a new
folder by --results. Every run is recorded when it ends, and never run again.
It can be killed at any time: runs of more than a minute go on from their last
checkpoint.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.positive import positive

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "training" / "results"
DATA = os.environ.get("DYNARANK_DATA", ROOT / "build" / "data")
_NO_DATA = """\
--data names the folder of the data sets; benchmarks/training/README.md says what is in it.
Name the experiments whose data you have."""


def main() -> None:
    """Read the command line."""
    parser = _parser()
    given = parser.parse_args()
    from benchmarks.training.harness.experiment import broken, get, names

    if unknown := sorted(set(given.experiments) - set(names())):
        parser.error(f"no such experiment: {', '.join(unknown)}; there are {', '.join(names())}")
    wrong = broken(given.experiments or names())
    for name, why in wrong.items():
        print(f"{name} is left out: {why}", file=sys.stderr, flush=True)
    if wrong and given.do is _write:
        sys.exit("nothing is written")
    given.experiments = [name for name in given.experiments or names() if name not in wrong]
    arms = {arm.name for name in given.experiments for arm in get(name).arms}
    for pattern in getattr(given, "arms", ()):
        if not fnmatch.filter(arms, pattern):
            parser.error(f"no arm is like {pattern!r}; experiments are named before --arms")
    sys.exit((given.do(given) if given.experiments else 0) or int(bool(wrong)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="run what is missing, then print the status")
    status = commands.add_parser("status", help="how far each experiment is")
    table = commands.add_parser("table", help="print tables of records, and what they say")
    calibration = commands.add_parser(
        "calibration", help="count the FLOPs besides the steps, on a replay of a run of each arm"
    )
    write = commands.add_parser("write", help="write the tables and pictures of docs and README")
    _add_run(run)
    _add_records(run, start)
    _add_records(status, _status)
    _add_records(table, _table, least="+")
    table.add_argument("--pictures", type=Path, metavar="DIR", help="draw DIR/EXPERIMENT.svg too")
    _add_data(calibration)
    _add_records(calibration, _calibration)
    write.set_defaults(do=_write, experiments=[])
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    _add_data(run)
    add = run.add_argument
    words = "processes, one thread each; default: 2"
    add("--workers", type=positive(int), default=2, metavar="N", help=words)
    words = "stop after this time; unfinished runs go on next time"
    add("--minutes", type=positive(float), default=float("inf"), metavar="M", help=words)
    words = "only these arms, after the experiments: mlp_256 --arms 'decay*' 'full rank'"
    add("--arms", nargs="+", default=[], metavar="PATTERN", help=words)
    words = "where checkpoints of unfinished runs are; default: build/evidence"
    add("--scratch", type=Path, default=ROOT / "build" / "evidence", metavar="DIR", help=words)


def _add_data(command: argparse.ArgumentParser) -> None:
    words = "the folder of the data sets; default: DYNARANK_DATA, or build/data"
    command.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=words)


def _add_records(
    command: argparse.ArgumentParser, do: Callable[..., object], least: str = "*"
) -> None:
    words = "a file of benchmarks/training/experiments, without .py"
    words += "; default: all" if least == "*" else ""
    command.add_argument("experiments", nargs=least, metavar="EXPERIMENT", help=words)
    words = "where the records are; default: those of the repository"
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=words)
    command.set_defaults(do=do)


def _status(given: argparse.Namespace) -> None:
    from benchmarks.training import progress

    progress.status(given.experiments, given.results)


def _table(given: argparse.Namespace) -> None:
    from benchmarks.training import progress

    for name in given.experiments:
        progress.table(name, given.results, given.pictures)


def _calibration(given: argparse.Namespace) -> int:
    from benchmarks.training.harness.replay import measure

    return 0 if measure(given.experiments, given.data, given.results) else 1


def _write(_: argparse.Namespace) -> None:
    from benchmarks.training.harness import evidence

    evidence.write()


def start(given: argparse.Namespace) -> int:
    """Run the workers; the exit status is that of the first that failed, or 0.

    When the command is interrupted or terminated, they end with it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = "import sys; from benchmarks.training.__main__ import work; work(sys.argv[1:])"
    folders = [str(path.resolve()) for path in (given.data, given.scratch, given.results)]
    arguments = [*folders, str(60 * given.minutes), json.dumps(given.arms), *given.experiments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    workers = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(given.workers)]
    try:
        failed = max(abs(worker.wait()) for worker in workers)
    except KeyboardInterrupt:
        failed = 128 + signal.SIGINT
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    _status(given)
    return failed


def work(arguments: list[str]) -> None:
    """Be one worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its workers
    *folders, seconds, arms = arguments[:5]
    data, scratch, results = map(Path, folders)
    import torch

    from benchmarks.training.harness.worker import Worker

    torch.set_num_threads(1)
    deadline = time.monotonic() + float(seconds)
    worker = Worker(arguments[5:], data, scratch, results, deadline, json.loads(arms))
    worker.work()
    if worker.left_out:  # whole experiments, or arms that need a package
        sys.exit(_NO_DATA if any(len(what) == 1 for what in worker.left_out) else 1)


if __name__ == "__main__":
    main()
