"""The recorder of a loop of one's own: what ``dynarank train`` writes, for any training."""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dynarank.cost.memory import SavedTensors
from dynarank.cost.stand_in import without_graphs
from dynarank.distributed.dtensors import is_dtensor
from dynarank.distributed.processes import Processes, independent, members_of
from dynarank.distributed.unwrap import unwrapped
from dynarank.files.ownership import owned
from dynarank.files.reading import sha256
from dynarank.files.tensors import save_tensors
from dynarank.forms import Change, Plan, form_name
from dynarank.monitors.spectral import SpectralMonitor
from dynarank.recording.events import RankEvents
from dynarank.recording.host import commit, hardware, started, versions
from dynarank.recording.output import Output, Silence
from dynarank.recording.phase_costs import PhaseCosts, alike, summary_of
from dynarank.recording.rank_metrics import VALUES, RankMetricsRecorder
from dynarank.recording.run_folder import check_folder, kept_records, write_settings
from dynarank.recording.step_log import StepLog, as_number, kept
from dynarank.recording.watch import watch
from dynarank.records import (
    DecisionRecord,
    EpochRecord,
    Metric,
    PhaseRecord,
    Record,
    RunRecord,
    StepRecord,
    SummaryRecord,
)
from dynarank.report import write_report
from dynarank.scheduler.rank_scheduler import RankScheduler
from dynarank.scheduler.saved_state import schedule_identity
from dynarank.schedules.catalog import schedule_name
from dynarank.schedules.options import check_count
from dynarank.schedules.readings import SpectralReading
from dynarank.sinks import Sink, open_sinks
from dynarank.sinks.base import FailSafeSink
from dynarank.surgery.optimizer_state import Optimizers, as_list
from dynarank.surgery.sites import current_plan
from dynarank.surgery.verbs import merge

__all__ = ["Recorder"]

_FLUSH = 256  # steps whose values wait on the device
_MOST_SHARE = 1.5  # a word error rate may be above 1
_METRICS = {  # whether higher is better, and whether it is shown in percent
    "score": (True, False),
    "accuracy": (True, True),
    "f1": (True, True),
    "loss": (False, False),
    "error": (False, True),
    "perplexity": (False, False),
}
_PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
              torch.float64: "fp64"}  # fmt: skip


