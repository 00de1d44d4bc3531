"""The figure of two models draws each layer of each, and the right bars."""

from __future__ import annotations

import pytest

from dynarank.report.spectra_pair import spectrum_pair_figure

ONE = {"a": [2.0, 2.0], "b": [1.0, 0.0], "gone": [3.0]}
TWO = {"a": [2.0, 0.0], "b": [1.0, 0.0], "zero": [0.0, 0.0]}


def test_lines_are_solid_for_the_first_and_dashed_for_the_second() -> None:
    left, _ = spectrum_pair_figure({"one": ONE, "two": TWO}).axes
    lines = left.get_lines()
    assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 2
    assert lines[0].get_color() == lines[3].get_color() != lines[1].get_color()
    assert list(lines[3].get_ydata()) == [1.0, 0.0]


def test_bars_are_effective_ranks_as_shares_of_the_full() -> None:
    _, right = spectrum_pair_figure({"one": ONE, "two": TWO}).axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["a", "b", "gone", "zero"]
    widths = [bar.get_width() for bar in right.patches]
    assert widths == pytest.approx([1.0, 0.5, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0])


def test_of_many_layers_those_that_differ_most_have_bars() -> None:
    _, right = spectrum_pair_figure({"one": ONE, "two": TWO}, limit=1).axes
    assert [label.get_text() for label in right.get_yticklabels()] == ["a"]
    assert "1 of 4 layers" in right.get_title("left")


def test_what_is_no_pair_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected two models"):
        spectrum_pair_figure({"one": ONE})
    with pytest.raises(ValueError, match="no layer to draw"):
        spectrum_pair_figure({"one": {}, "two": {}})
