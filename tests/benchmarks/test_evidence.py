"""The tables, verdicts and pictures in the docs are those of the records."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from scipy import stats

from benchmarks.training import progress
from benchmarks.training.harness import answers, comparison, evidence, pictures, tables
from benchmarks.training.harness.arm import Arm, Setting
from benchmarks.training.harness.experiment import Experiment, get, names
from benchmarks.training.harness.statistics import holm, on_front, paired
from benchmarks.training.harness.store import Store
from benchmarks.training.harness.summary import ALL_FLOPS, SECONDS, Summaries

ONE = {0: 3.0, 1: 4.0, 2: 5.5, 7: 1.0}
DECAY_ON_FEW = "decay 0.5, 8 batches"
OTHER = {0: 2.0, 1: 3.5, 2: 4.0, 8: 9.0}


def test_paired_differences_are_those_of_scipy() -> None:
    found = paired(ONE, OTHER)
    assert found is not None and found.n == 3
    tested = stats.ttest_rel([3.0, 4.0, 5.5], [2.0, 3.5, 4.0])
    low, high = tested.confidence_interval()
    assert (found.p, found.low, found.high) == pytest.approx((tested.pvalue, low, high))
    assert paired(ONE, {0: 1.0}) is None
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0  # pyright: ignore
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p == 0.0  # pyright: ignore


def test_rounding_is_no_difference() -> None:
    dust = {seed: 0.1 * seed for seed in range(5)}
    other = {seed: 0.1 * seed + 1e-15 * (1 + seed % 2) for seed in range(5)}
    found = paired(other, dust)
    assert found is not None and (found.mean, found.p, found.met) == (0.0, 1.0, True)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_front_by_hand() -> None:
    points = {"a": (1.0, 5.0), "b": (0.5, 5.0), "c": (0.2, 3.0), "d": (0.6, 4.9), "e": (0.5, 5.0)}
    assert on_front(points) == {"b", "c", "e"}


def made_up(**results: list[float] | list[float | None]) -> Summaries:
    """Summaries of the first experiment with these results, at these arms' own FLOPs."""
    flops = {
        "full rank": 1.0, "decay 0.5": 0.5, DECAY_ON_FEW: 0.5, "fixed 0.5 FLOPs": 0.49,
        "fixed as decay 0.5": 0.516,
    }  # fmt: skip
    runs = [
        {
            "arm": arm, "seed": seed, "part": "test",
            "result": {} if value is None else {"accuracy": value},
            "flops": flops[arm], "end_flops": flops[arm] * 0.9, "changes": [], "points": [],
            "setting": asdict(Setting()), "parameters_mean": 1, "schedule": None,
            "memory_peak": 1, "cpu_seconds": 1.0, "full_rank_seconds": 1.0,
        }
        for arm, values in results.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    chosen = [Arm(name, None, rates=(1.0,)) for name in results]
    problem = get("mlp_256").problem
    return Summaries("made up", runs, Experiment("made up", problem, chosen, tuning=()))


def _count(monkeypatch: pytest.MonkeyPatch, counted: dict[str, float]) -> None:
    """Have the further FLOPs of these arms be counted so."""
    place = "benchmarks.training.harness.summary.share"
    monkeypatch.setattr(place, lambda _, run, __: counted.get(run["arm"]))


FULL, FIXED = [90.0, 91.0, 90.5, 90.2, 90.9], [80.0, 81.0, 80.4, 80.1, 81.1]
PAIR: dict[str, list[float]] = {"full rank": FULL, "decay 0.5": FIXED}


def test_the_verdicts_say_what_is_and_is_not_distinguishable() -> None:
    met = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FIXED, "decay 0.5": [
        value - 0.001 * (-1) ** i for i, value in enumerate(FULL)]})  # fmt: skip
    assert met.counterpart("decay 0.5") == "fixed 0.5 FLOPs"
    assert tables.verdict(met) == "Better than fixed low rank of the same FLOPs: decay 0.5."
    words = "Worse than full rank: fixed 0.5 FLOPs. The other one is not distinguishable from it."
    assert tables.verdict_to_full(met).startswith(words)
    share = "decay 0.5 (0.500, last network 0.450)"
    assert tables.verdict_to_full(met).endswith(f"by: {share}.")
    worse = made_up(**{"full rank": FULL, "decay 0.5": [value - 1 for value in FULL]})
    assert worse.counterpart("decay 0.5") is None
    assert tables.verdict(worse) == ""
    assert tables.verdict_to_full(worse).endswith("by: no arm.")


