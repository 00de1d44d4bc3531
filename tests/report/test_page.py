"""The report: figures say what the records say; the page is whole, safe and self-contained."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import Page, page_of, runs_of
from report_runs import PERPLEXITY, write_run
from warm_python import run as python

from dynarank.records import ChangeRecord, read_run
from dynarank.report import write_report
from dynarank.report.curves import curves_figure
from dynarank.report.grouping import by_schedule, comparable
from dynarank.report.page import build_page
from dynarank.report.spectra import spectrum_figure
from dynarank.report.tables import changes_table
from dynarank.sinks.extras import install_command

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
    for heading in ("Accuracy and cost", "Statistical comparison", "Learning curves",
                    "Rank of each layer over time", "Rank metrics over time", "Phases",
                    "Changes of form", "Configuration"):  # fmt: skip
        assert heading in three_page.text
    assert three_page.tags.count("svg") == 4 * 2  # for wide screens and for narrow ones
    assert "One layer over time" not in three_page.text  # neither values nor pictures were kept
    assert "blocks.2.conv" in three_page.text


def test_page_says_what_was_run_and_that_one_seed_is_few(three_page):
    assert (
        "Recipe digits was trained under 3 schedules (full-rank, low-rank, dynamic-rank), seed 0, "
        "for 12 epochs on cpu (a CPU of 2 cores) in float32: 3 runs." in three_page.text
    )
    assert "cannot be compared at n = 1" in three_page.text
    assert "1 March 2026" in three_page.text


def test_page_tells_the_recorded_figures(three_page):
    for figure in ("272,762", "0.567x", "12.3 MiB", "1 min 32 s", "2 min 10 s", "95.1%", "97.0%"):
        assert figure in three_page.text, figure
    assert "3 layers low-rank (svd) → full-rank" in three_page.text
    assert "epoch 4.4" in three_page.text and "1e-7" in three_page.text
    assert '"torch": "2.13.0"' in three_page.text and '"batch_size": 32' in three_page.text


def test_a_change_of_rank_says_from_which_to_which(tmp_path):
    forms = [{"form": "low-rank", "decomposition": "svd", "rank": rank} for rank in (28, 9, 22, 5)]
    run = read_run(write_run(tmp_path))
    first = run.all(ChangeRecord)[0]
    run.records[:] = [record for record in run.records if not isinstance(record, ChangeRecord)]
    for path, before, after in (("a", forms[0], forms[2]), ("b", forms[1], forms[3])):
        change = {"path": path, "before": before, "after": after}
        run.records.append(first.model_copy(update=change))
    text = Page(f"{changes_table([run])}").text
    assert "2 layers low-rank (svd), rank 9 to 28 → 5 to 22" in text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run with everything in it."""
    folder = tmp_path_factory.mktemp("whole")
    write_run(folder, "closed-loop", pictures=True)
    return folder


@pytest.fixture(scope="module")
def whole_page(whole) -> Page:
    return page_of(whole)


def test_page_is_self_contained(whole, whole_page):
    page = whole_page
    source = (whole / "report.html").read_text()
    assert all(load.startswith(("#", "data:image/png")) for load in page.loads)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert page.tags.count("style") == 1  # a figure's own would style the whole page
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    addresses = re.findall(r'[\w:]+="https?://[^"]*"', source)
    assert {address.split("=")[0] for address in addresses} <= {"xmlns", "xmlns:xlink"}


def test_page_lets_only_its_own_scripts_run(whole, whole_page):
    source = (whole / "report.html").read_text()
    bodies = re.findall(r"<script>(.*?)</script>", source, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in bodies}
    policy = html.unescape(re.search(r'Policy" content="([^"]*)"', source).group(1))
    assert len(bodies) == 2 and "default-src 'none'" in policy
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes


def test_page_shows_decisions_with_their_reasons(whole_page):
    text = whole_page.text
    for words in ("Decisions and reasons", "effective rank fell", "stable rank has settled",
                  "effective rank 6.3, stable rank 2.125, <limit> 7", "blocks.0.conv → full-rank",
                  "blocks.0.conv → low-rank, rank 8"):  # fmt: skip
        assert words in text, words


