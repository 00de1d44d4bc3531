"""Every figure in README and docs is that of the records; whatever differs is found."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks import verify
from benchmarks.claims import evidence, records
from benchmarks.claims.words import IN_WORDS, NUMBERS, PARTS, WORD, says
from benchmarks.training.harness import evidence as evidence_of_training

DEPLOY = "docs/how-to/deploy.md"
RECORD = "deploy/results/2026-11-29-cpu/deploy.json"
TEXT = "Decay reached\n91.81 % at 0.200x of 604,682 parameters; version 3.11.\n"
CLAIMS = ["Decay reached 91.81 % at 0.200x", "of 604,682 parameters"]
SETTINGS = ["version 3.11"]


def faults(text: str, claims: list[str] = CLAIMS, settings: list[str] = SETTINGS) -> list[str]:
    return list(verify.faults(verify.Page("docs/page.md", text), claims, settings))


def text_of(name: str) -> str:
    return (verify.ROOT / name).read_text(encoding="utf-8")


def outside_blocks(name: str, text: str | None = None) -> verify.Page:
    page = verify.Page(name, text_of(name) if text is None else text)
    assert list(verify.differing_blocks(page)) == []
    return page


@cache
def claimed(name: str) -> tuple[list[str], tuple[str, ...]]:
    """What a page claims, and what of it tells no result; derived once."""
    module = importlib.import_module(verify.module_name(name))
    return list(module.claims()), verify.settings(module)


def faults_of(name: str, text: str) -> list[str]:
    """What is wrong with a page, were this its text."""
    return list(verify.faults(outside_blocks(name, text), *claimed(name)))


@pytest.fixture
def other_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of records instead of the repository's."""
    monkeypatch.setattr(records, "BENCHMARKS", tmp_path)
    records.read_json.cache_clear()
    yield tmp_path
    records.read_json.cache_clear()


@pytest.mark.slow
def test_every_figure_agrees_with_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    status = verify.main([])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", ["README.md", "docs/scale.md", DEPLOY])
def test_a_figure_altered_by_one_digit_is_found(name: str) -> None:
    """Each figure of the page in turn, its last digit one higher or lower."""
    text = text_of(name)
    figures = list(verify.FIGURE.finditer(outside_blocks(name).rest))
    assert len(figures) > 20
    assert faults_of(name, text) == []
    for figure in figures:
        at = max(place for place in range(*figure.span()) if text[place].isdigit())
        altered = f"{text[:at]}{int(text[at]) ^ 1}{text[at + 1 :]}"
        assert faults_of(name, altered), figure[0]


@pytest.mark.parametrize("name", IN_WORDS)
def test_a_word_that_tells_a_result_is_found_if_it_is_altered(name: str) -> None:
    """Every fifth word of the page in turn, replaced by another one or, a number, by the next."""
    text = text_of(name)
    told = list(WORD.finditer(outside_blocks(name).rest))
    assert len(told) > 80
    assert faults_of(name, text) == []
    for one in told[::5]:
        altered = f"{text[: one.start()]}{other(one[0])}{text[one.end() :]}"
        assert faults_of(name, altered), (one[0], text[one.start() - 40 : one.end() + 40])


def other(word: str) -> str:
    """Another number, or a comparison turned round."""
    if word.isdigit():
        return str(int(word) + 1)
    if word in (both := [*NUMBERS, *PARTS.values()]):
        return both[both.index(word) - 1]
    pairs = (("better", "worse"), ("faster", "slower"), ("ahead", "behind"), ("more", "fewer"))
    return dict((*pairs, *(pair[::-1] for pair in pairs))).get(word, "some")


