"""The words for forms and changes are explained where they first occur, and only those."""

from __future__ import annotations

import re

import pytest
from report_pages import page_of, runs_of
from report_runs import write_run

from dynarank.records import EpochRecord
from dynarank.report.page import build_page
from dynarank.report.terms import terms

WORDS = {
    "full-rank": [],
    "low-rank": ["low-rank"],
    "dynamic-rank": ["low-rank", "adapted", "inflate", "deflate"],
    "dynamic-rank-low": ["low-rank", "inflate", "deflate"],
    "relora": ["adapted", "restart"],
}


@pytest.mark.parametrize("schedule", WORDS)
def test_the_words_that_occur_are_explained(tmp_path, schedule):
    write_run(tmp_path, schedule)
    explained = re.findall("<b>(.*?)</b>", terms(runs_of(tmp_path)))
    assert explained == WORDS[schedule]


def test_a_cut_and_an_adapter_are_told_as_what_they_are(tmp_path):
    write_run(tmp_path, "dynamic-rank")
    assert "cut" not in terms(runs_of(tmp_path)) and "adapter" in terms(runs_of(tmp_path))
    write_run(tmp_path, "dynamic-rank-low")
    both = terms(runs_of(tmp_path))
    assert "the weight is cut to factors of low rank" in both and "; or " in both


def test_they_stand_once_in_the_first_section_that_uses_them(tmp_path):
    write_run(tmp_path, "dynamic-rank")
    text = page_of(tmp_path).text
    assert text.count("the factors are multiplied out") == 1
    assert text.index("Learning curves") < text.index("the factors are multiplied out")
    assert text.index("the factors are multiplied out") < text.index("Rank of each layer over time")
    (run,) = runs_of(tmp_path)
    run.records = [record for record in run.records if not isinstance(record, EpochRecord)]
    page = build_page([run], warn=pytest.fail)
    assert page.index("Rank of each layer over time") < page.index("the factors are multiplied out")
