"""The data of the moving pictures: packed, bounded, and unpacked to what was recorded."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import write_run

from dynarank.records import ChangeRecord, read_run
from dynarank.report.embed import data_block
from dynarank.report.layer_viewer_data import (
    DECADES,
    LETTERS,
    limits_text,
    opening,
    pack_spectrum,
    pack_weights,
    viewer_runs,
)
from dynarank.report.thinning import evenly, within


def unpacked(text: str) -> list[float]:
    """What layer_viewer.js makes of two letters: the share of the largest, 0 at the scale's end."""
    pairs = zip(text[::2], text[1::2], strict=True)
    codes = [64 * LETTERS.index(high) + LETTERS.index(low) for high, low in pairs]
    return [10 ** (DECADES * (code / 4095 - 1)) if code else 0.0 for code in codes]


@given(st.lists(st.floats(1e-4, 1), min_size=1))
def test_singular_values_survive_the_packing(values):
    assert unpacked(pack_spectrum(values, 1.0)) == pytest.approx(values, rel=2e-3)


def test_what_is_too_small_is_nothing_and_too_large_the_top():
    assert unpacked(pack_spectrum([0.0, 1e-9, 2.0], 1.0)) == [0, 0, 1]


@given(st.lists(st.floats(0, 1), min_size=1))
def test_weights_survive_the_packing(values):
    shares = [LETTERS.index(letter) / 63 for letter in pack_weights([values], 1.0)]
    assert shares == pytest.approx(values, abs=1 / 126 + 1e-9)


def test_a_weight_that_is_not_finite_is_a_dot():
    assert pack_weights([[math.nan, math.inf, 1.0]], 1.0) == "..-".replace("-", LETTERS[63])


def test_a_layer_has_its_measures_values_pictures_and_forms(tmp_path):
    run = read_run(write_run(tmp_path, pictures=True))
    (packed,) = viewer_runs([run])
    assert packed["epochs"] == list(range(13)) and packed["pictureEpochs"] == list(range(0, 13, 2))
    layer = packed["layers"][0]
    assert layer["name"] == "blocks.0.conv" and layer["full"] == 32 and layer["rank"] == 16
    recorded = [math.exp(-(2 + 6 + 1) * i / 32) for i in range(32)]
    assert unpacked(layer["spectra"][12]) == pytest.approx(recorded, rel=2e-3)
    assert layer["forms"] == [
        [0, 4.4, "low-rank", 8], [4.4, 9.6, "full-rank", None], [9.6, 12, "adapted", 8],
    ]  # fmt: skip
    assert (layer["picture"]["rows"], layer["picture"]["columns"]) == (32, 32)
    assert len(layer["picture"]["cells"]) == 7 and len(layer["picture"]["cells"][0]) == 32 * 32
    assert limits_text([packed]) == ""


def test_readings_that_are_not_finite_are_gaps(tmp_path):
    run = read_run(write_run(tmp_path, diverged=True, pictures=True))
    (layer, *_) = viewer_runs([run])[0]["layers"]
    assert layer["spectra"][3] is not None and layer["spectra"][4] is None
    assert layer["measures"][4][0] is None and layer["measures"][4][1] is not None
    json.dumps(layer, allow_nan=False)


def test_many_layers_are_kept_within_the_budget_and_the_limits_said(tmp_path, monkeypatch):
    monkeypatch.setattr("dynarank.report.layer_viewer_data.SPECTRUM_BUDGET", 20 * 64 * 5)
    monkeypatch.setattr("dynarank.report.layer_viewer_data.HEATMAP_BUDGET", 20 * 64 * 5)
    run = read_run(write_run(tmp_path, layers=20, pictures=True))
    (packed,) = viewer_runs([run])
    assert len(packed["layers"]) == 20 and len(packed["epochs"]) == 5
    assert packed["epochs"][0] == 0 and packed["epochs"][-1] == 12
    assert len(packed["layers"][0]["picture"]["cells"][0]) == 8 * 8
    assert limits_text([packed]) == (
        "This page shows 5 of 13 readings, 5 of 7 readings of the weights and "
        "weights in 8 x 8 blocks; records.jsonl has all."
    )


def test_a_layer_that_changes_is_kept_and_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("dynarank.report.layer_viewer_data.SPECTRUM_BUDGET", 5 * 64 * 4 * 2)
    still = read_run(write_run(tmp_path / "still", "low-rank", layers=20, pictures=True))
    run = read_run(write_run(tmp_path, layers=20, pictures=True))
    run.records = [
        record for record in run.records
        if not isinstance(record, ChangeRecord) or record.path == "blocks.13.conv"
    ]  # fmt: skip
    packed = viewer_runs([still, run])
    names = [layer["name"] for layer in packed[1]["layers"] if len(layer["forms"]) > 1]
    assert names == ["blocks.13.conv"]
    assert opening(packed) == 1 and opening(packed[:1]) == 0


@given(st.integers(1, 10**6), st.integers(1, 5000), st.integers(1, 500), st.integers(1, 100))
def test_what_is_kept_fits_or_is_the_least(budget, layers, readings, size):
    kept_layers, kept = within(budget, layers, readings, size)
    assert 1 <= kept_layers <= layers and 1 <= kept <= readings
    assert kept_layers * kept * size <= budget or kept_layers == 1


@given(st.lists(st.integers(), min_size=1, max_size=50, unique=True), st.integers(1, 60))
def test_evenly_keeps_order_and_both_ends(items, most):
    kept = evenly(items, most)
    assert len(kept) == min(most, len(items)) and kept == [i for i in items if i in kept]
    assert kept[0] == items[0] and (len(kept) < 2 or kept[-1] == items[-1])


def test_data_cannot_end_its_element():
    block = data_block("x", {"name": "</script><script>alert(1)</script>&<!--"})
    inner = block.removeprefix('<script type="application/json" id="x">').removesuffix("</script>")
    assert "<" not in inner and "&" not in inner
    assert json.loads(inner)["name"] == "</script><script>alert(1)</script>&<!--"
