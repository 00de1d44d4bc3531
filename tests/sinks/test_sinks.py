"""Logging backends: the same names in each, written by their real APIs; failures stop no run."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dynarank.records import (
    ChangeRecord,
    DecisionRecord,
    EpochRecord,
    HeatmapRecord,
    LayerSpectrum,
    NoiseRecord,
    PhaseRecord,
    Record,
    RecordWriter,
    RunRecord,
    SpectrumRecord,
    SummaryRecord,
    read_run,
)
from dynarank.sinks import BACKENDS, open_sinks
from dynarank.sinks.extras import install_command
from dynarank.sinks.scalars import event_of, scalars_of

HEADER = RunRecord(
    recipe="digits", schedule="dynamic-rank", seed=3, epochs=2, steps_per_epoch=10, device="cpu",
    hardware="a machine", precision="fp32", versions={"torch": "2"}, started="2026-01-01T00:00:00",
)  # fmt: skip
LOW, FULL = {"form": "low-rank", "rank": 8}, {"form": "full-rank"}
SPECTRUM = LayerSpectrum(
    effective_rank=5.5, stable_rank=2.5, spectral_ratio=0.75, rank=8, full_rank=16, energy_rank=7,
    update_rank=3.5, values=(2.0, 1.0),
)  # fmt: skip
RECORDS: list[Record] = [
    HEADER,
    PhaseRecord(
        epoch=0.1, step=1, forms={"low-rank": 2}, trainable_parameters=70, total_parameters=80,
        predicted_flops=100, relative_flops=0.25, memory_bytes=4096,
    ),
    SpectrumRecord(epoch=1.0, step=10, layers={"a.b": SPECTRUM, "c[0]": SPECTRUM}),
    EpochRecord(
        epoch=1.0, step=10, learning_rate=0.1, train_loss=0.5, test_loss=0.75, test_score=0.875,
        scores={"f1": 0.5}, trainable_parameters=70, relative_flops=0.25, seconds=1.5,
    ),
    DecisionRecord(
        epoch=1.0, step=10, path="a.b", form=FULL, reason="saturated", readings={"effective": 5.5}
    ),
    ChangeRecord(epoch=1.0, step=10, path="a.b", before=LOW, after=FULL, error=1e-7),
    HeatmapRecord(epoch=1.0, step=10, layers={"a.b": ((1.0,),)}),
    NoiseRecord(epoch=1.5, step=15, noise_scale=64.0, layers={"a.b": math.inf}),
    SummaryRecord(
        test_score=0.9, best_test_score=0.95, trainable_parameters_peak=80,
        trainable_parameters_mean=75.0, training_flops=1e9, relative_flops=0.5, memory_bytes=4096,
        train_seconds=3.0, wall_seconds=4.0,
    ),
]  # fmt: skip
EXPECTED = {  # (name, step): value
    ("cost/relative_flops", 1): 0.25,
    ("cost/memory_bytes", 1): 4096,
    ("forms/low-rank", 1): 2,
    ("rank/a.b/effective", 10): 5.5,
    ("rank/a.b/stable", 10): 2.5,
    ("rank/a.b/energy", 10): 7,
    ("rank/a.b/update", 10): 3.5,
    ("rank/a.b/lambda", 10): 0.75,
    ("rank/a.b/low", 10): 8,
    ("train/loss", 10): 0.5,
    ("train/learning_rate", 10): 0.1,
    ("test/loss", 10): 0.75,
    ("test/score", 10): 0.875,
    ("test/f1", 10): 0.5,
    ("noise/model", 15): 64,
    ("noise/layers/a.b", 15): math.inf,
    ("summary/best_test_score", 15): 0.95,
    ("summary/relative_flops", 15): 0.5,
}


def write_all(names: list[str], folder: Path, records: list[Record] = RECORDS) -> None:
    takers: list[Any] = [RecordWriter(folder), *open_sinks(names, folder)]
    for record in records:
        for taker in takers:
            taker.write(record)
    for taker in takers:
        taker.close()


def installed(name: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not there, reason=f"{name} is not installed")


def test_the_scheme_of_names() -> None:
    found = {}
    step = 0
    for record in RECORDS:
        step = getattr(record, "step", step)
        for name, value in scalars_of(record).items():
            found[name, step] = value
    assert {key: found[key] for key in EXPECTED} == EXPECTED
    assert ("train/score", 10) not in found  # was not known
    assert {name.split("/")[0] for name, _ in found} == {
        "cost", "forms", "noise", "rank", "summary", "test", "train",
    }  # fmt: skip


def test_events_are_words() -> None:
    events = [event for record in RECORDS if (event := event_of(record))]
    assert events == [
        ("decisions", "a.b: to FullRank(): saturated (effective 5.5)"),
        (
            "changes",
            "a.b: LowRank(rank=8, decomposition='svd') -> FullRank(), relative error 1.0e-07",
        ),
    ]


@installed("tensorboard")
def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    write_all(["tensorboard"], tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    for (name, step), value in EXPECTED.items():
        (found,) = [event for event in read.Scalars(name) if event.step == step]
        assert found.value == pytest.approx(value)
    (text,) = read.Tensors("changes/text_summary")
    assert text.step == 10 and b"-> FullRank()" in text.tensor_proto.string_val[0]
    assert len(read.Tensors("run/text_summary")) == 1


@installed("wandb")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_wandb_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (sink,) = open_sinks(["wandb"], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a failure would be one
        for record in RECORDS:
            sink.write(record)
        run: Any = sink._sink._sink._run  # type: ignore[attr-defined]
        summary = {name: run.summary.get(name) for name, _ in EXPECTED}
        assert summary["test/score"] == 0.875 and summary["test/f1"] == 0.5
        assert run.config["schedule"] == "dynamic-rank" and run.project == "dynarank"
        sink.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@installed("mlflow")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_mlflow_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_all(["mlflow"], tmp_path, RECORDS if whole else RECORDS[:-1])
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("dynarank")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "digits dynamic-rank seed 3"
    assert run.info.status == ("FINISHED" if whole else "FAILED")
    assert run.data.params["seed"] == "3"
    for (name, step), value in EXPECTED.items():
        if whole or not name.startswith("summary"):
            history = client.get_metric_history(run.info.run_id, name)
            assert [m.value for m in history if m.step == step] == [value], name
    assert client.get_metric_history(run.info.run_id, "rank/c_0_/effective")


class Failing:
    """A backend that fails at its third record, and when closed."""

    def __init__(self, folder: Path, header: RunRecord) -> None:
        self.written: list[Record] = []

    def write(self, record: Record) -> None:
        if len(self.written) > 1:
            raise ConnectionError("the backend is gone")
        self.written.append(record)

    def close(self) -> None:
        raise OSError("still gone")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Registers a backend, as "failing"."""

    def make_known(opens: Any) -> None:
        monkeypatch.setitem(BACKENDS, "failing", opens)
        monkeypatch.setattr("dynarank.sinks.import_extra", lambda module, extra, user: None)

    return make_known


