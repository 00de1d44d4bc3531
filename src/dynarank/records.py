"""What a run writes down: one JSON object per line, typed, appended as it happens.

A run folder holds ``config.json`` (the recipe as it ran), ``records.jsonl`` (this module),
``model.safetensors`` (the final weights, merged) and ``report.html``. A folder of runs, one per
schedule, is a comparison. Times are fractional epochs, so that runs of different batch sizes and
lengths share an axis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

__all__ = [
    "ChangeRecord",
    "EpochRecord",
    "LayerSpectrum",
    "PhaseRecord",
    "Record",
    "RecordWriter",
    "Run",
    "RunRecord",
    "SpectrumRecord",
    "SummaryRecord",
    "find_runs",
    "read_run",
]


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RunRecord(_Line):
    """The first line: what is run, on what."""

    kind: Literal["run"] = "run"
    recipe: str
    schedule: str
    seed: int
    epochs: int
    steps_per_epoch: int
    device: str
    hardware: str
    precision: str
    versions: dict[str, str]
    commit: str | None = None
    started: str


class PhaseRecord(_Line):
    """The cost of a step between two changes of plan. FLOPs are of one training step of one batch.

    ``predicted_flops`` comes from the cost model; ``counted_flops`` is what FlopCounterMode saw
    the phase's first step execute (None where it was not counted). ``memory_bytes`` is the phase's
    peak: on CUDA the allocator's, on a CPU the tensors alive at the end of a forward pass
    (parameters, gradients, optimizer state, saved activations).
    """

    kind: Literal["phase"] = "phase"
    epoch: float
    step: int
    forms: dict[str, int]
    trainable_parameters: int
    total_parameters: int
    predicted_flops: int
    counted_flops: int | None = None
    relative_flops: float
    memory_bytes: int | None = None


class ChangeRecord(_Line):
    """One layer changed form; ``error`` is the relative Frobenius error of its weight."""

    kind: Literal["change"] = "change"
    epoch: float
    step: int
    path: str
    before: dict[str, Any]
    after: dict[str, Any]
    error: float


class EpochRecord(_Line):
    """Training and test figures at the end of an epoch; seconds are of training alone."""

    kind: Literal["epoch"] = "epoch"
    epoch: float
    step: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    trainable_parameters: int
    relative_flops: float
    seconds: float


class LayerSpectrum(_Line):
    """Rank health of one layer's effective weight; ``spectral_ratio`` is lambda at ``rank``."""

    effective_rank: float
    stable_rank: float
    spectral_ratio: float
    rank: int
    full_rank: int


class SpectrumRecord(_Line):
    """The rank health of every watched layer at one moment."""

    kind: Literal["spectrum"] = "spectrum"
    epoch: float
    step: int
    layers: dict[str, LayerSpectrum]


class SummaryRecord(_Line):
    """The last line: the figures of the table.

    Means are over steps; ``relative_flops`` is the whole run's training FLOPs over those of the
    same run at full rank.
    """

    kind: Literal["summary"] = "summary"
    test_accuracy: float
    best_test_accuracy: float
    trainable_parameters_peak: int
    trainable_parameters_mean: float
    training_flops: float
    relative_flops: float
    memory_bytes: int
    train_seconds: float
    wall_seconds: float


Record = Annotated[
    RunRecord | PhaseRecord | ChangeRecord | EpochRecord | SpectrumRecord | SummaryRecord,
    Field(discriminator="kind"),
]
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)
_R = TypeVar("_R", bound=_Line)


class RecordWriter:
    """Appends records to a run's ``records.jsonl``, flushed line by line."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "records.jsonl").open("w", encoding="utf-8")

    def write(self, record: _Line) -> None:
        """Append one record."""
        self._file.write(record.model_dump_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Run:
    """A run read back: its folder, its configuration and its records by kind."""

    def __init__(self, folder: Path, config: dict[str, Any], records: list[Record]) -> None:
        self.folder = folder
        self.config = config
        self.records = records

    def all(self, kind: type[_R]) -> list[_R]:
        """All records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def header(self) -> RunRecord:
        """What was run."""
        return self.all(RunRecord)[0]

    @property
    def summary(self) -> SummaryRecord | None:
        """The figures of the table; None while the run is unfinished."""
        return next(iter(self.all(SummaryRecord)), None)


def find_runs(folder: Path) -> list[Path]:
    """The run folders at or below ``folder``, oldest first by their first record."""
    if not folder.exists():
        raise FileNotFoundError(f"no run folder at {folder}")
    found = sorted(path.parent for path in folder.rglob("records.jsonl"))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: no records.jsonl in it or below; "
            "a run folder is what `dynarank train` writes"
        )
    return sorted(found, key=lambda run: read_run(run).header.started)


def read_run(folder: Path) -> Run:
    """Read one run folder; a last line cut short by an interrupted run is left out.

    Raises:
        FileNotFoundError: no records.jsonl there.
        ValueError: a line is not a record of a known kind, or the first is not a run record.
    """
    path = folder / "records.jsonl"
    *lines, tail = path.read_bytes().split(b"\n")  # a whole line ends with a newline
    records = list(_parse(path, lines))
    with suppress(ValidationError):
        records += [_RECORD.validate_json(tail)]
    if not records or not isinstance(records[0], RunRecord):
        raise ValueError(f"{path} does not begin with a run record")
    config = folder / "config.json"
    text = config.read_text(encoding="utf-8") if config.exists() else "{}"
    return Run(folder, json.loads(text), records)


def _parse(path: Path, lines: list[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        try:
            yield _RECORD.validate_json(line)
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from error
