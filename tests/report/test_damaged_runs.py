"""A report of runs some of which cannot be read or drawn: the others are shown, those named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_pages import Page
from report_runs import write_run
from warm_python import run as python

from dynarank.files.reading import DamagedFileError
from dynarank.files.sealed_json import sealed, unsealed
from dynarank.report import write_report
from dynarank.report.figures import write_figures

HOSTILE = [
    "$a_{$",
    "\\$x^$",
    r"$\\frac{",
    "<script>alert(1)</script><b>&amp;",
    "\x1b[31mred\x1b[0m\x07\r\n",
    "\u202egnp.exe\u2066",
    "a" * 10_000,
    "_hidden",
    "{}%s{0.__class__}",
    "",
]


def page_and_warnings(folder: Path) -> tuple[Page, list[str]]:
    told: list[str] = []
    page = Page(write_report(folder, warn=told.append).read_text(encoding="utf-8"))
    return page, told


def edited(run: Path, number: int, **update: object) -> None:
    """Replace fields of a record, with a right checksum."""
    path = run / "records.jsonl"
    lines = path.read_bytes().splitlines()
    record = json.loads(unsealed(lines[number]))
    for key, value in update.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    lines[number] = sealed(json.dumps(record)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")


def test_a_run_cut_before_any_record_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    cut = write_run(tmp_path / "cut", "low-rank")
    lines = (cut / "records.jsonl").read_bytes().splitlines(keepends=True)
    for count in (1, 2, 4):
        (cut / "records.jsonl").write_bytes(b"".join(lines[:count]))
        page, told = page_and_warnings(tmp_path)
        assert "1 run of 2 did not finish: low-rank" in page.text
        assert told == [], count
    (cut / "records.jsonl").write_bytes(lines[0])
    page, told = page_and_warnings(cut)  # alone
    assert (told, "stopped at epoch 0" in page.text) == ([], True)


UNREADABLE = [b"", b"\n", b"\0" * 4096, b"not json\n", b'{"kind":"ep', b"[" * 10_000]


def test_runs_that_cannot_be_read_are_named_and_end_no_other(tmp_path: Path) -> None:
    for i, content in enumerate(UNREADABLE):
        (tmp_path / f"bad{i}").mkdir()
        (tmp_path / f"bad{i}" / "records.jsonl").write_bytes(content)
    with pytest.raises(DamagedFileError, match="none of its runs can be"):
        write_report(tmp_path)
    write_run(tmp_path / "whole", layers=2)
    page, told = page_and_warnings(tmp_path)
    for i, one in enumerate(told):
        assert "a run is not shown: " in one and str(tmp_path / f"bad{i}") in one
        assert one in page.text
    assert len(told) == len(UNREADABLE)
    assert "dynamic-rank" in page.text
    assert write_figures(tmp_path, tmp_path / "figures", ["png"], warn=lambda text: None)


def test_damaged_lines_and_configurations_are_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    path = run / "records.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (run / "config.json").write_text("{")
    page, told = page_and_warnings(tmp_path)
    assert len(told) == 2
    assert "does not match its checksum" in told[0] and "config.json cannot be read" in told[1]
    assert all(one in page.text for one in told)


def hostile_runs(folder: Path) -> Path:
    for i, name in enumerate(HOSTILE):
        run = write_run(folder / str(i), pictures=i == 0)
        header = {"recipe": name, "schedule": f"{name}{i}", "hardware": name}
        edited(run, 0, **header, metric={"name": HOSTILE[0]})
    return folder


def test_names_of_any_kind_are_shown_and_stop_nothing(tmp_path: Path) -> None:
    page, told = page_and_warnings(hostile_runs(tmp_path))
    assert told == []
    assert page.tags.count("script") == 3  # its own
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2066]", source)
    assert "a" * 300 not in source.partition("<h2>Configuration")[0]
    if CHROMIUM is not None:
        with Browser() as browser:
            browser.open(tmp_path / "report.html")
            assert browser.complaints == []


@pytest.mark.parametrize("name", [*HOSTILE[:3], ""])
def test_a_metric_of_any_name_is_drawn(tmp_path: Path, name: str) -> None:
    edited(write_run(tmp_path, layers=4), 0, metric={"name": name})
    write_figures(tmp_path, tmp_path / "figures", ["png"], warn=pytest.fail)


def test_lone_surrogates_in_a_configuration_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "config.json").write_text('{"note": "\\ud800"}')
    assert r"\ud800" in page_and_warnings(tmp_path)[0].text


def test_a_run_that_cannot_be_drawn_is_named_and_the_others_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynarank.report import sections

    for name in ("dynamic-rank", "low-rank"):
        write_run(tmp_path / name, name)
    draw = sections.curves_figure

    def failing(runs, columns=1):
        if any(run.header.schedule == "low-rank" for run in runs):
            raise OverflowError("cannot draw \x1b[31m it")
        return draw(runs, columns)

    monkeypatch.setattr(sections, "curves_figure", failing)
    page, (told,) = page_and_warnings(tmp_path)
    assert told.startswith("Learning curves cannot be shown for low-rank (seed 0): OverflowError")
    assert "\x1b" not in told
    assert told in page.text
    assert any(one.startswith("curves-") for one in page.ids)


WILD = {"train_loss": "Infinity", "test_loss": 1e308, "test_score": -1e308, "epoch": 1e300}


@pytest.mark.parametrize("field", WILD)
def test_wild_numbers_end_no_page(tmp_path: Path, field: str) -> None:
    run = write_run(tmp_path / "wild", "low-rank")
    write_run(tmp_path / "whole")
    kinds = [json.loads(line)["kind"] for line in (run / "records.jsonl").read_text().splitlines()]
    edited(run, kinds.index("epoch"), **{field: WILD[field]})
    page, _ = page_and_warnings(tmp_path)
    assert "dynamic-rank" in page.text


def test_the_command_warns_and_ends_well_unless_nothing_can_be_read(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "records.jsonl").touch()
    done = python(["-m", "dynarank", "report", tmp_path])
    assert done.returncode == 0, done.stderr
    assert "dynarank: warning: a run is not shown: " in done.stderr
    done = python(["-m", "dynarank", "report", tmp_path / "bad"])
    assert done.returncode == 2
    assert done.stderr.startswith("dynarank: error: ") and done.stderr.count("\n") == 1