class Recorder:
    """Records a training loop of one's own, as ``dynarank train`` does its runs.

    In the loop, call :meth:`log` once a step, if you like, and :meth:`epoch` after each epoch; at
    the end :meth:`close` writes the summary and ``report.html``. Forms and their changes, decisions
    of the schedule, FLOPs, memory, spectra and the training time come by themselves. ``dynarank
    report``, ``compare``'s tables and the logging backends work on the folder.

    ``records.jsonl`` grows line by line, and is on the device after each epoch. After a crash, load
    the checkpoint and make the recorder of the same folder: what was recorded after the step of the
    checkpoint is cut off, and the recording goes on. An exception within ``with Recorder(...)``
    closes the files, without a summary, and passes.

    Memory is, on a GPU, the allocator's peak so far; else parameters, buffers, gradients, optimizer
    state and what the first forward pass of a phase saves for the backward pass, without the loss.
    Training seconds are those between the steps: evaluation right before :meth:`epoch` does not
    count.

    Of several processes that train one model, each makes its recorder; the first writes, and the
    others are silent. Losses and scores are those of the first: where they differ, average them.
    The bytes all-reduced are what each gives to DDP to average its gradients once a step.

    Args:
        folder: the folder of the run; it is made.
        ranks: the rank scheduler of the loop; call its ``step()`` before ``zero_grad()``.
        model: the model of a loop without a rank scheduler; with ``optimizer``.
        optimizer: its optimizer, or several, of which the steps of the first are counted.
        start: optimizer steps done before, where a loop without a rank scheduler goes on.
        epochs: how many epochs there will be; None: found at the first :meth:`epoch`.
        steps_per_epoch: optimizer steps of an epoch; None: found at the first :meth:`epoch`.
        batch: a batch, from whose shapes FLOPs are computed, as :func:`dynarank.estimate` takes it.
            None: the first training batch, which a hook on the model sees.
        metric: of ``test_score``: ``"accuracy"``, ``"loss"``, ..., or a
            :class:`dynarank.records.Metric`.
        seed: the seed, for the record.
        name: the name of what is trained; runs of one name are compared. None: the folder's.
        sinks: logging backends: names (``"tensorboard"``, ``"wandb"``, ``"mlflow"``) or sinks.
        spectra: the share of the time that reading spectra may take during training, besides a few
            readings between epochs; 0: none are read.
        save_model: whether to write the trained weights, merged, to ``model.safetensors``.
        report: whether to write ``report.html`` at the end.
        say: called with where the report is, and where a recording goes on.

    Raises:
        ValueError: the folder is in use by another process, or holds another run or a finished one;
            neither a rank scheduler nor a model and its optimizer are given; an unknown metric.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> schedule = dr.schedules.dynamic_rank(2)
        >>> ranks = RankScheduler(model, optimizer, schedule, total_steps=20, layers="0")
        >>> with Recorder(getfixture("tmp_path") / "mine", ranks, report=False) as recorder:
        ...     for epoch in range(2):
        ...         for x in torch.randn(10, 4, 8):
        ...             loss = (model(x) - 1).square().mean()
        ...             loss.backward()
        ...             optimizer.step()
        ...             changes = ranks.step()
        ...             optimizer.zero_grad()
        ...             recorder.log(loss=loss)
        ...         recorder.epoch(test_loss=loss)
    """

    def __init__(
        self,
        folder: str | Path,
        ranks: RankScheduler | None = None,
        *,
        model: nn.Module | None = None,
        optimizer: Optimizers = None,
        start: int = 0,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        batch: Any = None,
        metric: str | Metric = "score",
        seed: int | None = None,
        name: str | None = None,
        sinks: Sequence[str | Sink] = (),
        spectra: float = 0.01,
        save_model: bool = False,
        report: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = Path(folder)
        self.model, self._optimizers = _subject(ranks, model, optimizer)
        self.ranks, self.seed = ranks, seed
        members = members_of(self.model)
        self._writes = Processes().global_rank(0) == min(members)
        self._costs = PhaseCosts(self.model, self._optimizers, batch, len(members))
        self.metric = _metric(metric)
        self.name = name or self.folder.resolve().name
        self._settings = self._make_settings()
        self._save_model, self._report, self._say = save_model, report, say
        if save_model and any(map(is_dtensor, self.model.parameters())):
            raise ValueError(
                "save_model=True writes the weights from one process, but they are sharded over "
                "several (fully_shard); leave it out, and save the model after training"
            )
        self._epochs = None if epochs is None else check_count("epochs", epochs)
        self._per_epoch = self._length_of_epoch(steps_per_epoch)
        self._count = _started_at(start, ranks)  # optimizer steps, without a rank scheduler
        self._reached = 0  # the last optimizer step that was seen
        self._shapes: tuple[Any, ...] = ()  # of the phase's parameters
        self._log = StepLog()
        self._results: list[EpochRecord] = []
        self._phases: list[PhaseRecord] = []
        self._probing = self._new_phase = True
        self._begun, self._seen_step, self._last_epoch = False, False, 0
        self._later = 0  # steps that logs are ahead of the rank scheduler
        self._seconds, self._mark, self._start = 0.0, time.perf_counter(), time.perf_counter()
        self._rate: float | None = None
        self._read_at = -1  # the last step at which all weights were read
        self._told_of_steps = self._told_of_shares = self._closed = self._goes_on = False
        self._last_spectra: Mapping[str, SpectralReading] = {}
        self._events = RankEvents(self._write, self._epoch_at)
        self._stack = ExitStack()
        try:
            self._open(sinks, spectra)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, sinks: Sequence[str | Sink], spectra: float) -> None:
        """Own the folder, and watch the loop."""
        self._metrics = None
        if self._writes:
            self._open_folder(sinks, spectra)
        else:
            self._output = Silence()
        optimizer = self._optimizers[0]
        self._stack.push(watch(self.model, self.ranks, optimizer, self))

    def _open_folder(self, sinks: Sequence[str | Sink], spectra: float) -> None:
        check_folder(self.folder, self._settings)
        opened = open_sinks([one for one in sinks if isinstance(one, str)], self.folder)
        given = [one for one in sinks if not isinstance(one, str)]
        opened += [FailSafeSink(one, type(one).__name__) for one in given]
        if spectra and not any(map(is_dtensor, self.model.parameters())):
            self._metrics = self._make_metrics(spectra)
        self._stack.enter_context(owned(self.folder))
        check_folder(self.folder, self._settings)  # now that nobody else writes there
        self._output = Output(self.folder, opened)
        self._stack.callback(self._output.close)

    def _make_metrics(self, share: float) -> RankMetricsRecorder | None:
        layers = None if self.ranks is None else list(self.ranks.layers)
        if not (paths := layers or [*current_plan(self.model)]):
            return None
        monitor = SpectralMonitor(self.model, layers=layers, share=share, values=VALUES)
        return RankMetricsRecorder(
            self.model, monitor, paths, self._write, lambda: (self._epoch_at(self.step), self.step)
        )

    @property
    def step(self) -> int:
        """The optimizer steps done."""
        return self._count if self.ranks is None else self.ranks.last_step

    def log(
        self, step: int | None = None, *, loss: Any = None, lr: float | None = None, **values: Any
    ) -> None:
        """Record what a step gave; a tensor is not read before the epoch ends, or 256 steps later.

        Call it once a step, before or after ``ranks.step()``. Of several logs in one step, the mean
        of the losses counts.

        Args:
            step: the number of the step; only compared, since optimizer steps are counted.
            loss: the training loss.
            lr: the learning rate.
            values: other numbers, by name.
        """
        self._check_open("log")
        if not self._seen_step and not self._later:
            self._later = 1  # this loop logs before it steps
        at = self.step + self._later
        self._check_step(step, at)
        if self.step < self._reached:  # the loop has loaded an earlier checkpoint
            self._flush()
        given = {"loss": loss, "lr": lr, **values}
        self._log.add(at, {n: kept(n, value) for n, value in given.items() if value is not None})

    def epoch(
        self,
        *,
        test_loss: Any = None,
        test_score: Any = None,
        train_loss: Any = None,
        train_score: Any = None,
        **scores: Any,
    ) -> None:
        """Record the results of an epoch; all that was recorded is on the device afterwards.

        Args:
            test_loss: the loss on the test set.
            test_score: the score on the test set, in the recorder's metric.
            train_loss: the mean training loss; None: that of the steps logged.
            train_score: the score in training.
            scores: other scores, by name.
        """
        self._check_open("epoch")
        if self.step:
            self._begin(self.step)
        step = self._reached
        if step <= self._last_epoch:
            warnings.warn(
                f"epoch() was called at step {step:,}, and no optimizer step was done since the "
                "last call: its results are not recorded; give all results of an epoch in one call",
                UserWarning,
                stacklevel=2,
            )
            return
        numbers = {n: as_number(n, value) for n, value in scores.items()}
        given = {"test_loss": test_loss, "test_score": test_score, "train_score": train_score}
        results = {n: as_number(n, value) for n, value in given.items()}
        self._check_share(results)
        self._end_epoch(as_number("train_loss", train_loss), results, numbers)
        if _is_power_of_two(len(self._results)):
            self._read()
        self._output.sync()
        self._mark = time.perf_counter()

    def close(self) -> None:
        """Write the summary, and the report unless told not to; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with self._stack:
            if self.step:
                self._begin(self.step)  # of a run that had only to be closed
            if not self._phases:
                warnings.warn(
                    f"{self.folder}: no optimizer step was recorded, so there is no summary",
                    UserWarning,
                    stacklevel=2,
                )
                return
            if self._reached > self._last_epoch:
                self._end_epoch(None, {}, {})
            self._read()
            digest = self._write_model() if self._save_model and self._writes else None
            took = {"train_seconds": self._seconds,
                    "wall_seconds": time.perf_counter() - self._start}  # fmt: skip
            spans = self._phases, self._reached, self._results
            self._write(summary_of(*spans, self.metric, model_sha256=digest, **took))
            if self.ranks is None:
                self._relabel(self._epochs or len(self._results))
            self._output.sync()
        if self._report and self._writes:
            self._write_report()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._closed = True
            with self._stack:
                if self._begun:
                    self._flush()
                    self._output.sync()

    # What the hooks see.

    @property
    def probing(self) -> bool:
        """Whether forward passes are looked at: until the first step of a phase is done."""
        return self._probing or _shapes_of(self.model) != self._shapes

    def began(self, batch: Any) -> None:
        """Begin the recording with the first training forward pass, and keep its batch."""
        self._costs.see(batch)
        self._begin(self.step)

    def saved(self, tensors: SavedTensors) -> None:
        """Note what a forward pass before the first step of a phase saves."""
        self._costs.saved(tensors)

    def stepped(self) -> None:
        """Record what an optimizer step began: a phase, decisions, a reading of the spectra."""
        now = time.perf_counter()
        self._count += 1
        self._begin(self.step - 1)
        if self.step <= self._reached:
            self._back_to(self.step - 1)
        self._reached = self.step
        self._seconds += now - self._mark
        self._seen_step = True
        if self._rate is None:
            self._rate = float(self._optimizers[0].param_groups[0]["lr"])
        if self._new_phase or _shapes_of(self.model) != self._shapes:
            self._phase()
        self._decided()
        if self._metrics is not None:
            self._metrics.step()
        if len(self._log) >= _FLUSH:
            self._flush()
        self._mark = time.perf_counter()

    def checkpointed(self) -> None:
        """Have on the device what a run that goes on from this checkpoint is to find."""
        if self._begun:
            self._flush(self.step)
            self._output.sync()

    def changed(self, changes: list[Change]) -> None:
        """Record changes of form, after which a phase begins."""
        self._decided()
        self._events.changed(self.step, changes)
        self._probing = self._new_phase = True

    # The records.

    def _begin(self, step: int) -> None:
        """Begin the records, or go on after this step."""
        if self._begun:
            return
        records = kept_records(self.folder, step) if self._writes else []
        if self._writes:
            write_settings(self.folder, self._settings)
        if records:
            self._go_on(records, step)
        else:
            header = self._header()
            self._output.begin([header], final=self._per_epoch is not None)
            self._decided()
            with torch.autocast(torch.device(header.device).type, enabled=False):
                self._read()
        self._begun, self._reached, self._mark = True, step, time.perf_counter()

    def _back_to(self, step: int) -> None:
        """Go on after an earlier step, whose checkpoint the loop has loaded."""
        held = self._log.held(self.step) if self._later else []
        self._flush()
        self._log.restart(self.step, held)
        self._phases, self._results, self._last_epoch, self._seconds = [], [], 0, 0.0
        self._events.known, self._read_at = 0, -1
        self._begun, self._new_phase = False, True
        self._begin(step)

    def _go_on(self, records: list[Record], step: int) -> None:
        """Go on from these records of the same run."""
        header, self._phases = records[0], [r for r in records if isinstance(r, PhaseRecord)]
        self._results = [record for record in records if isinstance(record, EpochRecord)]
        self._events.known = sum(isinstance(record, DecisionRecord) for record in records)
        if self._results:
            self._last_epoch, self._seconds = self._results[-1].step, self._results[-1].seconds
            assert isinstance(header, RunRecord)
            self._per_epoch = self._per_epoch or header.steps_per_epoch
        for record in records:
            if isinstance(record, StepRecord) and record.step > self._last_epoch:
                if record.train_loss is not None:
                    self._log.lost(record.step, record.train_loss)
        self._output.begin(records, final=self._per_epoch is not None)
        self._goes_on = bool(self._phases)
        self._start, self._mark = time.perf_counter() - self._seconds, time.perf_counter()
        self._say(f"{self.folder} goes on after step {step:,}")

    def _header(self) -> RunRecord:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return RunRecord(
            recipe=self.name,
            schedule=self._settings["schedule"],
            seed=self.seed,
            epochs=self._epochs or self._expected_epochs(),
            steps_per_epoch=self._length,
            device=str(device),
            hardware=hardware(device),
            precision=_precision(self.model, device),
            metric=self.metric,
            versions=versions(),
            commit=commit(),
            started=started(),
            processes=self._costs.processes,
            backend=dist.get_backend() if self._costs.processes > 1 else None,
        )

    def _phase(self) -> None:
        """Record the phase whose first step has just been done."""
        self._new_phase = self._probing = False
        self._shapes = _shapes_of(self.model)
        step = self.step - 1
        record = self._costs.phase(self._epoch_at(step), step)
        goes_on, self._goes_on = self._goes_on, False
        if not goes_on or not alike(self._phases[-1], record):
            self._phases.append(record)
            self._write(record)

    def _decided(self) -> None:
        """Record the readings and decisions of the schedule since the last look."""
        if self.ranks is None:
            return
        if self._metrics is not None and self.ranks.spectra is not self._last_spectra:
            self._last_spectra = self.ranks.spectra
            self._metrics.decided_by(self.ranks.spectra)
        self._events.decided(self.ranks.decisions)

    def _read(self) -> None:
        """Record the weights as they are, once a step."""
        if self._metrics is not None and self._read_at != self.step:
            self._read_at = self.step
            self._metrics.read(pictures=True)

    def _flush(self, last: int | None = None) -> None:
        """Write the values of the steps so far, or up to one."""
        for step, found in self._log.take(last):
            loss, rate = found.pop("loss", None), found.pop("lr", None)
            self._write(
                StepRecord(
                    epoch=self._epoch_at(step),
                    step=step,
                    train_loss=loss,
                    learning_rate=rate,
                    values=found,
                )
            )

    def _end_epoch(
        self, train_loss: float | None, results: dict[str, Any], scores: dict[str, Any]
    ) -> None:
        self._flush()
        mean = self._log.mean_loss()
        if self._per_epoch is None:
            self._per_epoch = self._reached - self._last_epoch
            self._relabel(self._epochs or self._expected_epochs())
        phase = self._phases[-1] if self._phases else None
        record = EpochRecord(
            epoch=self._epoch_at(self._reached),
            step=self._reached,
            learning_rate=self._rate or 0.0,
            train_loss=mean if train_loss is None else train_loss,
            test_loss=results.get("test_loss"),
            test_score=results.get("test_score"),
            train_score=results.get("train_score"),
            scores={name: value for name, value in scores.items() if value is not None},
            trainable_parameters=phase.trainable_parameters if phase else 0,
            relative_flops=phase.relative_flops if phase else 1.0,
            seconds=self._seconds,
        )
        self._results.append(record)
        self._last_epoch, self._rate = self._reached, None
        self._write(record)

    def _write_model(self) -> str:
        path = self.folder / "model.safetensors"
        with independent():
            state = merge(deepcopy(self.model, without_graphs(self.model))).state_dict()
        save_tensors(path, {k: v.detach().cpu().contiguous() for k, v in state.items()})
        return sha256(path)

    def _write_report(self) -> None:
        try:
            page = write_report(self.folder, warn=lambda told: warnings.warn(told, stacklevel=5))
        except Exception as error:  # the run is recorded, whatever is wrong with its picture
            warnings.warn(
                f"no report was written: {error}; `dynarank report {self.folder}` writes it",
                UserWarning,
                stacklevel=3,
            )
        else:
            self._say(f"report: {page}")

    def _write(self, record: Record) -> None:
        self._output.write(record)

    # Epochs and steps.

    @property
    def _total(self) -> int | None:
        return None if self.ranks is None else self.ranks.total_steps

    def _make_settings(self) -> dict[str, Any]:
        """What distinguishes this run from others."""
        ranks, now = self.ranks, current_plan(self.model)
        return {
            "name": self.name,
            "schedule": _forms_name(now) if ranks is None else schedule_name(ranks.schedule),
            "identity": None if ranks is None else schedule_identity(ranks.schedule),
            "seed": self.seed,
            "total_steps": self._total,
            "metric": self.metric.name,
            "layers": list(now if ranks is None else ranks.layers),
        }

    def _length_of_epoch(self, given: int | None) -> int | None:
        if given is not None:
            return check_count("steps_per_epoch", given)
        if self._epochs and self._total and self._total % self._epochs == 0:
            return self._total // self._epochs
        return None

    def _expected_epochs(self) -> int:
        if self._per_epoch is None or self._total is None:
            return 1
        return math.ceil(self._total / self._per_epoch)

    def _epoch_at(self, step: int) -> float:
        return step / self._length

    @property
    def _length(self) -> int:
        """The optimizer steps of an epoch; while that is not known, of the run."""
        return self._per_epoch or self._total or 1

    def _relabel(self, epochs: int) -> None:
        """Rewrite the records with the number of epochs and their length, now that it is known."""

        def change(record: Record) -> Record:
            if isinstance(record, RunRecord):
                length = {"epochs": epochs, "steps_per_epoch": self._per_epoch}
                return record.model_copy(update=length | self._by_hand())
            if isinstance(record, SummaryRecord):
                return record
            return record.model_copy(update={"epoch": self._epoch_at(record.step)})

        self._output.relabel(change)
        self._phases = [
            p.model_copy(update={"epoch": self._epoch_at(p.step)}) for p in self._phases
        ]

    def _by_hand(self) -> dict[str, str]:
        """What to call the schedule of forms that changed without a rank scheduler."""
        kinds = {tuple(sorted(phase.forms.items())) for phase in self._phases}
        return {"schedule": "by hand"} if self.ranks is None and len(kinds) > 1 else {}

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise ValueError(f"{what}() after close(): the recording in {self.folder} has ended")

    def _check_share(self, results: Mapping[str, float | None]) -> None:
        """Say once that scores shown in percent are shares."""
        for name in ("test_score", "train_score"):
            value = results[name]
            if self.metric.percent and value is not None and value > _MOST_SHARE:
                if not self._told_of_shares:
                    self._told_of_shares = True
                    warnings.warn(
                        f"{name}={value:g} in {self.metric.name}, which is a share of 1 and will "
                        f"be shown as {value:.0%}: give {value / 100:g}, or another metric=",
                        UserWarning,
                        stacklevel=3,
                    )

    def _check_step(self, given: int | None, at: int) -> None:
        if given is None or self._told_of_steps or abs(given - at) <= 1:
            return
        self._told_of_steps = True
        warnings.warn(
            f"log(step={given}) at optimizer step {at:,}: records count optimizer steps over the "
            "whole run; leave step out",
            UserWarning,
            stacklevel=3,
        )


def _subject(
    ranks: RankScheduler | None, model: nn.Module | None, optimizer: Optimizers
) -> tuple[nn.Module, list[Optimizer]]:
    """The model that is trained, and its optimizers."""
    if ranks is not None:
        if model is not None or optimizer is not None:
            raise ValueError(
                "a rank scheduler knows its model and optimizer; leave model and optimizer out"
            )
        if not isinstance(ranks, RankScheduler):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ranks is a RankScheduler, got {type(ranks).__name__}")
        return ranks.model, ranks.optimizer
    if model is None or optimizer is None:
        raise ValueError(
            "a recorder counts the steps of a rank scheduler or of an optimizer; give ranks, or "
            "model= and optimizer="
        )
    return unwrapped(model), as_list(optimizer)


def _started_at(start: int, ranks: RankScheduler | None) -> int:
    """The optimizer steps done before the recorder was made, without a rank scheduler."""
    if start and ranks is not None:
        raise ValueError(f"a rank scheduler knows its steps; leave start={start} out")
    return check_count("start", start) if start else 0


def _shapes_of(model: nn.Module) -> tuple[Any, ...]:
    """What changes with the cost: the shapes of the parameters, and which are trained."""
    return tuple((p.shape, p.requires_grad) for p in model.parameters())


def _metric(metric: str | Metric) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if metric not in _METRICS:
        raise ValueError(
            f"unknown metric {metric!r}; known: {', '.join(_METRICS)}; give any other as "
            "dynarank.records.Metric(name=..., higher_is_better=..., percent=...)"
        )
    higher, percent = _METRICS[metric]
    return Metric(name=metric, higher_is_better=higher, percent=percent)


def _forms_name(plan: Plan) -> str:
    """The name of a run whose forms do not change: that of most layers with factors, if any."""
    names = Counter(form_name(form) for form in plan.values())
    del names["full-rank"]
    return names.most_common(1)[0][0] if names else "full-rank"


def _precision(model: nn.Module, device: torch.device) -> str:
    """The dtype of the forward pass: that of autocast, within it."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    else:
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return _PRECISION.get(dtype, str(dtype).removeprefix("torch."))


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
