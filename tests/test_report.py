"""The report: figures say what the records say; the page is whole, safe and self-contained."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import write_run

from dynarank.records import ChangeRecord, Run, find_runs, read_run
from dynarank.report import write_report
from dynarank.report.drawing import INK, inline_svg, palette, shown
from dynarank.report.formats import (
    bytes_text,
    count,
    error_text,
    flops_text,
    joined,
    percent,
    plural,
    ratio,
    seconds_text,
)
from dynarank.report.marks import MOST_LABELS, change_marks
from dynarank.report.moments import change_kind, spans
from dynarank.report.page import build_page
from dynarank.report.plots import cost_figure, curves_figure, ranks_figure, spectrum_figure

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = ["<script>alert(1)</script>", "_orig_mod.$x$.weight", '" onload="alert(2)', "a&b"]


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; collects ids, references and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "data", "srcset"):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def runs_of(folder: Path) -> list[Run]:
    return [read_run(path) for path in find_runs(folder)]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for schedule in ("full-rank", "low-rank", "dynamic-rank"):
        write_run(folder, schedule)
    return folder


@pytest.fixture(scope="module")
def three_page(three) -> Page:
    return page_of(three)


def dashed(axes) -> list[float]:
    """Where the axes have dashed vertical lines."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    return [float(line.get_xdata()[0]) for line in lines]


# --- the page ---


def test_page_has_a_section_for_each_subject(three_page):
    for heading in ("Accuracy and cost", "Learning curves", "Rank over time", "Phases",
                    "Changes of form", "Configuration"):  # fmt: skip
        assert heading in three_page.text
    assert three_page.tags.count("svg") == 3
    assert "blocks.2.conv" in three_page.text


def test_page_says_what_was_run_and_that_one_seed_is_few(three_page):
    assert (
        "Recipe digits was trained under 3 schedules (full-rank, low-rank, dynamic-rank), seed 0, "
        "for 12 epochs on cpu (a CPU of 2 cores) in float32: 3 runs." in three_page.text
    )
    assert "One run per schedule cannot distinguish small differences" in three_page.text
    assert "1 March 2026" in three_page.text


def test_page_tells_the_recorded_figures(three_page):
    for figure in ("272,762", "0.567x", "12.3 MiB", "1 min 32 s", "2 min 10 s", "95.1%", "97.0%"):
        assert figure in three_page.text, figure
    assert "3 layers low-rank (svd) → full-rank" in three_page.text
    assert "epoch 4.4" in three_page.text and "1e-7" in three_page.text
    assert '"torch": "2.13.0"' in three_page.text and '"batch_size": 32' in three_page.text


def test_page_is_self_contained(three, three_page):
    source = (three / "report.html").read_text()
    assert all(load.startswith("#") for load in three_page.loads)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(three_page.tags)
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    addresses = re.findall(r'[\w:]+="https?://[^"]*"', source)
    assert {address.split("=")[0] for address in addresses} <= {"xmlns", "xmlns:xlink"}


def test_page_ids_are_unique_and_references_resolve(three_page):
    assert len(three_page.ids) == len(set(three_page.ids)) > 50
    assert {load[1:] for load in three_page.loads} <= set(three_page.ids)


