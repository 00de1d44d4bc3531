"""The report: figures say what the records say; the page is whole, safe and self-contained."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import Page, page_of, runs_of
from report_runs import write_run

from dynarank.report import write_report
from dynarank.report.page import build_page
from dynarank.report.plots import curves_figure, spectrum_figure

EVIL = ["<script>alert(1)</script>", "_orig_mod.$x$.weight", '" onload="alert(2)', "a&b"]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    for schedule in ("full-rank", "low-rank", "dynamic-rank"):
        write_run(folder, schedule)
    return folder


@pytest.fixture(scope="module")
def three_page(three) -> Page:
    return page_of(three)


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
    assert three_page.tags.count("style") == 1  # a figure's own would style the whole page
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    addresses = re.findall(r'[\w:]+="https?://[^"]*"', source)
    assert {address.split("=")[0] for address in addresses} <= {"xmlns", "xmlns:xlink"}


def test_page_ids_are_unique_and_references_resolve(three_page):
    assert len(three_page.ids) == len(set(three_page.ids)) > 50
    assert {load[1:] for load in three_page.loads} <= set(three_page.ids)


def test_page_is_the_same_bytes_twice_even_in_another_process(three, three_page, tmp_path):
    first = (three / "report.html").read_bytes()
    assert write_report(three, tmp_path / "again.html").read_bytes() == first
    code = (
        "import sys, pathlib, matplotlib; from dynarank.report import write_report\n"
        "before = matplotlib.rcParams.copy()\n"
        "write_report(*map(pathlib.Path, sys.argv[1:]))\n"
        "assert matplotlib.rcParams.copy() == before, 'drawing changed global state'\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    other = tmp_path / "new" / "other.html"
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
