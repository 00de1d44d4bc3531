"""Runs each script named, in its folder and in a process of its own, forked once torch is imported.

python tests/run_scripts.py SCRIPT...
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path


def run(script: str) -> int:
    """Run one script in a child; its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.chdir(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def main(scripts: list[str]) -> int | str:
    """Run the scripts; what to exit with."""
    # Python 3.12 warns of forking where there are threads; those of numpy and torch are idle here.
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    # Lightning 2.6 uses an old name of torch's, and wants workers for the smallest data.
    warnings.filterwarnings("ignore", message=".*LeafSpec|.*does not have many workers")
    for module in ("torch", "torch._dynamo", "dynarank.scheduler.rank_scheduler"):  # what is slow
        import_module(module)
    failed = [script for script in scripts if run(script)]
    return f"failed: {' '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
