"""``torchrun -m dynarank train``: the first process runs the command, the others train with it.

What starts the processes (torchrun, ``accelerate launch``, a cluster) tells each its number in
``RANK`` and how many there are in ``WORLD_SIZE``. The others parse no options and write nothing:
they wait for the runs that the first begins, train their share of each batch, and end with it.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dynarank.cli.signals import raising_on_signals
from dynarank.distributed.joining import init_process_group
from dynarank.distributed.processes import DisagreementError, PeerError, Processes, processes_of
from dynarank.train.data_digest import data_digest
from dynarank.train.grid import Job
from dynarank.train.interruption import Interrupted, StopSignals
from dynarank.train.loop import DivergedError, Machine
from dynarank.train.recipe_error import RecipeError
from dynarank.train.run import follow_schedule
from dynarank.train.task import Task
from dynarank.train.tasks import make_task

__all__ = ["Leader", "Order", "leader", "run_together", "said_by_another"]

_PATIENCE = timedelta(hours=12)  # while the first process tests or writes; a dead one ends all
_NEXT = "the next run"
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_LEADER: ContextVar[Leader | None] = ContextVar("leader", default=None)


@dataclass(frozen=True)
class Order:
    """A run that the first process begins, and all others train with it."""

    job: Job
    machine: Machine
    epochs: int
    data: str | None
    train_limit: int | None
    test_limit: int | None


class Leader:
    """What the first of several processes tells the others.

    Args:
        processes: the processes.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._waiting = True  # whether the others wait for the next run

    def device(self, name: str) -> str:
        """The device of this process for ``--device``: of several GPUs, its own.

        Raises:
            RecipeError: a certain GPU is asked for.
        """
        if ":" in name:
            raise RecipeError(
                f"--device {name} is one GPU, but each of {self.processes.size} processes has its "
                "own; pass --device cuda, or choose GPUs with CUDA_VISIBLE_DEVICES"
            )
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        return str(_own_device(kind))

    @property
    def words(self) -> str:
        """The command that starts as many processes, where all of them are on this machine."""
        here = os.environ.get("LOCAL_WORLD_SIZE")
        if here != str(self.processes.size):
            return "dynarank"
        return f"torchrun --nproc-per-node {here} -m dynarank"

    @contextmanager
    def training(self, order: Order, task: Task) -> Generator[Processes]:
        """Within the block, all processes train this run.

        Raises:
            PeerError: another process cannot read the data.
            DisagreementError: it reads other data.
        """
        self.processes.from_first(_NEXT, order)
        _ready(self.processes, lambda: task)
        self._waiting = False
        try:
            yield self.processes
        except (Interrupted, DivergedError):  # in all of them, after the same step
            self._waiting = True
            raise
        self._waiting = True

    def end(self, code: int) -> None:
        """Let the others end with this exit code; those that still train notice by themselves."""
        if self._waiting:
            with suppress(PeerError, DisagreementError):
                self.processes.from_first(_NEXT, code)


def leader() -> Leader | None:
    """The leader, in the first of several processes; None if this is the only one."""
    return _LEADER.get()


def run_together(command: Callable[[], int]) -> int:
    """Join the other processes: run a command in the first, and train with it in the others.

    Returns:
        The exit code.
    """
    processes = _join()
    if processes.rank:
        code = _follow(processes)
        _leave()
        return code
    lead = Leader(processes)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # no error
    token = _LEADER.set(lead)
    code = 1
    try:
        code = command()
    finally:
        _LEADER.reset(token)
        lead.end(code)
    _leave()
    return code


def said_by_another(error: BaseException) -> bool:
    """Whether an error only says that another process has ended, which has said why."""
    if isinstance(error, PeerError):
        return "failed in process" not in str(error)
    lost = any(words in str(error) for words in _LOST)
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and lost):
        return True
    return error.__cause__ is not None and said_by_another(error.__cause__)


def _join() -> Processes:
    """Meet the other processes: gradients by NCCL on GPUs, all else by gloo."""
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=_PATIENCE)
    return processes_of()


def _leave() -> None:
    """End the group's threads before the interpreter does, which may abort the process."""
    with suppress(RuntimeError, ValueError):
        dist.destroy_process_group()


def _follow(processes: Processes) -> int:
    """Train what the first process begins, in silence but for errors; the exit code."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with raising_on_signals():
                return _train_all(processes)
        except Interrupted as stop:
            return stop.exit_code
        except Exception as error:
            if not said_by_another(error):
                name = f"process {processes.rank} of {processes.size}"
                if isinstance(error, ValueError | OSError | ImportError | DivergedError):
                    print(f"dynarank: error in {name}: {error}", file=sys.stderr)
                else:
                    print(f"dynarank: error in {name}:", file=sys.stderr)
                    traceback.print_exc()
            return 1


def _train_all(processes: Processes) -> int:
    """Train run after run, until the first process ends; its exit code."""
    tasks: dict[int, Task] = {}
    nothing: Order | int = 0
    while isinstance(order := processes.from_first(_NEXT, nothing), Order):
        with suppress(Interrupted, DivergedError, _NotReady):
            _train(order, processes, tasks)
    return order


class _NotReady(Exception):
    """Raised where a run cannot begin, which the first process says."""


def _train(order: Order, processes: Processes, tasks: dict[int, Task]) -> None:
    job, machine = order.job, order.machine

    def task() -> Task:
        device = _own_device(machine.device.type)
        if job.seed not in tasks:
            tasks[job.seed] = make_task(
                job.recipe,
                order.data,
                seed=job.seed,
                device=device,
                train_limit=order.train_limit,
                test_limit=order.test_limit,
            )
        return tasks[job.seed]

    try:
        made = _ready(processes, task)
    except Exception as error:
        raise _NotReady from error
    with StopSignals(silent=True) as stop:
        follow_schedule(
            job.recipe,
            job.schedule,
            made,
            seed=job.seed,
            epochs=order.epochs,
            machine=replace(machine, device=_own_device(machine.device.type)),
            stop=stop.requested,
            processes=processes,
        )


def _ready(processes: Processes, make: Callable[[], Task]) -> Task:
    """The task, which is to be the same in all processes."""
    task = processes.attempt("reading the data", make)
    processes.agree("the data (SHA-256)", data_digest(task))
    return task


def _own_device(kind: str) -> torch.device:
    """The device of a kind that this process has for itself.

    Raises:
        RecipeError: there are fewer GPUs on this machine than processes.
    """
    if kind != "cuda":
        return torch.device(kind)
    there, mine = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    if mine >= there:
        raise RecipeError(
            f"process {dist.get_rank()} is number {mine} on its machine, which has {there} GPUs "
            "(each process needs one); start fewer, or pass --device cpu"
        )
    torch.cuda.set_device(mine)
    return torch.device(kind, mine)
