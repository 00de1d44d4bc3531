"""Python in a process of its own, forked from one that has imported torch: a tenth of the start-up.

Torch, what an optimizer imports, scikit-learn and matplotlib take seven CPU seconds to import,
which is longer than what most tests run. Tests of the start itself, of flags of the interpreter
and of what ``/proc`` says of a process need :mod:`subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO

FORKS = multiprocessing.get_context("forkserver")
"""Its processes have imported what most need."""
IMPORTED = (
    "torch", "torch._dynamo", "torch.distributed.fsdp", "sklearn.datasets",
    "dynarank.cli.train", "dynarank.report.page",
)  # fmt: skip
FORKS.set_forkserver_preload([*IMPORTED])
_OURS = (Path(__file__).parent, Path(__file__).parents[1])  # on the path of tests only


class Started:
    """A process, as ``Popen`` with captured text has it.

    Args:
        words: what is behind ``python``: any ``-W``, then ``-m MODULE``, ``-c CODE``
            or a script, and arguments.
        cwd: the working directory; None: this one.
        env: the environment; None: this one.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.args = [str(word) for word in words]
        self._out, self._err = (tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in "oe")
        self._told: tuple[str, str] | None = None
        said, there = [self._out.name, self._err.name], str(cwd or Path.cwd())
        given = self.args, said, there, dict(os.environ if env is None else env)
        self._process = FORKS.Process(target=_work, args=given)
        self._process.start()
        atexit.register(self.kill)  # or Python would wait for one that a failed test has left

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None: it goes on."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it goes on."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """End it, if it goes on."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, if it goes on."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended; what it has said.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        atexit.unregister(self.kill)
        if self._told is None:
            self._told = _whole(self._out), _whole(self._err)
        return self._told


def run(
    words: Sequence[str | Path],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 280,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, as ``subprocess.run`` with captured text does.

    Raises:
        subprocess.TimeoutExpired: it has not ended; it is killed.
        subprocess.CalledProcessError: it failed, and ``check``.
    """
    started = Started(words, cwd, env)
    try:
        out, err = started.communicate(timeout)
    finally:
        started.kill()
        started.communicate()
    assert started.returncode is not None
    done = subprocess.CompletedProcess(started.args, started.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _whole(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


def _work(words: list[str], said: list[str], cwd: str, env: dict[str, str]) -> None:
    """In the new process: what ``python WORDS`` does."""
    for stream, name in enumerate(said, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    installed = [path for path in sys.path if path and Path(path) not in _OURS]
    sys.path[:] = [*filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    try:
        _main(words)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _main(words: list[str]) -> None:
    while words[0] == "-W":
        warnings._setoption(words[1])  # type: ignore[attr-defined]
        words = words[2:]
    if words[0] in ("-m", "-c"):
        sys.argv = words[1:] if words[0] == "-m" else ["-c", *words[2:]]
        sys.path.insert(0, "")
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        runpy.run_path(words[0], run_name="__main__")
