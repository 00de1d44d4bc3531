"""Records as scalars and events, under the same names in every logging backend.

====================================  =========================================================
name                                  value
====================================  =========================================================
``train/loss``, ``train/score``       on the epoch's training data; also ``train/learning_rate``
``test/loss``, ``test/score``         on the test data; other metrics as ``test/<metric>``
``rank/<layer>/effective``            also ``stable``, ``energy``, ``update``, ``lambda``, ``low``
``forms/<form>``                      the number of layers with this form
``cost/relative_flops``               of a training step, full rank = 1; also ``memory_bytes``, ...
``noise/model``                       the gradient noise scale; also ``noise/layers/<layer>``
``summary/<name>``                    the fields of the summary record
====================================  =========================================================
"""

from __future__ import annotations

from collections.abc import Iterator

from dynarank.form_data import form_from_data
from dynarank.records import (
    ChangeRecord,
    DecisionRecord,
    EpochRecord,
    LayerSpectrum,
    NoiseRecord,
    PhaseRecord,
    Record,
    SpectrumRecord,
    SummaryRecord,
)

__all__ = ["event_of", "scalars_of"]


def scalars_of(record: Record) -> dict[str, float]:
    """The numbers in a record, by name; empty for records of text or heat-maps.

    Example:
        >>> from dynarank.records import NoiseRecord
        >>> scalars_of(NoiseRecord(epoch=1.0, step=10, noise_scale=8.0, layers={"fc": 4.0}))
        {'noise/model': 8.0, 'noise/layers/fc': 4.0}
    """
    return {name: float(value) for name, value in _scalars(record) if value is not None}


def _scalars(record: Record) -> Iterator[tuple[str, float | None]]:
    if isinstance(record, EpochRecord):
        yield from _epoch(record)
    elif isinstance(record, SpectrumRecord):
        for layer, spectrum in record.layers.items():
            for name, value in _spectrum(spectrum).items():
                yield f"rank/{layer or 'model'}/{name}", value
    elif isinstance(record, PhaseRecord):
        for form, layers in record.forms.items():
            yield f"forms/{form}", layers
        for name in ("trainable_parameters", "total_parameters", "predicted_flops",
                     "counted_flops", "relative_flops", "memory_bytes"):  # fmt: skip
            yield f"cost/{name}", getattr(record, name)
    elif isinstance(record, NoiseRecord):
        yield "noise/model", record.noise_scale
        for layer, scale in record.layers.items():
            yield f"noise/layers/{layer or 'model'}", scale
    elif isinstance(record, SummaryRecord):
        figures = {n: v for n, v in record if n not in ("kind", "scores")}
        for name, value in {**figures, **record.scores}.items():
            yield f"summary/{name}", value


def _epoch(record: EpochRecord) -> Iterator[tuple[str, float | None]]:
    yield "train/loss", record.train_loss
    yield "train/score", record.train_score
    yield "train/learning_rate", record.learning_rate
    for metric, value in record.scores.items():
        yield f"test/{metric}", value
    yield "test/loss", record.test_loss
    yield "test/score", record.test_score
    yield "cost/trainable_parameters", record.trainable_parameters
    yield "cost/relative_flops", record.relative_flops
    yield "cost/seconds", record.seconds


def _spectrum(spectrum: LayerSpectrum) -> dict[str, float | None]:
    return {
        "effective": spectrum.effective_rank,
        "stable": spectrum.stable_rank,
        "energy": spectrum.energy_rank,
        "update": spectrum.update_rank,
        "lambda": spectrum.spectral_ratio,
        "low": spectrum.rank,
    }


def event_of(record: Record) -> tuple[str, str] | None:
    """A change or decision as a tag (``changes`` or ``decisions``) and text; None otherwise.

    Example:
        >>> from dynarank.records import ChangeRecord
        >>> form = {"form": "full-rank"}
        >>> event_of(ChangeRecord(epoch=4.0, step=9, path="a", before=form, after=form, error=0.0))
        ('changes', 'a: FullRank() -> FullRank(), relative error 0.0e+00')
    """
    if isinstance(record, ChangeRecord):
        before, after = form_from_data(record.before), form_from_data(record.after)
        error, lost = f"relative error {record.error:.1e}", record.update_error or 0
        error += f", {lost:.0%} of the update" if lost > 0.005 else ""
        return "changes", f"{record.path}: {before} -> {after}, {error}"
    if isinstance(record, DecisionRecord):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record.readings.items())
        form, because = form_from_data(record.form), f"{record.reason} ({figures})"
        return "decisions", f"{record.path}: to {form}: {because if figures else record.reason}"
    return None
