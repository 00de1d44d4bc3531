"""Runs of a loop of one's own: without seed and scores, with the losses of steps, of any length."""

from __future__ import annotations

import math

import pytest
from report_pages import Page, page_of, runs_of
from report_runs import write_own_run, write_run

from dynarank.records import EpochRecord, Run, SpectrumRecord, read_run
from dynarank.report import write_report
from dynarank.report.curves import curves_figure
from dynarank.report.figures import figures_of, write_figures
from dynarank.report.page import build_page
from dynarank.report.rank_metrics import rank_metrics_figure


def shown(run: Run, **pictures: object) -> Page:
    return Page(build_page([run], warn=pytest.fail, **pictures))


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_step_losses_has_a_page(tmp_path, finished):
    page = shown(read_run(write_own_run(tmp_path, finished=finished)))
    assert "seed" not in page.text.partition("λ r")[0].replace('"seed": null', "")
    assert "Learning curves" in page.text and "training, step by step" in page.text
    assert ("mine stopped at epoch 3 of 3" in page.text) != finished


def test_losses_stand_where_there_is_no_score(tmp_path):
    write_own_run(tmp_path, test_loss=0.5)
    text = page_of(tmp_path).text
    assert "Loss and cost" in text and "test loss training loss" in text
    assert "mine reached a test loss of 0.5 at" in text and "test accuracy" not in text
    assert "mine 0.5 0.7358" in text


def test_a_loop_that_does_not_say_its_length_has_none(tmp_path):
    run = read_run(write_own_run(tmp_path, finished=False))
    run.records[0] = run.header.model_copy(update={"epochs": 0})
    assert "mine stopped at epoch 3." in shown(run).text


def test_folders_may_be_strings(tmp_path):
    write_own_run(tmp_path)
    assert write_report(str(tmp_path), str(tmp_path / "page.html")).is_file()
    assert write_figures(str(tmp_path), str(tmp_path / "figures"), ["svg"])


def test_runs_with_and_without_scores_share_a_page(tmp_path):
    write_run(tmp_path, "low-rank", recipe="mine")
    write_own_run(tmp_path)
    page = page_of(tmp_path)
    assert "95.1%" in page.text and "mine" in page.text
    names = [name for name, _ in figures_of(runs_of(tmp_path))]
    assert "cost-quality" in names and "curves" in names


def test_curves_have_the_panels_for_which_something_is_recorded(tmp_path):
    run = read_run(write_own_run(tmp_path, test_loss=0.5))
    (loss,) = curves_figure([run]).axes
    assert loss.get_title(loc="left") == "Loss"
    tested, steps = loss.get_lines()
    assert list(tested.get_ydata()) == [0.5] * 3
    assert steps.get_xdata()[-1] == 3 and len(steps.get_xdata()) == 135
    assert not list(figures_of([Run(run.folder, {}, run.records[:1])]))


def test_step_losses_are_thinned(tmp_path):
    (loss,) = curves_figure([read_run(write_own_run(tmp_path, steps=700))]).axes
    assert len(loss.get_lines()[0].get_xdata()) == 600


def marked(line) -> list[int]:
    return list(line.get_markevery() or []) if line.get_marker() == "o" else []


def first_epochs(run: Run, count: int) -> Run:
    """The run, as if it had ended after a number of epochs."""
    records = [r for r in run.records if getattr(r, "epoch", 0) <= count]
    return Run(run.folder, run.config, records)


def test_a_run_of_one_record_shows_points(tmp_path):
    run = first_epochs(read_run(write_run(tmp_path, "low-rank")), 1)
    for axes in curves_figure([run]).axes:
        assert [marked(line) for line in axes.get_lines()] == [[0], [0]]  # test and training
    run = Run(run.folder, {}, [r for r in run.records if getattr(r, "epoch", 0) == 0])
    assert len(run.all(SpectrumRecord)) == 1
    assert all(marked(line) == [0] for line in rank_metrics_figure([run]).axes[0].get_lines())
    step = read_run(write_own_run(tmp_path, epochs=1, steps=1))
    assert [marked(line) for line in curves_figure([step]).axes[0].get_lines()] == [[0]]


def test_a_point_between_gaps_is_marked(tmp_path):
    run = read_run(write_run(tmp_path, "low-rank", epochs=40))
    run.records = [
        r.model_copy(update={"test_loss": math.nan, "train_loss": math.inf})
        if isinstance(r, EpochRecord) and r.epoch in (9, 11) else r
        for r in run.records
    ]  # fmt: skip
    _, loss = curves_figure([run]).axes
    assert [marked(line) for line in loss.get_lines()] == [[9], [9]]
