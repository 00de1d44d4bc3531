"""What a command does on SIGINT and SIGTERM: it says what is kept and how to go on."""

from __future__ import annotations

import shlex
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from dynarank.cli.show import print_json
from dynarank.records import find_runs
from dynarank.train.grid import COMMON
from dynarank.train.interruption import Interrupted

__all__ = ["GoOn", "same_command"]


@dataclass(frozen=True)
class GoOn:
    """What an interrupted command says.

    Args:
        folder: the folder of its runs.
        command: the words that go on with them.
        as_json: print it as JSON on stdout too.
    """

    folder: Path
    command: tuple[str, ...]
    as_json: bool

    def leave(self, stop: Interrupted) -> NoReturn:
        """Say what is kept, which command goes on and which shows the page, and exit."""
        with suppress(OSError):  # the terminal was closed
            self._tell(stop)
        sys.exit(stop.exit_code)

    def _tell(self, stop: Interrupted) -> None:
        name = signal.Signals(stop.signum).name
        begun = (self.folder / COMMON).exists()
        go_on = shlex.join(self.command if begun else ("dynarank", *sys.argv[1:]))
        report = shlex.join(("dynarank", "report", str(self.folder)))
        shown = report if _has_runs(self.folder) else None
        print(f"dynarank: interrupted ({name}): {_kept(stop, self.folder)}", file=sys.stderr)
        print(f"  go on:    {go_on}", file=sys.stderr)
        if shown:
            print(f"  the page: {shown}", file=sys.stderr)
        if self.as_json:
            at = {"run": str(stop.folder), "step": stop.step} if stop.folder else {}
            told = {"folder": str(self.folder), "status": "interrupted", "signal": name, **at}
            print_json({**told, "go_on": go_on, "show": shown})


def same_command(folder: Path, as_json: bool) -> GoOn:
    """What a command says with which the same command goes on."""
    return GoOn(folder, ("dynarank", *sys.argv[1:]), as_json)


def _kept(stop: Interrupted, folder: Path) -> str:
    if stop.folder is not None and stop.step is None:
        return f"no step of {stop.folder} could be saved, it will begin again"
    if stop.folder is not None:
        return f"step {stop.step} is done and saved in {stop.folder}"
    return f"finished runs are kept in {folder}" if _has_runs(folder) else "nothing was begun"


def _has_runs(folder: Path) -> bool:
    try:
        return bool(find_runs(folder))
    except FileNotFoundError:
        return False
