"""The checkpoints of a run: written when they are due, read when the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynarank.checkpoint.folder import Contents, discard
from dynarank.checkpoint.steps import Checkpoints, is_step
from dynarank.distributed.processes import Processes
from dynarank.train.checkpoint_plan import CheckpointPlan

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """Writes the checkpoints of a run into its folder, in the background.

    What a checkpoint costs is the time from its copy to its last byte on the device, as if training
    stood still meanwhile; where one after an epoch or a change of form would exceed the plan's
    share, it is left out.

    Args:
        folder: the folder of the run.
        plan: when checkpoints are written.
        say: called with warnings.
        take: copies the state of the run.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        folder: Path,
        plan: CheckpointPlan,
        say: Callable[[str], None],
        take: Callable[[], Contents],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._plan, self._say = folder / "checkpoints", plan, say
        self._take, self._clock = take, clock
        self._checkpoints: Checkpoints | None = None
        self._begun = clock()  # of the last checkpoint
        self._writing: int | None = None  # a step
        self._cost = 0.0  # of the last one, in seconds: the first event always has one
        self.saved: int | None = None
        """The last step that is known to be saved."""

    def newest(self) -> Contents | None:
        """The newest verified checkpoint; None if there is none.

        Raises:
            DamagedFileError: there are some, and all of them are damaged.
        """
        found = self._open().newest() if self._folder.exists() else None
        if found is None:
            return None
        self.saved = found[0]
        return found[1]

    def due(self, *, event: bool = False) -> bool:
        """Whether a checkpoint is due; an event is the end of an epoch, or a change."""
        self._look()
        minutes, elapsed = self._plan.minutes, self._clock() - self._begun
        if minutes is None:
            return False
        return elapsed >= 60 * minutes or (event and elapsed * self._plan.share >= self._cost)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Write a checkpoint of this step now, unless it is saved already."""
        if wait and self._checkpoints is not None:
            self._checkpoints.drain()
            self._look()
        if self.saved != step and (wait or self._writing != step):
            self._begun, self._writing = self._clock(), step
            try:
                contents = self._take()
            except OSError as error:  # of the records, which come first
                self._say(f"the state of step {step:,} could not be saved: {error}")
                return
            self._open().save(step, contents, wait=wait)
            self._look()

    def close(self) -> None:
        """Wait until what was saved is on the device."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def remove(self) -> None:
        """Remove the checkpoints of a finished run; damaged ones, and copies, stay."""
        self.close()
        for path in self._folder.glob("step-*"):
            if is_step(path.name):
                discard(path)
        with suppress(OSError):  # not empty, or not there
            self._folder.rmdir()

    def _open(self) -> Checkpoints:
        if self._checkpoints is None:
            how: dict[str, Any] = {"keep": self._plan.keep, "warn": self._say}
            alone = Processes()  # the first of several writes for all
            self._checkpoints = Checkpoints(self._folder, processes=alone, **how)
        return self._checkpoints

    def _look(self) -> None:
        """Notice that the checkpoint in writing is whole, and what it has cost."""
        made = self._checkpoints and self._checkpoints.last_acknowledged
        if made is not None and made == self._writing:
            self.saved, self._writing = made, None
            self._cost = self._clock() - self._begun
