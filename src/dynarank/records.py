"""Run records: typed JSON lines, appended to ``records.jsonl`` while a run trains.

A run folder holds ``config.json`` (the recipe as it ran), ``records.jsonl`` (this module),
``model.safetensors`` (the final weights, merged), ``factors.safetensors`` if layers end low-rank,
and ``report.html``. A folder of runs, one per schedule, is a comparison. Times are fractional
epochs, so that runs of different batch sizes and lengths share an axis.

Each line ends with a checksum. What is damaged, or of a newer version, is left out and said so;
the rest of the run is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dynarank.files.atomic import write_bytes
from dynarank.files.json_data import parse_json
from dynarank.files.printable import printable
from dynarank.files.reading import DamagedFileError, read_bytes, reading
from dynarank.files.sealed_json import sealed, unsealed

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
    "StepRecord",
    "SummaryRecord",
    "find_runs",
    "read_run",
    "read_runs",
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
    """The first record of a run: what was trained, on which device, with which versions.

    A run recorded in a loop of one's own may not say its seed. ``processes`` trained together when
    it began, and averaged their gradients by ``backend``.
    """

    kind: Literal["run"] = "run"
    recipe: str
    schedule: str
    seed: int | None
    epochs: int
    steps_per_epoch: int
    device: str
    hardware: str
    precision: str
    metric: Metric = Metric()
    versions: dict[str, str]
    commit: str | None = None
    started: str
    processes: int = 1
    backend: str | None = None


class PhaseRecord(_Line):
    """The cost of a training step in one phase, between two changes of the plan.

    ``predicted_flops`` comes from the cost model; ``counted_flops`` is what FlopCounterMode counted
    in the phase's first step (None if not counted). ``memory_bytes`` is the phase's peak: on CUDA
    the allocator's, on a CPU the tensors alive at the end of a forward pass (parameters, gradients,
    optimizer state, saved activations); of several ``processes``, the largest.
    ``all_reduced_bytes_per_step`` is what each of them gives to be averaged: the gradients of the
    trainable parameters.
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
    processes: int = 1
    all_reduced_bytes_per_step: int = 0


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


class StepRecord(_Line):
    """What a loop of one's own logs after an optimizer step; ``values`` by the user's names."""

    kind: Literal["step"] = "step"
    epoch: float
    step: int
    train_loss: float | None = None
    learning_rate: float | None = None
    values: dict[str, float] = Field(default_factory=dict[str, float])


class EpochRecord(_Line):
    """Training and test results at the end of an epoch; ``seconds`` is training time alone.

    Scores are in the run's metric; ``scores`` holds other metrics customary for the task. A run
    recorded in a loop of one's own has the losses and scores that were logged.
    """

    kind: Literal["epoch"] = "epoch"
    epoch: float
    step: int
    learning_rate: float
    train_loss: float | None
    train_score: float | None = None
    test_loss: float | None
    test_score: float | None
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
    the same run at full rank. ``all_reduced_bytes`` is the sum over the steps for each process.
    ``model_sha256`` is the digest of ``model.safetensors``.
    """

    kind: Literal["summary"] = "summary"
    test_score: float | None
    best_test_score: float | None
    scores: dict[str, float] = Field(default_factory=dict[str, float])
    trainable_parameters_peak: int
    trainable_parameters_mean: float
    training_flops: float
    relative_flops: float
    memory_bytes: int
    all_reduced_bytes: int = 0
    train_seconds: float
    wall_seconds: float
    model_sha256: str | None = None


Record = Annotated[
    RunRecord
    | PhaseRecord
    | ChangeRecord
    | DecisionRecord
    | StepRecord
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
_MAX_LINE = 64 << 20  # bytes; the heat-maps of 3,000 layers take that much
_MAX_CONFIG = 64 << 20  # bytes
_SHOWN = 3  # lines that a message names


class RecordWriter:
    """Writes records to a run's ``records.jsonl``, each at once.

    Args:
        folder: the folder of the run.
        position: where to go on, from :meth:`position`: what was written after it is cut off.
            None: the file begins again, with its first record.

    Raises:
        DamagedFileError: the records before the position are not those that were written.
    """

    def __init__(self, folder: Path, position: Mapping[str, Any] | None = None) -> None:
        self._path = folder / "records.jsonl"
        self._file: FileIO | None = None
        self._digest, self._bytes = hashlib.sha256(), 0
        if position is not None:
            if not self._path.exists():
                raise _not_as_written(self._path, "it is missing")
            self._go_on(self._open(), position)

    def write(self, record: _Line) -> None:
        """Append one record: the whole line, or nothing of it."""
        line = sealed(record.model_dump_json()).encode() + b"\n"
        if self._file is None:
            write_bytes(self._path, line)  # at no time is there a file without its header
            self._open().seek(len(line))
        else:
            self._append(self._file, line)
        self._digest.update(line)
        self._bytes += len(line)

    def rewrite(self, records: Iterable[_Line]) -> None:
        """Put these records in place of all that is in the file, which changes all at once."""
        lines = b"".join(sealed(one.model_dump_json()).encode() + b"\n" for one in records)
        self.close()
        write_bytes(self._path, lines)
        self._open().seek(len(lines))
        self._digest, self._bytes = hashlib.sha256(lines), len(lines)

    def position(self) -> dict[str, Any]:
        """The end of the records so far, which are now on the device, as plain data."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _open(self) -> FileIO:
        self._file = self._path.open("r+b", buffering=0)
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
            raise _not_as_written(
                self._path, f"its first {position['bytes']:,} bytes are not those that were written"
            )
        file.truncate(self._bytes)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _not_as_written(path: Path, problem: str) -> DamagedFileError:
    way_out = "put the file back as it was; the weights are in the folder's checkpoints"
    return DamagedFileError(path, problem, way_out)


