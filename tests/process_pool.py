"""A pool of gloo processes that stay alive from test to test, each with one thread."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

from only_new_objects import search_only_new_objects
from warm_python import FORKS

START, CALL, COLLECTIVE = 120.0, 100.0, 20.0  # seconds; the machine may be busy


class ProcessError(AssertionError):
    """What processes raised, with their tracebacks."""


class Pool:
    """``size`` processes in one default process group, which call functions when told to."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        place = str(Path(self._folder.name) / "store")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(size):
            ours, theirs = FORKS.Pipe()
            one = FORKS.Process(target=_work, args=(rank, size, place, theirs), daemon=True)
            one.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(one)
        self.usable = True
        self._results(START)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The function's results, by rank; it has the processes' default group.

        Raises:
            ProcessError: it raised in one of them, or did not end.
        """
        where = function.__module__, str(Path(sys.modules[function.__module__].__file__ or ""))
        for pipe in self._pipes:
            pipe.send((where, function.__qualname__, args))
        return self._results(CALL)

    def _results(self, seconds: float) -> list[Any]:
        end, results, errors = time.monotonic() + seconds, list[Any](), list[str]()
        for rank, pipe in enumerate(self._pipes):
            # Once one has failed the others may wait for it: what they say is of little use.
            left = min(end - time.monotonic(), 2 * COLLECTIVE if errors else seconds)
            try:
                good, value = pipe.recv() if pipe.poll(max(0.0, left)) else (False, "no answer")
            except EOFError:
                good, value = False, "it has ended"
            results.append(value)
            if not good:
                errors.append(f"--- process {rank}:\n{value}")
        if errors:
            self.close()
            raise ProcessError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        self.usable = False
        for one in self._processes:
            one.kill()
            one.join()
        self._folder.cleanup()


Pools: TypeAlias = Callable[[int], Pool]


def spread(model: Any) -> float:
    """The largest difference of a parameter between the processes."""
    import torch.distributed as dist

    worst = 0.0
    for p in model.parameters():
        low, high = p.detach().clone(), p.detach().clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        worst = max(worst, float((high - low).abs().max()))
    return worst


def _work(rank: int, size: int, place: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    wait = timedelta(seconds=COLLECTIVE)
    store = dist.FileStore(place, size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=wait)
    pipe.send((True, None))
    while True:
        try:
            where, name, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            module, file = where
            search_only_new_objects()
            pipe.send((True, _function(module, file, name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _function(module: str, file: str, name: str) -> Callable[..., Any]:
    """A function of a test module, which pytest imports by its path."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return getattr(sys.modules[module], name)
