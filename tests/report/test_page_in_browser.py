"""The page in a headless Chromium: drawn without a complaint, and its controls work."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_runs import write_run

from dynarank.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
LEFT, RIGHT = ("ArrowLeft", 37), ("ArrowRight", 39)


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder, "dynamic-rank", pictures=True)
    write_run(folder, "closed-loop", pictures=True, layers=["a", "</script>", "c"])
    return write_report(folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    write_run(folder, "rotating", pictures=True, layers=300)
    return write_report(folder)


def corner(png: bytes) -> int:
    """How bright the upper left pixel of a PNG is, 0 to 255: its first channel."""
    data, place = b"", 8
    while place < len(png):
        size, kind = struct.unpack(">I4s", png[place : place + 8])
        data += png[place + 8 : place + 8 + size] if kind == b"IDAT" else b""
        place += size + 12
    return zlib.decompressobj().decompress(data, 16)[1]


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_drawn_without_a_complaint(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert (corner(browser.picture()) < 60) == dark
    for kind, seen in (("narrow", width == 390), ("wide-figure", width == 1200)):
        frames = f"[...document.querySelectorAll('.frame.{kind}')].map(c => c.offsetHeight > 0)"
        assert set(browser.ask(frames)) == {seen}, kind
    assert browser.ask("document.querySelector('#moving').offsetHeight > 300")
    assert browser.complaints == []


def test_300_layers_are_drawn_without_a_complaint(browser, deep):
    browser.open(deep, 390)
    assert browser.complaints == []
    assert browser.ask("document.querySelectorAll('#moving-layer option').length") == 300
    assert browser.ask("document.documentElement.scrollWidth") == 390


READOUT = "document.querySelector('#moving-readout').textContent"


def test_the_viewer_opens_on_a_layer_that_changes_at_the_change(browser, tmp_path):
    write_run(tmp_path, "full-rank", pictures=True)
    write_run(tmp_path, "dynamic-rank", pictures=True)
    browser.open(write_report(tmp_path))
    chosen = "document.querySelector('#moving-run').selectedOptions[0].textContent"
    assert browser.ask(chosen) == "dynamic-rank"
    assert browser.ask(READOUT).startswith("Epoch 5 · full-rank of 32 · λ ")  # inflated at 4.4
    choose(browser, "run", 0)
    assert browser.ask(READOUT).startswith("Epoch 12 · full-rank of 32 · λ ")  # never changes


def test_one_reading_is_shown_as_points(browser, tmp_path):
    run = write_run(tmp_path, "dynamic-rank", pictures=True)
    lines = (run / "records.jsonl").read_bytes().splitlines(keepends=True)
    (run / "records.jsonl").write_bytes(b"".join(lines[:3]))
    browser.open(write_report(tmp_path))
    assert browser.ask("document.querySelectorAll('#moving-timeline circle').length") == 2
    assert browser.complaints == []


def test_tables_that_scroll_say_so(browser, page):
    hint = "getComputedStyle(document.querySelector('.wide'), '::before').content"
    browser.open(page, 390)
    assert "Scroll sideways" in browser.ask(hint)
    assert browser.ask("document.querySelector('.wide').scrollWidth") > 390
    browser.open(page, 1200)
    assert browser.ask(hint) == "none"


def test_long_names_make_no_wide_page_and_stay_different(browser, tmp_path):
    names = [f"model.{'encoder.' * 22}{i}.{'attention.' * 3}weight" for i in range(40)]
    names += ["x" * 199 + end for end in "ab"]
    write_run(tmp_path, "dynamic-rank", pictures=True, layers=names)
    path = write_report(tmp_path)
    for width in (1200, 390):
        browser.open(path, width)
        assert browser.ask("document.documentElement.scrollWidth") == width
        widths = "Math.max(...[...document.querySelectorAll('td')].map(c => c.offsetWidth))"
        browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.ask(widths) < 700
    assert browser.complaints == []


def test_the_slider_moves_the_layer_through_time(browser, page):
    browser.open(page)
    assert browser.ask(READOUT).startswith("Epoch 5 · full-rank of 32 · λ ")
    browser.ask("document.querySelector('#moving-time').focus()")
    last = browser.ask("document.querySelector('#moving-spectrum').innerHTML")
    for _ in range(7):
        browser.press(*RIGHT)
    assert browser.ask(READOUT).startswith("Epoch 12 · adapted, rank 8 of 32 · λ ")
    for _ in range(8):
        browser.press(*LEFT)
    assert browser.ask(READOUT).startswith("Epoch 4 · low-rank, rank 8 of 32 · λ ")
    assert browser.ask("document.querySelector('#moving-spectrum').innerHTML") != last
    assert browser.ask("document.querySelector('#moving-weights-note').textContent").startswith(
        "Epoch 4;"
    )
    told = "document.querySelector('#moving-time').getAttribute('aria-valuetext')"
    assert browser.ask(told) == "Epoch 4, low-rank, rank 8 of 32"
    assert browser.complaints == []


def choose(browser, name: str, value: int) -> None:
    browser.ask(f"{{ const s = document.querySelector('#moving-{name}'); s.value = '{value}'; "
                "s.dispatchEvent(new Event('change')); }")  # fmt: skip


def test_another_schedule_and_layer_are_chosen(browser, page):
    browser.open(page)
    choose(browser, "run", 1)
    names = "[...document.querySelectorAll('#moving-layer option')].map(o => o.textContent)"
    assert browser.ask(names) == ["a", "</script>", "c"]
    before = browser.ask("document.querySelector('#moving-timeline').innerHTML")
    choose(browser, "layer", 1)
    assert browser.ask("document.querySelector('#moving-timeline').innerHTML") != before
    assert browser.complaints == []


def test_play_runs_to_the_end_and_with_less_motion_steps(browser, page):
    browser.open(page, still=True)
    name = "document.querySelector('#moving-play').textContent"
    at = "Number(document.querySelector('#moving-time').value)"
    assert browser.ask(name) == "Next reading" and browser.ask(at) == 5
    browser.ask("document.querySelector('#moving-play').click()")
    assert browser.ask(at) == 6 and browser.ask(name) == "Next reading"
    browser.open(page)
    browser.ask("document.querySelector('#moving-play').click()")
    assert browser.ask(name) == "Pause"
    moved = f"new Promise(done => setTimeout(() => done({at}), 900))"
    answer = browser.call("Runtime.evaluate", expression=moved, awaitPromise=True)
    assert 5 < answer["result"]["value"] <= 12
    assert browser.complaints == []


def test_the_theme_is_chosen_by_a_button(browser, page):
    browser.open(page)
    assert corner(browser.picture(whole=False)) > 200
    browser.ask("document.querySelector('#theme').click()")
    assert browser.ask("document.querySelector('#theme').textContent") == "Theme: dark"
    assert corner(browser.picture(whole=False)) < 60
    for expected in ("Theme: light", "Theme: system"):
        browser.ask("document.querySelector('#theme').click()")
        assert browser.ask("document.querySelector('#theme').textContent") == expected
    assert browser.complaints == []


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(browser, page):
    browser.open(page)
    controls = "[...document.querySelectorAll('button, select, input')]"
    named = f"{controls}.every(c => c.textContent.trim() && c.tagName == 'BUTTON' || c.labels[0])"
    assert browser.ask(f"Boolean({named})")
    assert browser.ask(f"{controls}.every(c => c.tabIndex === 0)")
    unnamed = "[...document.querySelectorAll('svg[role=img], canvas')].filter(s => !s.ariaLabel)"
    assert browser.ask(f"{unnamed}.length") == 0


def test_without_scripts_the_still_pictures_show(browser, page):
    browser.open(page, scripts=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.ask("document.querySelector('.static').offsetHeight > 300")
    assert browser.ask("document.querySelector('#moving').offsetHeight") == 0
    browser.open(page)
    assert browser.ask("document.querySelector('.static').offsetHeight") == 0
