"""One color for each schedule wherever it is drawn, none of them a form's, all of them seen."""

from __future__ import annotations

import re
from itertools import combinations

import pytest
from report_pages import runs_of
from report_runs import write_run

from dynarank.records import NoiseRecord
from dynarank.report.colors import FORM_COLORS, SCHEDULE_COLORS, luminance, schedule_colors
from dynarank.report.cost_quality import cost_quality_figure
from dynarank.report.curves import curves_figure
from dynarank.report.noise import noise_figure
from dynarank.report.page import build_page
from dynarank.report.rank_timeline import rank_timeline_figure
from dynarank.report.tables import cost_table
from dynarank.report.theme import css_variables
from dynarank.schedules.catalog import SCHEDULES

OWN = [f"schedule {i}" for i in range(40)]
PAGES = [re.search(r"--page:(#......)", css_variables()[at:]).group(1)
         for at in (0, css_variables().index("@media"))]  # fmt: skip


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_named_schedule_has_a_color():
    assert set(SCHEDULE_COLORS) == set(SCHEDULES)
    assert PAGES == ["#ffffff", "#12161b"]


@pytest.mark.parametrize("side", [0, 1])
def test_colors_differ_from_each_other_and_from_those_of_forms(side):
    colors = [pair[side] for pair in (*SCHEDULE_COLORS.values(), *FORM_COLORS.values())]
    colors += [color for name, color in schedule_colors([*SCHEDULES, *OWN]).items() if name in OWN]
    assert len(set(colors)) == len(colors) == len(SCHEDULES) + 3 + 40
    assert min(contrast(color, PAGES[side]) for color in colors) >= 3


def test_a_color_depends_on_the_name_alone_but_for_one_that_is_taken():
    for name in (*SCHEDULES, "mine", "digits: low-rank", ""):
        (alone,) = schedule_colors([name]).values()
        assert schedule_colors(["full-rank", name, "dynamic-rank"])[name] == alone
    orders = schedule_colors(OWN), schedule_colors(reversed(OWN))
    assert orders[0] == orders[1] and list(orders[0]) == OWN


def test_two_recipes_share_no_color():
    names = ["a: low-rank", "b: low-rank", "low-rank", "a: mine", "b: mine"]
    colors = schedule_colors(names)
    assert len(set(colors.values())) == 5 and colors["low-rank"] == SCHEDULE_COLORS["low-rank"][0]


@pytest.mark.parametrize("count", [2, 7, 20])
def test_no_two_colors_of_a_page_are_close(count):
    for one, other in combinations(schedule_colors(OWN[:count]).values(), 2):
        apart = [abs(int(one[i : i + 2], 16) - int(other[i : i + 2], 16)) for i in (1, 3, 5)]
        assert sum(apart) > 60, (one, other)


def drawn(figure) -> set[str]:
    """The colors of a figure's lines, points and bars that belong to a schedule."""
    from matplotlib.colors import to_hex

    found: set[str] = set()
    for axes in figure.axes:
        found |= {to_hex(line.get_color()) for line in axes.get_lines()}
        for part in (*axes.collections, *axes.patches):
            found |= {to_hex(color) for color in part.get_facecolor()} if part in axes.collections \
                else {to_hex(part.get_facecolor())}  # fmt: skip
    return found


def test_a_schedule_has_one_color_in_every_figure_and_table(tmp_path):
    names = ["full-rank", "low-rank", "dynamic-rank", "relora"]
    for name in names:
        write_run(tmp_path, name)
    runs = runs_of(tmp_path)
    for run in runs:
        for epoch in (1, 2):
            run.records.append(NoiseRecord(epoch=epoch, step=epoch, noise_scale=5.0))
    colors = {SCHEDULE_COLORS[name][0] for name in names}
    known = {light for light, _ in SCHEDULE_COLORS.values()}
    for figure in (curves_figure(runs), cost_quality_figure(runs), noise_figure(runs)):
        assert drawn(figure) & known == colors
    assert set(re.findall(r"#[0-9a-f]{6}", cost_table(runs))) == colors
    assert not drawn(rank_timeline_figure(runs)) & known  # forms
    (alone,) = (run for run in runs if run.header.schedule == "relora")
    assert drawn(noise_figure([alone])) == {SCHEDULE_COLORS["relora"][0]}


def test_the_colors_of_a_page_do_not_depend_on_which_runs_a_figure_shows(tmp_path, monkeypatch):
    seen: list[str] = []
    import dynarank.report.sections as sections

    draw = sections.noise_figure

    def watched(runs, narrow, colors):
        seen.append(colors["b"])
        return draw(runs, narrow, colors)

    monkeypatch.setattr(sections, "noise_figure", watched)
    for name in ("low-rank", "full-rank"):
        write_run(tmp_path, name)
    runs = runs_of(tmp_path)
    for run, name in zip(runs, "ab", strict=True):
        run.records[0] = run.header.model_copy(update={"schedule": name})
    runs[1].records.append(NoiseRecord(epoch=1, step=1, noise_scale=5.0))
    monkeypatch.setattr("dynarank.report.colors.sha256", _Close)
    build_page(runs, warn=pytest.fail)
    assert set(seen) == {schedule_colors("ab")["b"]} != {schedule_colors("b")["b"]}


class _Close:
    """A hash under which the first colors of all names are equal."""

    def __init__(self, data: bytes) -> None:
        self.tries = int(data[1:] or b"0")

    def digest(self) -> bytes:
        return bytes([10 * self.tries % 256, 0, 0])
