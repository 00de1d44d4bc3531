"""Run records: typed JSON lines, appended to ``records.jsonl`` while a run trains.

A run folder holds ``config.json`` (the recipe as it ran), ``records.jsonl`` (this module),
``model.safetensors`` (the final weights, merged) and ``report.html``. A folder of runs, one per
schedule, is a comparison. Times are fractional epochs, so that runs of different batch sizes and
lengths share an axis.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dynarank.files.atomic import write_bytes
from dynarank.files.reading import DamagedFileError

__all__ = [
    "ChangeRecord",
    "DecisionRecord",
    "EpochRecord",
    "HeatmapRecord",
    "LayerSpectrum",
    "Metric",
    "NoiseRecord",
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


class Metric(_Line):
    """The metric of a run: its name, whether higher is better, whether it is shown in percent.

    Example:
        >>> Metric(name="perplexity", higher_is_better=False, percent=False).name
        'perplexity'
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    percent: bool = True


class RunRecord(_Line):
    """The first record of a run: what was trained, on which device, with which versions."""

    kind: Literal["run"] = "run"
    recipe: str
    schedule: str
    seed: int
    epochs: int
    steps_per_epoch: int
    device: str
    hardware: str
    precision: str
    metric: Metric = Metric()
    versions: dict[str, str]
    commit: str | None = None
    started: str


class PhaseRecord(_Line):
    """The cost of a training step in one phase, between two changes of the plan.

    ``predicted_flops`` comes from the cost model; ``counted_flops`` is what FlopCounterMode counted
    in the phase's first step (None if not counted). ``memory_bytes`` is the phase's peak: on CUDA
    the allocator's, on a CPU the tensors alive at the end of a forward pass (parameters, gradients,
    optimizer state, saved activations).
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
    """A layer's change of form; the errors are those of :class:`dynarank.forms.Change`."""

    kind: Literal["change"] = "change"
    epoch: float
    step: int
    path: str
    before: dict[str, Any]
    after: dict[str, Any]
    error: float
    update_error: float | None = None


class DecisionRecord(_Line):
    """A schedule's decision to change a layer's form: the reason, and the readings it used."""

    kind: Literal["decision"] = "decision"
    epoch: float
    step: int
    path: str
    form: dict[str, Any]
    reason: str
    readings: dict[str, float]


class EpochRecord(_Line):
    """Training and test results at the end of an epoch; ``seconds`` is training time alone.

    Scores are in the run's metric; ``scores`` holds other metrics customary for the task.
    """

    kind: Literal["epoch"] = "epoch"
    epoch: float
    step: int
    learning_rate: float
    train_loss: float
    train_score: float | None = None
    test_loss: float
    test_score: float
    scores: dict[str, float] = Field(default_factory=dict[str, float])
    trainable_parameters: int
    relative_flops: float
    seconds: float


class LayerSpectrum(_Line):
    """Rank metrics of one layer's effective weight; ``spectral_ratio`` is lambda at ``rank``.

    ``update_rank`` is the effective rank of the change that training has made to the weight, None
    if not measured; ``values`` are singular values, largest first, at most 64, evenly spaced from
    the first to the last; empty if not kept.
    """

    effective_rank: float
    stable_rank: float
    spectral_ratio: float
    rank: int
    full_rank: int
    energy_rank: int | None = None
    update_rank: float | None = None
    values: tuple[float, ...] = ()


class SpectrumRecord(_Line):
    """The rank metrics of every monitored layer at one step."""

    kind: Literal["spectrum"] = "spectrum"
    epoch: float
    step: int
    layers: dict[str, LayerSpectrum]


class HeatmapRecord(_Line):
    """Heat-maps of weights at one step: for each layer, rows of mean absolute values of blocks.

    The weight as a matrix, out x (in * kernel positions), is divided into at most 32 x 32 blocks.
    """

    kind: Literal["heatmap"] = "heatmap"
    epoch: float
    step: int
    layers: dict[str, tuple[tuple[float, ...], ...]]


class NoiseRecord(_Line):
    """The gradient noise scale, tr(covariance) / |gradient|^2, in samples. Experimental."""

    kind: Literal["noise"] = "noise"
    epoch: float
    step: int
    noise_scale: float
    layers: dict[str, float] = Field(default_factory=dict[str, float])