def test_only_fixed_low_rank_of_about_the_same_flops_is_a_counterpart() -> None:
    like = {**PAIR, "fixed as decay 0.5": FIXED}
    found = made_up(**like)
    assert found.counterpart("decay 0.5") is None
    note = "Without fixed low rank of the same FLOPs, within 0.015 of full rank's: decay 0.5."
    assert list(progress._notes(found)) == [note]
    for run in found.arms["fixed as decay 0.5"].runs:
        run["flops"] = 0.514
    assert found.counterpart("decay 0.5") == "fixed as decay 0.5"
    assert list(progress._notes(found)) == []
    found = made_up(**like, **{"fixed 0.5 FLOPs": FIXED})
    assert found.counterpart("decay 0.5") == "fixed 0.5 FLOPs"


def test_arms_that_have_not_run_are_named_with_the_reason() -> None:
    """One waits for an arm that has not run, one for an arm that diverged."""
    lost = made_up(**{"full rank": FULL, "decay 0.5": [None] * 5})
    runs = [*lost.arms["full rank"].runs, *lost.diverged]
    more = [Arm("raises", None, (1.0,))]
    more += [Arm(f"fixed as {a}", None, (1.0,), spends=a) for a in ("raises", "decay 0.5")]
    experiment = replace(lost.experiment, arms=[*lost.experiment.arms, *more])
    found = Summaries("made up", runs, experiment)
    assert "Not run yet on all 5 seeds: raises, fixed as raises." in evidence.block(found)
    note = "Never run: fixed as decay 0.5 ('decay 0.5' diverged on all seeds)."
    assert list(progress._notes(found)) == [note]


def test_differences_side_by_side_are_bold_where_their_interval_is_without_zero() -> None:
    met = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FIXED, "decay 0.5": [
        value - 0.1 * (-1) ** i for i, value in enumerate(FULL)]})  # fmt: skip
    *_, row = comparison.differences([met]).splitlines()
    gain = met.difference("decay 0.5", "fixed 0.5 FLOPs")
    assert gain is not None and gain.low > 0
    bold = f"**{gain.mean:+.2f} ± {gain.error:.2f}**"
    assert row == f"| made up | 5 | 0.5 | -0.02 ± 0.05 | {bold} |  |  |  |  |"
    *_, row = comparison.costs([met]).splitlines()
    assert row == "| made up | 0.5 | 0.49 / 1.00 / 1.00 |  | 0.50 / 1.00 / 1.00 |  |  |"


def test_the_best_of_the_cheap_arms_and_the_best_schedule_of_them() -> None:
    less = [value - 0.1 * (1 + i) for i, value in enumerate(FULL)]
    found = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FULL, "decay 0.5": less})
    first, *_, row = answers.met([found]).splitlines()
    assert first.count("|") == row.count("|") == 9
    assert row == "| made up | 5 | fixed 0.5 FLOPs (0.49x) | +0.00 ± 0.00, met |  |  |  |  |"
    for run in found.arms["decay 0.5"].runs:  # now it is a schedule, and what that costs is unknown
        run["changes"] = [{"step": 1, "layers": {}}]
    assert not found.cheap("decay 0.5")
    for run in found.arms["decay 0.5"].runs:
        run["changes"] = [{"step": 0, "layers": {}}]  # a start at low rank is no schedule
    assert not found.changes("decay 0.5")


def test_what_is_picked_is_tested_on_the_other_seeds() -> None:
    """Of two arms that are each good by luck on one seed, no one is better than full rank."""
    lucky = {"fixed 0.5 FLOPs": [93.0, 90.0, 90.0], "decay 0.5": [90.0, 90.0, 93.0]}
    found = made_up(**{"full rank": [90.0, 90.0, 90.0], **lucky})
    assert found.picked(lucky) == {0: 90.0, 1: 93.0 - 3.0, 2: 90.0}
    difference = found.beyond_full(found.picked(lucky))
    assert difference is not None and difference.mean == 0.0 and difference.met
    assert found.picked(["decay 0.5"]) == found.arms["decay 0.5"].values
    assert found.picked([]) == {} == made_up(**{"full rank": [1.0]}).picked(["full rank"])


def test_where_full_rank_diverged_it_cannot_be_met() -> None:
    found = made_up(**{"full rank": [90.0, None, 90.0], "decay 0.5": [91.0, 90.0, 91.0]})
    words = "Whether full rank is met cannot be said: it diverged."
    assert tables.verdict_to_full(found).endswith(words)
    assert ", met" not in answers.met([found]).splitlines()[-1]


