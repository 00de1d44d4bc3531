"""The command line: thin commands over the library.

Exit codes: 0 done (or finished before), 1 a run failed (diverged, disk full), 2 invalid request,
130 interrupted by Ctrl-C (SIGINT), 143 by SIGTERM: everything is saved, the same command goes on.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from dynarank.cli.encoding import any_encoding
from dynarank.cli.lazy_group import make_app
from dynarank.cli.signals import raising_on_signals
from dynarank.files.printable import printable
from dynarank.files.version import __version__
from dynarank.files.volume import FULL_DISK
from dynarank.train.interruption import Interrupted

__all__ = ["COMMANDS", "app", "main"]

_OF_ANOTHER = "another process has ended: what it said is the reason; the same command goes on"
_LONGEST = 2_000  # characters of an error message

COMMANDS = {
    "init": "Write a commented recipe that runs as it is: `dynarank train NAME.toml`.",
    "train": "Train RECIPE under one or several schedules.",
    "plan": "Show what RECIPE costs, per layer and per phase: form, rank, parameters, FLOPs, "
    "memory.",
    "probe": "Say in a few short runs whether a rank schedule can gain on RECIPE, and which rank "
    "it needs.",
    "compare": "Train RECIPE under several schedules and seeds, and test which differences are "
    "significant.",
    "sweep": "Train RECIPE over a grid of inflation and deflation epochs, and draw a heat-map.",
    "spectrum": "Rank metrics of every weight in FILE and which to cut: a table and a figure.",
    "report": "Write one self-contained HTML page about RUN, or about several runs side by side.",
    "export": "Write the trained network of RUN to a file that runs without dynarank.",
    "recipes": "List the recipes.",
    "schedules": "List the rank schedules.",
}
"""The commands, each a function in a module of its name, with the first line of its help."""

app = make_app(
    COMMANDS,
    name="dynarank",
    help="Dynamic-rank training: low-rank where that is enough, full-rank while it matters.",
    epilog="Exit codes: 0 done, 1 a run failed, 2 invalid request, 130 interrupted (143: by "
    "SIGTERM).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dynarank {__version__}")
        raise typer.Exit


@app.callback()
def _(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    command = context.invoked_subcommand
    if _launched() and command not in (None, "train"):
        raise ValueError(
            f"{command} works in one process, and {os.environ['WORLD_SIZE']} were started; run "
            f"`dynarank {command}` without torchrun (only train is made for several)"
        )


def main() -> None:
    """Run the command line; user errors become one line on stderr and an exit code."""
    if not _launched():
        _run()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings, once a process
    from dynarank.cli.processes import run_together  # torch, which --help does without

    sys.exit(run_together(_exit_code))


def _launched() -> bool:
    """Whether this is one of several processes that were started together."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and os.environ["WORLD_SIZE"] != "1"


def _exit_code() -> int:
    try:
        _run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _run() -> None:
    with any_encoding():
        try:
            with raising_on_signals():
                app(prog_name="dynarank")
        except Interrupted as stop:
            print("dynarank: interrupted", file=sys.stderr)
            sys.exit(stop.exit_code)
        except OSError as error:
            of_disk = error.errno in FULL_DISK
            told = _of_the_disk(error) if of_disk else _of_a_file(error)
            sys.exit(_complain(told, 1 if of_disk else 2))
        except (ValueError, ImportError) as error:
            sys.exit(_complain(_OF_ANOTHER, 1) if _by_another(error) else _complain(error, 2))
        except RuntimeError as error:
            from dynarank.distributed.processes import PeerError
            from dynarank.train.loop import DivergedError  # a run that fails has imported torch

            if _by_another(error):
                sys.exit(_complain(_OF_ANOTHER, 1))
            if not isinstance(error, DivergedError | PeerError):
                raise
            sys.exit(_complain(error, 1))


def _by_another(error: Exception) -> bool:
    """Whether another process has said what went wrong."""
    if not _launched():
        return False
    from dynarank.cli.processes import said_by_another

    return said_by_another(error)


def _of_the_disk(error: OSError) -> str:
    told = "what was saved before is kept: when there is space, the same command goes on"
    return str(error) if "the same command" in str(error) else f"{error}; {told}"


def _of_a_file(error: OSError) -> str:
    """What the system says of a file; of one to write also what to do, which is in a note."""
    notes: list[str] = getattr(error, "__notes__", [])
    return f"cannot write {error.filename} ({error.strerror}); {notes[0]}" if notes else str(error)


def _complain(error: object, code: int) -> int:
    print(f"dynarank: error: {printable(str(error), _LONGEST)}", file=sys.stderr)
    return code