class SummaryRecord(_Line):
    """The last record of a run: final scores and total cost.

    Means are over steps; ``relative_flops`` is the training FLOPs of the whole run over those of
    the same run at full rank.
    """

    kind: Literal["summary"] = "summary"
    test_score: float
    best_test_score: float
    scores: dict[str, float] = Field(default_factory=dict[str, float])
    trainable_parameters_peak: int
    trainable_parameters_mean: float
    training_flops: float
    relative_flops: float
    memory_bytes: int
    train_seconds: float
    wall_seconds: float


Record = Annotated[
    RunRecord
    | PhaseRecord
    | ChangeRecord
    | DecisionRecord
    | EpochRecord
    | SpectrumRecord
    | HeatmapRecord
    | NoiseRecord
    | SummaryRecord,
    Field(discriminator="kind"),
]
_RECORD: TypeAdapter[Record] = TypeAdapter(Record)
_R = TypeVar("_R", bound=_Line)
_PASSED_OVER = re.compile(r"^\.|\.aside(-\d+)?$")  # folders
_HEADER_BYTES = 1 << 20  # more than any header has


class RecordWriter:
    """Writes records to a run's ``records.jsonl``, each at once.

    Args:
        folder: the folder of the run.
        position: where to go on, from :meth:`position`: what was written after it is cut off.
            None: the file is begun anew, with its first record.

    Raises:
        DamagedFileError: the records before the position are not those that were written.
    """

    def __init__(self, folder: Path, position: Mapping[str, Any] | None = None) -> None:
        self._path = folder / "records.jsonl"
        self._file: FileIO | None = None
        self._digest, self._bytes = hashlib.sha256(), 0
        if position is not None:
            self._go_on(self._open(), position)

    def write(self, record: _Line) -> None:
        """Append one record: the whole line, or nothing of it."""
        line = record.model_dump_json().encode() + b"\n"
        if self._file is None:
            write_bytes(self._path, line)  # at no time is there a file without its header
            self._open().seek(len(line))
        else:
            self._append(self._file, line)
        self._digest.update(line)
        self._bytes += len(line)

    def position(self) -> dict[str, Any]:
        """The end of the records so far, which are now on the device, as plain data."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _open(self) -> FileIO:
        self._file = cast(FileIO, self._path.open("r+b", buffering=0))
        return self._file

    def _append(self, file: FileIO, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(self._bytes)
                file.seek(self._bytes)
            raise

    def _go_on(self, file: FileIO, position: Mapping[str, Any]) -> None:
        kept = file.read(position["bytes"])
        self._digest.update(kept)
        self._bytes = len(kept)
        if self.position() != dict(position):
            self.close()
            raise DamagedFileError(
                self._path,
                f"its first {position['bytes']:,} bytes are not those that were written",
                "put the file back as it was; the weights are in the folder's checkpoints",
            )
        file.truncate(self._bytes)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Run:
    """A run read from its folder: configuration and records."""

    def __init__(self, folder: Path, config: dict[str, Any], records: list[Record]) -> None:
        self.folder = folder
        self.config = config
        self.records = records

    def all(self, kind: type[_R]) -> list[_R]:
        """All records of one kind, in order."""
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def header(self) -> RunRecord:
        """The run record."""
        return self.all(RunRecord)[0]

    @property
    def summary(self) -> SummaryRecord | None:
        """The summary record; None while the run is unfinished."""
        return next(iter(self.all(SummaryRecord)), None)


def find_runs(folder: Path) -> list[Path]:
    """Find the run folders at or below ``folder``, oldest first; one without a header comes last.

    Runs that were moved aside and what lies in hidden folders are passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    if not folder.exists():
        raise FileNotFoundError(f"no run folder at {folder}")
    places = [path.parent for path in folder.rglob("records.jsonl")]
    names = {place: place.relative_to(folder).parts for place in places}
    found = [place for place in places if not any(map(_PASSED_OVER.search, names[place]))]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: there is no records.jsonl in it or below; "
            "pass a run folder written by `dynarank train`"
        )
    return sorted(found, key=lambda run: (_started(run), run))


def _started(run: Path) -> str:
    """When a run started, as its header says it; after all others if it has none."""
    try:
        with (run / "records.jsonl").open("rb") as file:
            return RunRecord.model_validate_json(file.readline(_HEADER_BYTES)).started
    except (OSError, ValidationError):
        return "~"


def read_run(folder: Path) -> Run:
    """Read one run folder; a last line truncated by an interrupted run is ignored.

    Raises:
        FileNotFoundError: there is no records.jsonl.
        ValueError: a line is not a known record, or the first is not a run record.
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
