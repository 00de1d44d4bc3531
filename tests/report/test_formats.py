"""The report's numbers and its words for what happened."""

from __future__ import annotations

import math

import pytest
from report_runs import write_run

from dynarank.records import ChangeRecord, Metric, PhaseRecord, read_run
from dynarank.report.formats import (
    bytes_text,
    count,
    difference_text,
    error_text,
    flops_text,
    joined,
    percent,
    plural,
    range_text,
    ratio,
    seconds_text,
)
from dynarank.report.plotting import display_name, display_names
from dynarank.report.transition_points import Span, change_kind, spans


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count(272762), "272,762"),
        (percent(0.569), "56.9%"),
        (ratio(0.567), "0.567x"),
        (difference_text(-0.0022, Metric()), "−0.22 points"),
        (difference_text(-0.3184, Metric(name="loss", percent=False)), "−0.318"),
        (bytes_text(12.3 * 2**20), "12.3 MiB"),
        (bytes_text(2**30 - 1), "1.0 GiB"),
        (bytes_text(512), "512 B"),
        (flops_text(1.9e9), "1.9 GFLOP"),
        (seconds_text(0.421), "0.42 s"),
        (seconds_text(59.6), "1 min 0 s"),
        (seconds_text(92), "1 min 32 s"),
        (seconds_text(3599.7), "1 h 0 min"),
        (seconds_text(7500), "2 h 5 min"),
        (error_text(1e-7), "1e-7"),
        (error_text(0), "0"),
        (error_text(math.nan), "not finite"),
        (percent(math.inf), "not finite"),
        (plural(1, "layer"), "1 layer"),
        (plural(19, "layer"), "19 layers"),
        (joined(["a", "b", "c"]), "a, b and c"),
        (joined(["a"]), "a"),
    ],
)
def test_formats(written, expected):
    assert written == expected


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ({"form": "low-rank", "rank": 8}, {"form": "full-rank"}, "inflate"),
        ({"form": "adapted", "rank": 8}, {"form": "full-rank"}, "inflate"),
        ({"form": "full-rank"}, {"form": "adapted", "rank": 8}, "deflate"),
        ({"form": "full-rank"}, {"form": "low-rank", "rank": 8}, "deflate"),
        ({"form": "adapted", "rank": 8}, {"form": "adapted", "rank": 8}, "restart"),
        ({"form": "adapted", "rank": 8}, {"form": "adapted", "rank": 8, "restart": 1}, "restart"),
        ({"form": "low-rank", "rank": 8}, {"form": "low-rank", "rank": 4}, "resize"),
        ({"form": "low-rank", "rank": 8}, {"form": "adapted", "rank": 8}, "adapt"),
    ],
)
def test_words_for_changes(before, after, kind):
    change = ChangeRecord(epoch=1, step=1, path="a", before=before, after=after, error=0)
    assert change_kind(change) == kind


def test_spans_are_the_phases_and_their_shares(tmp_path):
    found = spans(read_run(write_run(tmp_path)))
    assert found == [Span(0, 4.4, 0, 0), Span(4.4, 9.6, 1, 0), Span(9.6, 12, 0, 1)]


def test_layers_that_no_schedule_changes_are_left_out_of_the_shares(tmp_path):
    run = read_run(write_run(tmp_path))
    phases = run.all(PhaseRecord)
    forms = [{**one.forms, "full-rank": one.forms.get("full-rank", 0) + 2} for one in phases]
    more = [a.model_copy(update={"forms": b}) for a, b in zip(phases, forms, strict=True)]
    run.records[:] = [r for r in run.records if not isinstance(r, PhaseRecord)] + more
    assert spans(run) == [Span(0, 4.4, 0, 0), Span(4.4, 9.6, 1, 0), Span(9.6, 12, 0, 1)]


def test_a_rotating_schedule_is_one_long_span_of_a_share(tmp_path):
    found = spans(read_run(write_run(tmp_path, "rotating", layers=12)))
    assert found == [Span(0, 0.5, 0, 0), Span(0.5, 12, 1 / 12, 0)]


@pytest.mark.parametrize(("values", "text"), [([], ""), ([8, 8], "8"), ([28, 5, 9], "5 to 28")])
def test_a_range_of_ranks(values, text):
    assert range_text(values) == text


def test_names_are_made_fit_for_a_figure():
    assert display_name("$x$") == r"\$x\$"
    assert display_name("_hidden") == " _hidden"
    assert display_name("a\nb") == "a b"
    assert len(display_name("x" * 200, 30)) == 30


@pytest.mark.parametrize(
    "names",
    [
        [f"model.{'encoder.' * 22}{i}.{'attention.' * 3}weight" for i in range(40)],
        [f"{'x' * 199}{end}" for end in "abc"],
        [f"{i}{'x' * 199}" for i in range(12)],
        [f"a.{'x' * 90}{i}{'x' * 90}.b" for i in range(1200)],
        ["a" * 200, "a" * 201],
        ["a.b", "a.b.c"],
        ["one"],
        [],
    ],
)
def test_names_of_one_figure_stay_different_and_short(names):
    shown = display_names(names, 22)
    assert len(set(shown)) == len(names)
    assert max(map(len, shown), default=0) <= 24
