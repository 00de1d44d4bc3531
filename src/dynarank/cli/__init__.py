"""The command line: thin commands over the library.

Exit codes: 0 done, 1 a run failed, 2 invalid request, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from dynarank.cli.compare import compare
from dynarank.cli.plan import plan
from dynarank.cli.report import report
from dynarank.cli.spectrum import spectrum
from dynarank.cli.sweep import sweep
from dynarank.cli.train import train
from dynarank.files.printable import printable
from dynarank.train.loop import DivergedError

__all__ = ["app", "main"]

_LONGEST = 2_000  # characters of an error message

app = typer.Typer(
    name="dynarank",
    help="Dynamic-rank training: low-rank where that is enough, full-rank while it matters.",
    epilog="Exit codes: 0 done, 1 a run failed, 2 invalid request, 130 interrupted.",
    rich_markup_mode="markdown",  # paragraphs are wrapped to the terminal's width
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (train, plan, compare, sweep, spectrum, report):
    app.command()(command)


def main() -> None:
    """Run the command line; user errors become one line on stderr and an exit code."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(_complain(error, 2))
    except DivergedError as error:
        sys.exit(_complain(error, 1))


def _complain(error: Exception, code: int) -> int:
    print(f"dynarank: error: {printable(str(error), _LONGEST)}", file=sys.stderr)
    return code