def test_page_has_static_figures_for_readers_without_scripts(whole_page):
    page = whole_page
    assert "One layer over time" in page.text and "Heat-maps of weights: mean" in page.text
    assert page.tags.count("image") == 3 * 5  # layers x readings


def test_page_ids_are_unique_and_references_resolve(three_page):
    assert len(three_page.ids) == len(set(three_page.ids)) > 50
    assert {load[1:] for load in three_page.loads} <= set(three_page.ids)


def test_page_is_the_same_bytes_in_another_process(whole, whole_page, tmp_path):
    first = (whole / "report.html").read_bytes()
    code = (
        "import sys, pathlib, matplotlib; from dynarank.report import write_report\n"
        "before = matplotlib.rcParams.copy()\n"
        "write_report(*map(pathlib.Path, sys.argv[1:]))\n"
        "assert matplotlib.rcParams.copy() == before, 'drawing changed global state'\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    other = tmp_path / "new" / "other.html"
    python(["-c", code, whole, other], check=True)
    assert other.read_bytes() == first


def test_page_escapes_what_comes_from_records(tmp_path):
    run = write_run(tmp_path, layers=EVIL, recipe="<img src=x onerror=alert(3)>", pictures=True)
    (run / "config.json").write_text('{"note": "</pre><script>alert(4)</script>"}')
    page = page_of(tmp_path)
    assert page.tags.count("script") == 3 and "img" not in page.tags  # two of ours, and the data
    assert not page.handlers
    assert all(name in page.text for name in EVIL)
    assert "</pre><script>alert(4)" in page.text


def test_page_of_300_layers_stays_small_and_says_what_it_left_out(tmp_path):
    write_run(tmp_path, layers=300, pictures=True)
    page = page_of(tmp_path)
    assert all(f"blocks.{i}.conv" in page.text for i in range(300))
    assert "300 layers low-rank (svd) → full-rank" in page.text
    assert "depth: layer 1 (first) to 300 (last)" in page.text
    assert "60 of 300 layers are drawn; the median is over all." in page.text
    assert "This page shows weights in 8 x 8 blocks; records.jsonl has all." in page.text
    assert (tmp_path / "report.html").stat().st_size < 2_500_000


def test_page_of_an_unfinished_run_says_so(tmp_path):
    write_run(tmp_path, finished=False)
    page = page_of(tmp_path)
    assert "1 run of 1 did not finish: dynamic-rank (seed 0) stopped at epoch 6 of 12" in page.text
    assert "No run has finished yet." in page.text
    assert page.tags.count("svg") == 3 * 2


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
    assert "cannot be compared" not in page.text
    assert "No layer changed form." in page.text


def test_page_in_a_metric_of_which_less_is_better(tmp_path):
    write_run(tmp_path, "low-rank", metric=PERPLEXITY, accuracy=0.5)
    write_run(tmp_path, "dynamic-rank", metric=PERPLEXITY, accuracy=10, finished=False)
    text = page_of(tmp_path).text
    assert "Perplexity and cost" in text and "Test perplexity: low-rank 0.49 (n = 1)." not in text
    assert "0.49" in text and "49.0%" not in text and "accuracy" not in text
    assert f"{10 * (1 - math.exp(-4 / 12)):.4g}" in text  # the unfinished run's best is its least


def test_runs_of_different_metrics_are_not_mixed(tmp_path):
    write_run(tmp_path, "low-rank", metric=PERPLEXITY)
    write_run(tmp_path, "full-rank")
    with pytest.raises(ValueError, match="different metrics \\(accuracy, perplexity\\)"):
        write_report(tmp_path)


def test_schedules_of_several_recipes_are_named_with_their_recipe(tmp_path):
    write_run(tmp_path / "a", "low-rank")
    write_run(tmp_path / "b", "low-rank", recipe="other")
    told = by_schedule(comparable(runs_of(tmp_path)))
    assert sorted(told) == ["digits: low-rank", "other: low-rank"]


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
        with pytest.raises(ImportError, match=re.escape(install_command("report"))):
            call()


def test_importing_the_report_imports_no_matplotlib():
    code = (
        "import sys, dynarank.report, dynarank.report.figures; print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