def test_a_failing_sink_is_warned_of_once_and_the_others_go_on(
    tmp_path: Path, backend: Callable[[Any], None]
) -> None:
    backend(Failing)
    with pytest.warns(RuntimeWarning, match="'failing' failed .* the backend is gone") as caught:
        write_all(["failing"], tmp_path)
    assert len(caught) == 1
    assert read_run(tmp_path).records == RECORDS


def test_a_sink_that_fails_only_at_its_end_is_warned_of(
    tmp_path: Path, backend: Callable[[Any], None]
) -> None:
    backend(Failing)
    with pytest.warns(RuntimeWarning, match="still gone"):
        write_all(["failing"], tmp_path, RECORDS[:2])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_is_not_installed_is_an_error_that_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(module: str) -> Any:
        raise ImportError(module)

    monkeypatch.setattr("importlib.import_module", nothing)
    with pytest.raises(
        ImportError,
        match=re.escape(
            f"'{name}' needs `{name}`, which is not installed: {install_command(name)}"
        ),
    ):
        open_sinks([name], tmp_path)


def test_a_backend_that_cannot_be_opened_is_warned_of(
    tmp_path: Path, backend: Callable[[Any], None]
) -> None:
    def refuse(folder: Path, header: RunRecord) -> Any:
        raise RuntimeError("no account")

    backend(refuse)
    with pytest.warns(RuntimeWarning, match="no account") as caught:
        write_all(["failing"], tmp_path)
    assert len(caught) == 1
    assert read_run(tmp_path).records == RECORDS


@pytest.mark.parametrize(
    ("names", "message"),
    [(["tensorbord"], "known: tensorboard, wandb, mlflow; did you mean 'tensorboard'"),
     (["tensorboard", "tensorboard"], "named twice")],
)  # fmt: skip
def test_names_that_cannot_be_are_errors(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_sinks(names, tmp_path)


def test_a_change_says_how_much_of_an_update_rounding_took() -> None:
    change = dict(epoch=1.0, step=10, path="a", before=LOW, after=FULL, error=4e-4)
    texts = [event_of(ChangeRecord(**change, update_error=e))[1] for e in (None, 1e-5, 0.84)]  # type: ignore[arg-type, index]
    assert [text.partition("error ")[2] for text in texts] == [
        "4.0e-04", "4.0e-04", "4.0e-04, 84% of the update",
    ]  # fmt: skip
