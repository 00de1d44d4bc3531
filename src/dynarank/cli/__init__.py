"""The command line: thin commands over the library.

Exit codes: 0 done (or finished before), 1 a run failed (diverged, disk full), 2 invalid request,
130 interrupted by Ctrl-C (SIGINT), 143 by SIGTERM: everything is saved, the same command goes on.
"""

from __future__ import annotations

import errno
import sys

import typer

from dynarank.cli.compare import compare
from dynarank.cli.init import init
from dynarank.cli.interruption import raising_on_signals
from dynarank.cli.plan import plan
from dynarank.cli.probe import probe
from dynarank.cli.report import report
from dynarank.cli.spectrum import spectrum
from dynarank.cli.sweep import sweep
from dynarank.cli.train import train
from dynarank.files.printable import printable
from dynarank.train.interruption import Interrupted
from dynarank.train.loop import DivergedError

__all__ = ["app", "main"]

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG}  # the disk's fault, not the request's
_LONGEST = 2_000  # characters of an error message

app = typer.Typer(
    name="dynarank",
    help="Dynamic-rank training: low-rank where that is enough, full-rank while it matters.",
    epilog="Exit codes: 0 done, 1 a run failed, 2 invalid request, 130 interrupted (143: by "
    "SIGTERM).",
    rich_markup_mode="markdown",  # paragraphs are wrapped to the terminal's width
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (init, train, plan, probe, compare, sweep, spectrum, report):
    app.command()(command)


def main() -> None:
    """Run the command line; user errors become one line on stderr and an exit code."""
    try:
        with raising_on_signals():
            app()
    except Interrupted as stop:
        print("dynarank: interrupted", file=sys.stderr)
        sys.exit(stop.exit_code)
    except OSError as error:
        sys.exit(_complain(_of_the_disk(error), 1) if error.errno in _DISK else _complain(error, 2))
    except (ValueError, ImportError) as error:
        sys.exit(_complain(error, 2))
    except DivergedError as error:
        sys.exit(_complain(error, 1))


def _of_the_disk(error: OSError) -> str:
    told = "what was saved before is kept: when there is space, the same command goes on"
    return str(error) if "the same command" in str(error) else f"{error}; {told}"


def _complain(error: object, code: int) -> int:
    print(f"dynarank: error: {printable(str(error), _LONGEST)}", file=sys.stderr)
    return code