def test_page_is_the_same_bytes_twice_even_in_another_process(three, tmp_path):
    first = write_report(three, tmp_path / "a.html").read_bytes()
    assert write_report(three, tmp_path / "b.html").read_bytes() == first
    code = (
        "import sys, pathlib; from dynarank.report import write_report; "
        "write_report(*map(pathlib.Path, sys.argv[1:])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    other = tmp_path / "new" / "c.html"
    subprocess.run([sys.executable, "-c", code, str(three), str(other)], check=True)
    assert other.read_bytes() == first


def test_page_escapes_what_comes_from_records(tmp_path):
    run = write_run(tmp_path, layers=EVIL, recipe="<img src=x onerror=alert(3)>")
    (run / "config.json").write_text('{"note": "</pre><script>alert(4)</script>"}')
    page = page_of(tmp_path)
    assert not {"script", "img"} & set(page.tags)
    assert not page.handlers
    assert all(name in page.text for name in EVIL)
    assert "</pre><script>alert(4)" in page.text


def test_page_of_300_layers(tmp_path):
    write_run(tmp_path, layers=300)
    page = page_of(tmp_path)
    assert all(f"blocks.{i}.conv" in page.text for i in range(300))
    assert "300 layers low-rank (svd) → full-rank" in page.text
    assert "depth: layer 1 (first) to 300 (last)" in page.text


def test_page_of_an_unfinished_run_says_so(tmp_path):
    write_run(tmp_path, finished=False)
    page = page_of(tmp_path)
    assert "1 run of 1 did not finish: dynamic-rank (seed 0) stopped at epoch 6 of 12" in page.text
    assert "No run has finished yet." in page.text
    assert page.tags.count("svg") == 2


def test_page_of_a_run_that_only_began(tmp_path):
    run = write_run(tmp_path)
    first_line = (run / "records.jsonl").read_text().splitlines()[0]
    (run / "records.jsonl").write_text(first_line + "\n")
    page = page_of(tmp_path)
    assert "stopped at epoch 0 of 12" in page.text and "svg" not in page.tags


def test_page_of_a_diverged_run_says_so(tmp_path):
    write_run(tmp_path, diverged=True)
    assert "diverged: its training loss is not finite at epoch 4" in page_of(tmp_path).text


def test_page_of_several_seeds_shows_means_and_no_caveat(tmp_path):
    for seed, accuracy in enumerate((0.96, 0.97, 0.98)):
        write_run(tmp_path, "full-rank", seed=seed, accuracy=accuracy)
    page = page_of(tmp_path)
    assert "mean of 3 runs" in page.text and "95.1% ± 1.0" in page.text
    assert "seeds 0, 1 and 2" in page.text
    assert "cannot distinguish" not in page.text
    assert "No layer changed form." in page.text


def test_report_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        build_page([])


# --- the figures ---


def test_curves_draw_each_run_and_mark_changes_at_their_epochs(three):
    runs = runs_of(three)
    recorded = sorted({change.epoch for run in runs for change in run.all(ChangeRecord)})
    accuracy, loss = curves_figure(runs).axes
    assert recorded == [4.4, 9.6] == dashed(accuracy) == dashed(loss)
    assert [text.get_text() for text in accuracy.texts] == ["inflate", "deflate"]
    assert len(accuracy.get_lines()) == 3 + 2
    assert len(loss.get_lines()) == 2 * 3 + 2
    colours = palette(["full-rank", "low-rank", "dynamic-rank"])
    assert [line.get_color() for line in accuracy.get_lines()[:3]] == list(colours.values())
    assert accuracy.get_lines()[2].get_ydata()[-1] == pytest.approx(0.97 * (1 - math.exp(-4)))


def test_curves_shade_only_the_full_rank_phase_between_changes(three):
    accuracy, _ = curves_figure(runs_of(three)).axes
    (patch,) = accuracy.patches
    assert (patch.get_x(), patch.get_width()) == (4.4, pytest.approx(9.6 - 4.4))


def test_curves_leave_a_gap_where_the_loss_is_not_finite(tmp_path):
    run = read_run(write_run(tmp_path, diverged=True))
    _, loss = curves_figure([run]).axes
    values = loss.get_lines()[0].get_ydata()
    assert math.isfinite(values[2]) and math.isnan(values[3])


@pytest.mark.parametrize("layers", [3, 300])
def test_ranks_draw_each_layer_in_each_run(tmp_path, layers):
    for schedule in ("full-rank", "dynamic-rank"):
        write_run(tmp_path, schedule, layers=layers)
    figure = ranks_figure(runs_of(tmp_path))
    panels, bars = figure.axes[:4], figure.axes[4:]
    median = layers > 4
    assert len(bars) == median
    changes = [[], [4.4, 9.6], [], [4.4, 9.6]]
    assert [dashed(axes) for axes in panels] == changes
    for axes, marked in zip(panels, changes, strict=True):
        assert len(axes.get_lines()) == layers + median + len(marked)
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["full-rank", "dynamic-rank"]
    effective = panels[2].get_lines()[0].get_ydata()
    assert all(0 < share <= 1 for share in effective)


def test_a_schedule_that_changes_often_has_marks_without_labels(tmp_path):
    run = read_run(write_run(tmp_path, "relora"))
    marks = change_marks([run], {"relora": INK})
    assert len(marks) == 11 > MOST_LABELS
    assert not any(mark.label for mark in marks)


def test_the_plan_at_the_start_is_no_mark(tmp_path):
    run = read_run(write_run(tmp_path))
    first = run.all(ChangeRecord)[0].model_copy(update={"epoch": 0.0, "step": 0})
    run.records.append(first)
    assert [mark.epoch for mark in change_marks([run], {"dynamic-rank": INK})] == [4.4, 9.6]
    assert "start inflate" in Page(build_page([run])).text


def test_cost_has_a_labelled_point_a_schedule(three, tmp_path):
    write_run(tmp_path, finished=False)
    panels = cost_figure([*runs_of(three), *runs_of(tmp_path)]).axes
    assert len(panels) == 3
    for axes in panels:
        labels = {text.get_text() for text in axes.texts}
        assert labels == {"full-rank", "low-rank", "dynamic-rank"}
        assert len(axes.collections) == 3
    (x, _), *_ = panels[0].collections[1].get_offsets()
    assert x == pytest.approx(0.567)


def test_spectrum_shows_ranks_as_shares_of_full_rank():
    left, right = spectrum_figure({"flat": [2.0] * 8, "one": [3.0, 0, 0, 0]}).axes
    assert list(left.get_lines()[0].get_ydata()) == [1.0] * 8
    effective, stable = ([bar.get_width() for bar in container] for container in right.containers)
    assert effective == pytest.approx([1, 1 / 4]) and stable == pytest.approx([1, 1 / 4])


def test_spectrum_of_many_layers_keeps_the_lowest_and_says_so():
    spectra = {f"layer.{i}": [1.0] * (i + 1) + [0.0] * (99 - i) for i in range(100)}
    figure = spectrum_figure(spectra, limit=40)
    right = figure.axes[-1]
    names = [label.get_text() for label in right.get_yticklabels()]
    assert names == [f"layer.{i}" for i in range(40)]
    assert "lowest 40 of 100 layers" in right.get_title(loc="left")


def test_spectrum_names_broken_layers():
    right = spectrum_figure({"zero": [0.0, 0.0], "bad": [math.nan], "good": [1.0]}).axes[1]
    assert [text.get_text() for text in right.texts] == ["zero or not finite"] * 2


@pytest.mark.parametrize("spectra", [{}, {"empty": []}])
def test_spectrum_of_nothing(spectra):
    with pytest.raises(ValueError, match=r"empty"):
        spectrum_figure(spectra)


def test_svg_ids_of_two_figures_differ(three):
    figure = curves_figure(runs_of(three))
    ids = [set(Page(inline_svg(figure, prefix)).ids) for prefix in ("a", "b")]
    assert not ids[0] & ids[1]


# --- without matplotlib, and without its global state ---


def test_missing_matplotlib_names_the_extra(three, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    runs = runs_of(three)
    for call in (lambda: write_report(three), lambda: curves_figure(runs),
                 lambda: spectrum_figure({"a": [1.0]})):  # fmt: skip
        with pytest.raises(ImportError, match=re.escape("pip install 'dynarank[report]'")):
            call()


def test_importing_the_report_imports_no_matplotlib():
    code = "import sys, dynarank.report, dynarank.report.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_drawing_leaves_global_state_alone(three):
    import matplotlib

    before = matplotlib.rcParams.copy()  # dict() would ask for the backend and so import pyplot
    inline_svg(curves_figure(runs_of(three)), "x")
    assert matplotlib.rcParams.copy() == before


# --- words and numbers ---


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count(272762), "272,762"),
        (percent(0.569), "56.9%"),
        (ratio(0.567), "0.567x"),
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
        ({"form": "low-rank", "rank": 8}, {"form": "low-rank", "rank": 4}, "resize"),
        ({"form": "low-rank", "rank": 8}, {"form": "adapted", "rank": 8}, "adapt"),
    ],
)
def test_words_for_changes(before, after, kind):
    change = ChangeRecord(epoch=1, step=1, path="a", before=before, after=after, error=0)
    assert change_kind(change) == kind


def test_spans_are_the_phases(tmp_path):
    found = spans(read_run(write_run(tmp_path)))
    assert [(s.start, s.end, s.form) for s in found] == [
        (0, 4.4, "low-rank"),
        (4.4, 9.6, "full-rank"),
        (9.6, 12, "adapted"),
    ]


def test_names_are_made_fit_for_a_figure():
    assert shown("$x$") == r"\$x\$"
    assert shown("_hidden") == " _hidden"
    assert shown("a\nb") == "a b"
    assert len(shown("x" * 200, 30)) == 30


def test_more_schedules_than_colours_stay_distinct():
    names = [f"schedule {i}" for i in range(12)]
    assert len(set(palette(names).values())) == 12