def test_a_run_that_is_on_record_twice_is_named() -> None:
    found = made_up(**{"full rank": FULL, "decay 0.5": FIXED})
    first = found.arms["decay 0.5"].runs[1]
    runs = [run for one in found.arms.values() for run in one.runs]
    runs += [{**first, "result": {"accuracy": 99.0}}]
    again = Summaries("made up", runs, found.experiment)
    assert again.arms["decay 0.5"].runs[1] is first
    words = "On record more than once, the first counts: decay 0.5, seed 1."
    assert words in evidence.block(again) and "more than once" not in evidence.block(found)


def test_an_arm_of_any_name_may_begin_with_decay() -> None:
    names = {"full rank": FULL, "decay 0.5": FIXED, DECAY_ON_FEW: FIXED}
    found = made_up(**names)
    found.arms["decay slowly"] = found.arms["decay 0.5"]
    assert comparison.differences([found]).splitlines()[-1].startswith("| made up | 5 | 0.5 |")


@pytest.mark.parametrize(
    ("calibration", "end", "cheap"), [(0.15, 0.6, True), (0.16, 0.6, False), (0.15, 0.61, False)]
)
def test_cheap_is_all_flops_and_the_last_network(
    monkeypatch: pytest.MonkeyPatch, calibration: float, end: float, cheap: bool
) -> None:
    counted = {"decay 0.5": calibration}
    _count(monkeypatch, counted)
    found = made_up(**{"full rank": FULL, "decay 0.5": FIXED})
    for run in found.arms["decay 0.5"].runs:
        run |= {"changes": [{"step": 1, "layers": {}}], "end_flops": end}
    assert found.cheap("decay 0.5") is cheap and not found.cheap("full rank")
    cell = f"decay 0.5 ({0.5 + calibration:.2f}x)" if cheap else ""
    assert answers.met([found]).splitlines()[-1].split(" | ")[4] == cell


def test_the_front_names_kinds_and_related_methods() -> None:
    best = [value + 1 for value in FULL]
    found = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FIXED, "decay 0.5": best})
    *_, row = answers.fronts([found]).splitlines()
    assert row == "| made up | fixed; decay | decay | decay |"
    found.arms["ReLoRA"] = found.arms.pop("decay 0.5")
    *_, row = answers.fronts([found]).splitlines()
    assert row.startswith("| made up | fixed; ReLoRA |")


def test_what_inflation_restored_beside_what_the_order_won() -> None:
    found = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FIXED, "decay 0.5": FIXED})
    assert len(answers.inflation([found]).splitlines()) == 2  # no arm of the paper
    paper = found.arms["decay 0.5"]
    for run in [*paper.runs, *found.arms["full rank"].runs]:
        steps = [(0, 0, 0), (1, 1, 2), (2, 4, 3)]
        run["changes"] = [
            {"step": step, "layers": {"a": {"before": [b], "after": [a]}}} for step, b, a in steps
        ]
        run["full_ranks"] = {"a": 10}
        run["points"] = [{"spectra": {"a": [5 if run["arm"] == "full rank" else 3]}}]
    found.arms[answers.PAPER] = paper
    cells = answers.inflation([found]).splitlines()[-1].split(" | ")
    assert cells[1:5] == ["0.20", "0.40", "0.30", "0.50"]


def test_the_order_of_the_arms_is_compared_by_means() -> None:
    def problem(decay: float, fixed: float) -> Summaries:
        results = {"full rank": FULL, "decay 0.5": [decay] * 5, "fixed 0.5 FLOPs": [fixed] * 5}
        return made_up(**results)

    assert comparison.tau([3, 2, 1], [9, 6, 5]) == pytest.approx(1.0)
    assert comparison.tau([1, 2, 3], [9, 6, 5]) == pytest.approx(-1.0)
    small, large = comparison.LIKE[0]
    *_, row = comparison.orders({small: problem(80, 70), large: problem(60, 70)}).splitlines()
    best = "“full rank”, “fixed 0.5 FLOPs”, “decay 0.5”"
    assert row == f"| made up | made up | 3 | 0.33 | {best} |"