class Run:
    """A run read from its folder: configuration and records.

    Args:
        folder: its folder.
        config: the content of ``config.json``.
        records: the records that can be read.
        damage: what cannot be read, one sentence for each file.
        notes: what else a reader should know: a last line that is not complete, records and fields
            of a newer version.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        records: list[Record],
        damage: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.config = config
        self.records = records
        self.damage = tuple(damage)
        self.notes = tuple(notes)

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
        first, _ = _parsed(next(_lines(run / "records.jsonl"), b""))
    except (OSError, ValueError):
        return "~"
    return first.started if isinstance(first, RunRecord) else "~"


def read_run(folder: Path) -> Run:
    """Read one run folder, as far as it can be read; ``damage`` and ``notes`` say what is missing.

    Raises:
        FileNotFoundError: there is no records.jsonl.
        DamagedFileError: there is no run record to begin with, or the file cannot be read at all.
    """
    path = folder / "records.jsonl"
    lines = _Lines()
    for number, line in enumerate(_lines(path), start=1):
        lines.take(number, line)
    if not lines.records or not isinstance(lines.records[0], RunRecord):
        told = [*lines.damage(), *lines.notes()] or (["it is empty"] if not lines.records else [])
        why = f" ({'; '.join(told)})" if told else ""
        raise DamagedFileError(path, f"it does not begin with a run record{why}")
    config, damage = _config(folder / "config.json")
    return Run(folder, config, lines.records, [*lines.damage(), *damage], lines.notes())


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Read all runs at or below ``folder``, oldest first; one that cannot be read ends no other.

    Returns:
        the runs, and why each of the others cannot be read.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: none of them can be read.
    """
    runs: list[Run] = []
    unreadable: list[str] = []
    for place in find_runs(folder):
        try:
            runs.append(read_run(place))
        except (OSError, DamagedFileError) as error:
            unreadable.append(f"a run is not shown: {printable(str(error), 500)}.")
    if not runs:
        raise DamagedFileError(folder, f"none of its runs can be ({unreadable[0]})")
    return runs, unreadable


class _Lines:
    """The records of a file, and what is wrong with its other lines."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._damaged, self._newer, self._torn = _Some(), _Some(), False

    def take(self, number: int, line: bytes) -> None:
        """Parse a line, which ends with a newline unless it is the last and not complete."""
        try:
            record, newer = _parsed(line.removesuffix(b"\n"))
        except ValueError as error:
            if line.endswith(b"\n") or len(line) > _MAX_LINE:
                self._damaged.add(number, str(error))
            else:
                self._torn = True
            return
        if record is not None:
            self.records.append(record)
        if newer:
            self._newer.add(number, newer)

    def damage(self) -> list[str]:
        """What is lost, in one sentence."""
        told = self._damaged.told()
        return [f"records.jsonl, {told} (left out)"] if told else []

    def notes(self) -> list[str]:
        """What else a reader should know."""
        torn = ["the last line of records.jsonl is not complete (left out)"] if self._torn else []
        told = self._newer.told()
        return [*torn, f"records.jsonl, {told} (of a newer version, left out)"] if told else torn


class _Some:
    """Lines and what is said of them: the first few, and the number of the others."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._more = 0

    def add(self, number: int, why: str) -> None:
        if len(self._first) < _SHOWN:
            self._first.append(f"line {number:,}: {why}")
        else:
            self._more += 1

    def told(self) -> str:
        more = [f"and {self._more:,} more lines"] if self._more else []
        return "; ".join([*self._first, *more])


def _lines(path: Path) -> Iterator[bytes]:
    """The lines with their newlines; of one that is too long, the beginning."""
    with reading(path) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
        while line := file.readline(_MAX_LINE + 1):
            yield line
            while len(line) > _MAX_LINE and not line.endswith(b"\n"):
                line = file.readline(_MAX_LINE + 1) or b"\n"


def _parsed(line: bytes) -> tuple[Record | None, str]:
    """The record in a line, or None for one of an unknown kind; and what a newer version added.

    Raises:
        ValueError: it is damaged; the message is short, whatever the line holds.
    """
    if len(line) > _MAX_LINE:
        raise ValueError(f"it is longer than {_MAX_LINE:,} bytes")
    text = unsealed(line)
    try:
        return _RECORD.validate_json(text), ""
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
    kinds = {one["type"] for one in errors}
    if kinds == {"union_tag_invalid"}:
        return None, f"kind {printable(repr(errors[0].get('ctx', {}).get('tag')), 60)}"
    if kinds != {"extra_forbidden"}:
        where = ".".join(map(str, errors[0]["loc"]))
        raise ValueError(
            f"not a record: {printable(f'{where}: ' if where else '', 100)}"
            f"{printable(errors[0]['msg'])}"
        )
    data = json.loads(text)
    for one in errors:
        _remove(data, one["loc"][1:])  # the first is the kind
    unknown = printable(", ".join(dict.fromkeys(str(one["loc"][-1]) for one in errors)), 100)
    return _RECORD.validate_python(data), f"unknown field {unknown}"


def _remove(data: Any, place: Sequence[int | str]) -> None:
    for key in place[:-1]:
        data = data[key]
    del data[place[-1]]


def _config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration, and what is wrong with it."""
    try:
        data = parse_json(unsealed(read_bytes(path, _MAX_CONFIG)), path.name, allow_nan=True)
    except FileNotFoundError:
        return {}, []
    except ValueError as error:
        return {}, [f"config.json cannot be read: {getattr(error, 'problem', error)}"]
    if not isinstance(data, dict):
        return {}, ["config.json cannot be read: it is not a JSON object"]
    return data, []