@pytest.mark.parametrize(
    ("name", "words", "instead"),
    [
        ("README.md", "low rank ends three points", "low rank ends thirty points"),
        ("README.md", "over 16 epochs", "over 96 epochs"),
        ("README.md", "eight early cuts, costs", "eighty early cuts, costs"),
        ("README.md", "narrower than about 500", "narrower than about 400"),
        ("docs/evidence.md", "the WRN-16-4 worse.", "the WRN-16-4 better."),
        ("docs/evidence.md", "a sixth on the largest GPT", "a fifth on the largest GPT"),
        ("docs/evidence.md", "corrected, no arm is", "corrected, one arm is"),
        ("docs/how-to/choose-a-schedule.md", "for a seventh of", "for a third of"),
        ("docs/how-to/choose-a-schedule.md", "was ahead of all three", "was ahead of all two"),
        ("docs/methods/automatic-schedules.md", "at 0.735,", "at 0.735%,"),
        ("docs/methods/automatic-schedules.md", "98.52 ± 0.16", "-98.52 ± 0.16"),
        ("docs/methods/optimizer-state.md", "calibrated 0.0175", "calibrated 0.0175%"),
        ("docs/methods/optimizer-state.md", "100 steps per phase", "200 steps per phase"),
        ("docs/methods/optimizer-state.md", "5 / 20 / 49 steps", "5 / 20 / 50 steps"),
        ("docs/methods/dynamic-rank.md", "the 19 layers", "the 18 layers"),
        ("docs/methods/regularizers.md", "at 24 more products", "at 14 more products"),
        ("docs/methods/factors.md", "after 200 steps", "after 100 steps"),
        ("docs/how-to/choose-a-rank.md", "the 36 block layers", "the 35 block layers"),
        ("docs/checkpoints.md", "4 x every call", "5 x every call"),
        ("docs/checkpoints.md", "| 2; 10 |", "| 2; 12 |"),
    ],
)
def test_what_a_reader_may_mistype_is_found(name: str, words: str, instead: str) -> None:
    whole = text_of(name)
    altered = re.sub(r"\s+".join(map(re.escape, words.split())), instead, whole)
    assert altered != whole
    assert faults_of(name, altered)


@pytest.mark.parametrize("before", ["-", "+", "\u2212", "1,", "1", "."])
def test_what_stands_before_a_figure_belongs_to_it(before: str) -> None:
    text, claims = "It had 98.52 of all.\n", ["98.52 of all"]
    assert faults(text, claims, []) == []
    assert faults(text.replace("98", f"{before}98"), claims, [])


@pytest.mark.parametrize(
    "after", ["%", " %", "k", "x", " x", "\u00d7", "e3", "1", ",5", " points", " ms", " times"]
)
def test_what_stands_after_a_figure_belongs_to_it(after: str) -> None:
    text, claims = "It ended at 0.735, then.\n", ["ended at 0.735"]
    assert faults(text, claims, []) == []
    assert faults(text.replace("735", f"735{after}"), claims, [])


def test_a_changed_picture_of_the_demo_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_of_training, "stale_pictures", list)
    assert list(verify.stale_pictures()) == []
    picture = verify.DEMO.read_text(encoding="utf-8")
    monkeypatch.setattr(verify, "DEMO", tmp_path / "demo.svg")
    for altered in ("decay: 0.210x in all", "decay: 0.200x in part"):
        verify.DEMO.write_text(picture.replace("decay: 0.200x in all", altered), encoding="utf-8")
        (fault,) = verify.stale_pictures()
        assert fault.endswith("python docs/images/demo.py")


def test_an_altered_block_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"one": "| loss | 1.926 |", "two": "| loss | 2.035 |"}
    monkeypatch.setattr(verify, "blocks", lambda: given)
    text = "# A page\n\n<!-- begin one -->\n| loss | 1.926 |\n<!-- end -->\n"

    def found(text: str) -> list[str]:
        page = verify.Page("docs/page.md", text)
        return [*verify.differing_blocks(page), *page.left()]

    assert found(text) == []
    way_out = "python -m benchmarks.training write"
    fault = f"docs/page.md:3: the records give another block one; {way_out}"
    assert found(text.replace("1.926", "1.962")) == [fault]
    assert found(text.replace("one", "three")) == [fault.replace("one", "three")]
    assert [fault for fault in verify.without_place() if "block two;" in fault]


def test_the_fault_says_what_the_page_has_and_what_the_records_give() -> None:
    assert faults(TEXT) == []
    (fault,) = faults(TEXT.replace("91.81", "91.91"))
    assert fault == (
        "docs/page.md:1: the page has 'Decay reached 91.91 % at 0.200x', but the records give "
        "'Decay reached 91.81 % at 0.200x'; correct the page, or its claim"
    )


def test_an_altered_record_is_found(other_records: Path) -> None:
    data = json.loads((verify.ROOT / "benchmarks" / RECORD).read_text(encoding="utf-8"))
    copy = other_records / RECORD
    copy.parent.mkdir(parents=True)
    copy.write_text(json.dumps(data), encoding="utf-8")
    assert verify.check(DEPLOY)[1] == []
    data["rows"][0]["ms"]["median"] *= 1.05
    copy.write_text(json.dumps(data), encoding="utf-8")
    records.read_json.cache_clear()
    (fault,) = verify.check(DEPLOY)[1]
    assert (
        "the page has '| wide MLP | 1 | 3.2 / " in fault
        and "records give '| wide MLP | 1 | 3.4" in fault
    )