def test_calibration_counts_and_a_decay_on_few_batches_stands_for_its_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    less, least = ([value - gap for value in FULL] for gap in (1, 2))
    found = made_up(
        **{"full rank": FULL, "decay 0.5": less, DECAY_ON_FEW: less, "fixed 0.5 FLOPs": least}
    )
    changed = [found.arms[name] for name in ("decay 0.5", DECAY_ON_FEW)]
    for run in (run for one in changed for run in one.runs):
        run["changes"] = [{"step": 1, "layers": {}}]
    assert found.further("decay 0.5") is None and found.further("full rank") == 0
    assert "Further FLOPs are not counted yet for decay 0.5" in evidence.block(found)
    counted = {"decay 0.5": 0.2, DECAY_ON_FEW: 0.05}
    _count(monkeypatch, counted)
    assert found.share("decay 0.5", "flops") == 0.5
    assert found.share("decay 0.5", "all_flops") == pytest.approx(0.7)
    assert found.front() == {"full rank", DECAY_ON_FEW, "fixed 0.5 FLOPs"}  # as good, for less
    before = pictures.digest(found)
    counted[DECAY_ON_FEW] = 0.2
    assert pictures.digest(found) != before
    counted[DECAY_ON_FEW] = 0.05
    assert "not counted" not in evidence.block(found)
    *_, row = tables.deciding([found], 0.5).splitlines()
    assert "(0.55x)" in row and "(0.70x)" not in row
    *_, row = comparison.costs([found]).splitlines()
    assert " 0.55 / " in row


def test_the_seeds_that_did_not_diverge_are_no_sample() -> None:
    best = [95.0, 95.1, None, 95.2, 95.3]
    found = made_up(**{"full rank": FULL, "decay 0.5": best, "fixed 0.5 FLOPs": FIXED})
    assert found.difference("decay 0.5", "full rank") is None
    assert not found.meets_full("decay 0.5")
    assert found.front() == {"full rank", "fixed 0.5 FLOPs"}
    assert "decay 0.5" not in tables.verdict_to_full(found) + tables.verdict(found)
    text = evidence.block(found)
    assert "| decay 0.5 | 4 of 5 |" in text and "Diverged: decay 0.5, seed 2." in text
    assert "decay 0.5" not in text.partition("Not run yet on all 5 seeds: ")[2].partition(".\n")[0]


def test_an_arm_that_lacks_a_seed_is_best_of_nothing() -> None:
    best = [value + 5 for value in FULL]
    for results in ([*best[:4], None], best[:1]):
        found = made_up(**{"full rank": FULL, "decay 0.5": results, "fixed 0.5 FLOPs": FIXED})
        assert found.best(found.arms) == "full rank" and "decay 0.5" not in found.front()
        _, _, row = tables.deciding([found], 0.5).splitlines()
        assert row.startswith("| made up: accuracy, % | 5 |")
        assert (", n = 4 of 5)" if None in results else ", n = 1)") in row
        other = made_up(**{"full rank": FULL, "decay 0.5": best, "fixed 0.5 FLOPs": FIXED})
        assert "decay" not in comparison.orders({"mlp_256": other, "mlp_1024": found})


def test_a_smaller_loss_is_better() -> None:
    found = made_up(**{"full rank": FULL, "fixed 0.5 FLOPs": FIXED})
    found.sign = -1
    difference = found.difference("fixed 0.5 FLOPs", "full rank")
    assert difference is not None and difference.low > 9


