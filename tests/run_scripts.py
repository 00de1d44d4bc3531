"""Runs each script named, in a process of its own, forked once torch is imported.

python tests/run_scripts.py FOLDER SCRIPT...
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from importlib import import_module


def run(script: str) -> int:
    """Run one script in a child; its exit code."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        runpy.run_path(script, run_name="__main__")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


for module in ("torch", "dynarank"):
    import_module(module)
os.chdir(sys.argv[1])
failed = [script for script in sys.argv[2:] if run(script)]
sys.exit(f"failed: {' '.join(failed)}" if failed else 0)