def test_a_missing_record_is_found(other_records: Path) -> None:
    (fault,) = verify.check(DEPLOY)[1]
    assert "how_to_deploy.py cannot derive its figures" in fault and RECORD in fault


def test_words_that_do_not_follow_from_the_records_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evidence, "verb", lambda *_: "is worse than")
    (fault,) = verify.check("docs/evidence.md")[1]
    words = "docs/evidence.md: what it says in words does not follow from the records: 'assert "
    assert fault.startswith(words) and "benchmarks/claims/evidence.py, line " in fault


def test_a_sentence_that_is_not_proved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "corrected", lambda *_: [])
    (fault,) = verify.check("docs/evidence.md")[1]
    assert "does not follow from the records: 'With Holm's correction" in fault.replace('"', "'")
    with pytest.raises(AssertionError, match="No arm is better"):
        says("No arm is better.")


def test_a_sentence_that_is_not_claimed_is_found() -> None:
    page = verify.Page("README.md", "A decay beat\nall others, by a third.\n")
    first, second = page.left()
    assert first.startswith("README.md:1: no record is named for beat in")
    assert second.startswith("README.md:2: no record is named for all, third in")


def test_text_that_is_gone_is_found() -> None:
    (fault,) = faults(TEXT.replace("of 604,682 parameters", ""))
    assert fault.startswith(
        "docs/page.md: the page does not have what the records give 'of 604,682"
    )
    (fault,) = faults(TEXT.replace("version 3.11", ""))
    assert "does not have the setting 'version 3.11'" in fault


@pytest.mark.parametrize(
    "figure",
    [
        "0.5", ".65", "-0.5", "12 %", "12%", "3x", "3\u00d7", "7 times", "4 points", "1,024",
        "91 \u00b1 3", "10-fold", "30 s", "8\nms", "5 minutes", "64 MiB", "2 GB",
        "6 standard errors", "| a | 12 |", "1e-3", "12k", "10M", "10 million", "3 of 5", "5 min",
        "5ms", "a factor of 2", "3 x faster", "2 fold", "4 pp", "9 kJ", "n = 3",
    ],
)  # fmt: skip
def test_a_figure_that_nothing_explains_is_found(figure: str) -> None:
    (fault,) = faults(f"{TEXT}\nIt was\n{figure} in all.\n")
    assert fault.startswith("docs/page.md:5: no record is named for"), fault
    assert fault.endswith("derive it in benchmarks/claims/page.py, or take it out of the page")


@pytest.mark.parametrize(
    "text",
    [
        "n = n'", "rank 64", "a 3x3 convolution", "16 x 16 images", "2026-11-29", "1/4", "8 GPUs",
        "k^2 FLOPs", "arXiv 2404.02827", "`rank=0.5`", "[a page](b-0.5.md)", "```\nlr = 0.1\n```",
    ],
)  # fmt: skip
def test_numbers_that_measure_nothing_and_code_are_left_out(text: str) -> None:
    assert faults(f"{TEXT}\n{text}\n") == []


def test_a_figure_typed_into_a_claim_is_found() -> None:
    source = 'def claims():\n    yield f"{x:.2f} and 0.5 %"\n    yield f"{0.5} s"\n    yield "2x"\n'
    assert sorted(verify.typed_in(source)) == [" and 0.5 %", "2x"]
    source = 'def claims():\n    yield says("by a third", x > 1)\n    yield "twice"\n'
    assert list(verify.typed_in(source)) == ["twice"]
    assert list(verify.typed_in('yield says("by 0.5 points", x > 1)')) == ["by 0.5 points"]


def test_the_command_prints_faults_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (verify.ROOT / DEPLOY).read_text(encoding="utf-8")
    copy = tmp_path / DEPLOY
    copy.parent.mkdir(parents=True)
    copy.write_text(page, encoding="utf-8")
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    assert verify.main(["--page", DEPLOY]) == 0
    assert "figures on 1 page agree with the records" in capsys.readouterr().out
    copy.write_text(page.replace("40.09 / 10.11 MB", "40.09 / 10.12 MB"), encoding="utf-8")
    assert verify.main(["--page", DEPLOY]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("10.12 MB" in line and "10.11 MB" in line for line in lines)
    with pytest.raises(SystemExit):
        verify.main(["--page", "docs/none.md"])