@pytest.mark.parametrize("inside", ["", "\n", "an older table\n"])
def test_a_block_is_filled_whatever_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n<!-- begin mine -->\n{inside}<!-- end -->\nAfter.\n")
    monkeypatch.setattr(evidence, "pages", lambda: [page])
    monkeypatch.setattr(evidence, "blocks", lambda: {"mine": "a\nb"})
    monkeypatch.setattr(evidence, "drawings", dict)
    filled = "Before.\n<!-- begin mine -->\na\nb\n<!-- end -->\nAfter.\n"
    for _ in range(2):
        evidence.write()
        assert page.read_text() == filled
    page.write_text("<!-- begin yours -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="a block 'yours'; there are mine"):
        evidence.write()
    page.write_text(unended := f"<!-- begin mine -->\n{filled}")
    with pytest.raises(ValueError, match="the block 'mine' has no <!-- end -->"):
        evidence.write()
    assert page.read_text() == unended


def test_a_block_names_its_problem_wherever_it_is_put() -> None:
    """A heading by hand stays where it is when a block is put under it."""
    found = made_up(**{"full rank": FULL})
    for text in (tables.restored(found), evidence.block(found)):
        assert "made up" in text.splitlines()[0]


def test_every_block_has_its_place_on_a_page() -> None:
    assert evidence.unplaced(["deciding", "costs"]) == []
    assert evidence.unplaced(["deciding", "made_up"]) == ["made_up"]


def test_the_pictures_are_drawn_from_the_records() -> None:
    assert evidence.stale_pictures() == [], "python -m benchmarks.training write"


@pytest.mark.parametrize("name", [n for n in names() if "grid" not in n])
def test_what_stands_on_the_front_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, drawn = Summaries(name), set[tuple[float, float]]()
    if "full rank" not in found.arms:
        pytest.skip("no reported run of full rank yet")

    def errorbar(x: Any, y: Any, *_: object, **__: object) -> None:
        drawn.update(zip(x, y, strict=True))

    ax = MagicMock(errorbar=errorbar)
    monkeypatch.setattr(pictures, "_name", lambda *_: None)
    pictures._front(ax, found, ALL_FLOPS)
    for arm in found.front():
        assert (found.share(arm, ALL_FLOPS), found.arms[arm].result) in drawn, arm


def test_a_picture_that_was_changed_by_hand_is_noticed(tmp_path: Path) -> None:
    found = made_up(**{"full rank": FULL, "decay 0.5": FIXED})
    pictures.fronts(found, path := tmp_path / "a.svg")
    drawn = path.read_text(encoding="utf-8")
    assert pictures.is_of(drawn, found) and drawn.startswith("<?xml")
    other = made_up(**{"full rank": FIXED, "decay 0.5": FIXED})
    assert not pictures.is_of(drawn, other)
    for changed in (
        drawn.replace("0.4", "0.5", 1),
        drawn.replace("#111111", "#111112", 1),
        drawn[:-9],
    ):
        assert changed != drawn and not pictures.is_of(changed, found)


def test_a_picture_of_other_records_is_noticed() -> None:
    found = next(iter(evidence.recorded().values()))
    before = pictures.digest(found)
    next(iter(found.arms.values())).runs[0]["result"]["accuracy"] = 1.0
    assert pictures.digest(found) != before


def test_the_calibrations_of_all_recorded_arms_are_counted() -> None:
    for found in evidence.recorded().values():
        assert not [arm for arm in found.arms if found.further(arm) is None], found.name


def test_full_rank_is_met_at_all_the_flops_that_were_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_up(**{"full rank": FULL, "decay 0.5": FULL})
    for run in found.arms["decay 0.5"].runs:
        run["changes"] = [{"step": 1, "layers": {}}]
    for spent, met in ((None, False), (0.1, True), (0.2, False)):
        counted = {} if spent is None else {"decay 0.5": spent}
        _count(monkeypatch, counted)
        words = "by: decay 0.5 (0.600, last network 0.450)." if met else "by: no arm."
        assert tables.verdict_to_full(found).endswith(words)


def test_tuning_runs_are_never_reported() -> None:
    for name, found in evidence.recorded().items():
        tuning = set(found.experiment.tuning)
        assert all(
            run["seed"] not in tuning or run["part"] == "valid" for run in Store(name).runs()
        )
        reported = (run for arm in found.arms.values() for run in arm.runs)
        assert all(run["part"] == "test" and run["seed"] not in tuning for run in reported)


def test_seconds_are_relative_to_those_of_full_rank_beside_each_run() -> None:
    found = made_up(**{"full rank": FULL, "decay 0.5": FIXED})
    assert found.share("decay 0.5", SECONDS) == 1.0
    for run in found.arms["decay 0.5"].runs:
        run["full_rank_seconds"] = 4.0
    assert found.share("decay 0.5", SECONDS) == 0.25
    assert found.share("decay 0.5", "flops") == 0.5


def test_seconds_of_different_hours_are_not_compared(tmp_path: Path) -> None:
    """They are unknown until a run is repeated beside full rank; its result does not count."""
    runs = [run for one in made_up(**PAIR).arms.values() for run in one.runs]
    for run in runs:
        if run["arm"] == "decay 0.5":
            del run["full_rank_seconds"]
    found = Summaries("made up", runs, made_up(**PAIR).experiment)
    assert found.knows("full rank", SECONDS) and not found.knows("decay 0.5", SECONDS)
    with pytest.raises(ValueError, match=r"timed beside no run of 'decay 0\.5'"):
        found.share("decay 0.5", SECONDS)
    assert answers.fronts([found]).splitlines()[-1].endswith("| not timed |")
    assert "CPU seconds" not in tables.fronts(found)
    assert comparison.costs([found]).splitlines()[-1].split(" | ")[4] == "0.50 / – / 1.00"
    pictures.fronts(found, tmp_path / "a.svg")
    again = {**runs[-1], "seed": 0, "full_rank_seconds": 2.0, "result": {"accuracy": 0.0}}
    found = Summaries("made up", [*runs, again], found.experiment)
    assert found.share("decay 0.5", SECONDS) == 0.5
    assert found.arms["decay 0.5"].result == pytest.approx(sum(FIXED) / 5)
    assert (found.repeated, found.twice) == ({"decay 0.5"}, [])
