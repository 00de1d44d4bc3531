"""A complete run, written to its folder; one that was stopped goes on, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dynarank.checkpoint.folder import Contents
from dynarank.distributed.processes import Processes, independent
from dynarank.files.printable import printable
from dynarank.forms import Change
from dynarank.records import Record, RecordWriter, RunRecord, SummaryRecord, read_run
from dynarank.sinks import Sink
from dynarank.train.checkpoint_plan import CheckpointPlan
from dynarank.train.interruption import Interrupted
from dynarank.train.listener import Listener
from dynarank.train.loop import Machine, Trainer
from dynarank.train.pace import Pace
from dynarank.train.recipe import Recipe
from dynarank.train.recorder import Recorder, header
from dynarank.train.run_checkpoints import RunCheckpoints
from dynarank.train.run_config import check_config, run_config, write_config
from dynarank.train.task import Task
from dynarank.train.trained import WEIGHTS, write_trained

__all__ = ["CheckpointPlan", "follow_schedule", "run_schedule"]

_ALONE = Processes()
_DEFAULT = CheckpointPlan()


def run_schedule(
    recipe: Recipe,
    schedule: str,
    task: Task,
    folder: Path,
    listener: Listener,
    *,
    seed: int,
    epochs: int,
    machine: Machine,
    sinks: Sequence[Sink] = (),
    checkpoints: CheckpointPlan = _DEFAULT,
    stop: Callable[[], int | None] = lambda: None,
    say: Callable[[str], None] = print,
    processes: Processes = _ALONE,
) -> SummaryRecord:
    """Train a recipe under a schedule; write config, records and the merged weights to ``folder``.

    If the folder holds this very run, unfinished, it goes on from its newest checkpoint, and its
    weights and records are those of a run that was never stopped (but for the times). Checkpoints
    are removed when the run is finished. If it is finished already, nothing is trained.

    Args:
        recipe: the recipe to train.
        schedule: the name of the schedule.
        task: the recipe's data, on the machine's device.
        folder: the folder of the run, created if missing.
        listener: shows the progress of the run.
        seed: the seed of the initial weights.
        epochs: the length of the run.
        machine: the device and execution options.
        sinks: logging backends that get each record too, see :func:`dynarank.sinks.open_sinks`;
            closed at the end.
        checkpoints: when checkpoints are written; a run that has one goes on from there.
        stop: called after each step; a signal's number ends the run with a checkpoint.
        say: called with what the user should know: where the run goes on, a checkpoint that could
            not be written or read.
        processes: those that train together. This is the first, which writes; the others call
            :func:`follow_schedule` at the same time.

    Raises:
        ValueError: the schedule is refused, or the folder holds a run with other settings or one
            that cannot be read; nothing is written.
        Interrupted: ``stop`` asked for it; the same call goes on.
        DivergedError: the training loss is not finite; records and checkpoints so far are kept.
        OSError: the trained model could not be written; the same call finishes the run.
    """
    with ExitStack() as closing:
        for sink in sinks:
            closing.callback(sink.close)
        config = run_config(recipe, schedule, task, seed=seed, epochs=epochs, machine=machine)
        there = check_config(folder, config)
        if there and (summary := _finished(folder)) is not None:
            say(f"{folder} is finished already; nothing is trained")
            return summary
        trainer = Trainer(
            recipe, schedule, task, seed=seed, epochs=epochs, machine=machine, processes=processes
        )
        run = _Run(trainer, folder, listener, sinks, checkpoints, stop, say)
        closing.callback(run.close)
        if not there:  # a run that is refused leaves nothing behind
            write_config(folder, config)
        first = header(
            recipe, schedule, task, machine, seed=seed, epochs=epochs, processes=processes
        )
        run.begin(first)
        run.train()
        return run.end()


def follow_schedule(
    recipe: Recipe,
    schedule: str,
    task: Task,
    *,
    seed: int,
    epochs: int,
    machine: Machine,
    stop: Callable[[], int | None],
    processes: Processes,
) -> None:
    """Train with the process that calls :func:`run_schedule`, which writes everything.

    Raises:
        Interrupted: a signal asked one of the processes to stop.
        DivergedError: the training loss is not finite.
    """
    trainer = Trainer(
        recipe, schedule, task, seed=seed, epochs=epochs, machine=machine, processes=processes
    )
    pace = Pace(trainer, stop)

    def after_step(changes: list[Change]) -> None:
        if (signum := pace.after_step()) is not None:
            raise Interrupted(signum)

    trainer.on_step = after_step
    contents, begun = pace.told(None), 0
    if contents is not None:
        trainer.restore(contents)
        begun = pace.told(0)
    for epoch in range(begun, epochs):
        trainer.train_epoch(epoch)
        pace.after_epoch()


class _Run:
    """A trainer with its records and checkpoints."""

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        listener: Listener,
        sinks: Sequence[Sink],
        plan: CheckpointPlan,
        stop: Callable[[], int | None],
        say: Callable[[str], None],
    ) -> None:
        self.trainer, self.folder, self.sinks = trainer, folder, sinks
        self.pace, self.say = Pace(trainer, stop), say
        self.recorder = Recorder(trainer, self._write, listener)
        trainer.on_step = self._after_step
        self.checkpoints = RunCheckpoints(folder, plan, say, self._take)
        self.records = RecordWriter(folder)
        self._unwritten: list[Record] = []  # the disk was full
        self._begun = time.perf_counter()

    def begin(self, first: RunRecord) -> None:
        """Go on from the newest checkpoint, or begin with the first record."""
        if (found := self.pace.told(self.checkpoints.newest())) is not None:
            try:
                self._go_on(found)
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"the checkpoint in {self.folder} is not one of this run "
                    f"({type(error).__name__}: {printable(str(error))}): use another folder"
                ) from error
            return
        self._write(first)
        with independent():
            self.recorder.begin()

    def train(self) -> None:
        """Train the epochs that are left."""
        for epoch in range(self.recorder.epochs, self.trainer.epochs):
            result = self.trainer.train_epoch(epoch)
            with independent():
                self.recorder.epoch(result)
            due = self.checkpoints.due(event=True)
            self.pace.after_epoch(due)
            if due:
                self.checkpoints.save(self.trainer.done)

    def end(self) -> SummaryRecord:
        """Write the weights, then the summary that says that the run is finished.

        Raises:
            OSError: one of them could not be written; the state is in a checkpoint if possible.
        """
        try:
            sample = self.trainer.task.sample()
            digest = write_trained(self.trainer.model, sample, self.folder)
            self._catch_up()
            summary = self.recorder.end(self._seconds(), model_sha256=digest)
            self._catch_up()
            self.records.position()  # on the device
        except OSError as error:
            self.checkpoints.save(self.trainer.done, wait=True)
            raise OSError(error.errno, self._not_written(error), error.filename) from error
        self.checkpoints.remove()
        return summary

    def close(self) -> None:
        """Close the records; wait for the last checkpoint."""
        self.records.close()
        self.checkpoints.close()

    def _write(self, record: Record) -> None:
        told = bool(self._unwritten)
        self._unwritten.append(record)
        try:
            self._catch_up()
        except OSError as error:
            if isinstance(record, RunRecord):  # nothing is lost yet
                raise
            if not told:
                self.say(
                    f"{self.folder}/records.jsonl cannot be written ({error.strerror or error}); "
                    "the records are kept in memory until it can"
                )
        for sink in self.sinks:
            sink.write(record)

    def _catch_up(self) -> None:
        """Write the records that did not fit on the disk."""
        while self._unwritten:
            self.records.write(self._unwritten[0])
            del self._unwritten[0]

    def _after_step(self, changes: list[Change]) -> None:
        with independent():
            self.recorder.step(changes)
        due = self.checkpoints.due(event=bool(changes))
        if (signum := self.pace.after_step(due)) is not None:
            self.checkpoints.save(self.trainer.done, wait=True)
            raise Interrupted(signum, self.folder, self.checkpoints.saved)
        if due:
            self.checkpoints.save(self.trainer.done)

    def _take(self) -> Contents:
        self._catch_up()
        return self.trainer.take(
            {
                "recorder": self.recorder.state_dict(),
                "records": self.records.position(),
                "wall_seconds": self._seconds(),
            }
        )

    def _go_on(self, contents: Contents) -> None:
        saved: dict[str, Any] = self.trainer.restore(contents)
        self.recorder.load_state_dict(saved["recorder"])
        self.pace.told(self.recorder.epochs)
        self.records = RecordWriter(self.folder, saved["records"])
        self._begun -= saved["wall_seconds"]
        done, steps = self.trainer.done, self.trainer.total_steps
        before, now = self.trainer.processes_before, self.trainer.processes.size
        others = f", with {now} processes instead of {before}: same batches, other dropout draws"
        self.say(
            f"{self.folder} goes on from its checkpoint of step {done:,} of {steps:,}"
            + (others if before != now else "")
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self._begun

    def _not_written(self, error: OSError) -> str:
        saved = self.checkpoints.saved
        kept = f"the state of step {saved:,} is" if saved is not None else "no state of training is"
        return (
            f"the trained model could not be written ({error.strerror or error}); {kept} saved; "
            "make room, and the same command goes on from there"
        )


def _finished(folder: Path) -> SummaryRecord | None:
    """The summary of a run that is finished: its last record is written after its weights."""
    if not ((folder / "records.jsonl").exists() and (folder / WEIGHTS).exists()):
        return None
    return read_run(folder).summary
