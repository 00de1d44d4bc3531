"""The first line of a report: what the runs allow to be said, and no more."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from report_pages import Page
from report_runs import write_own_run, write_run

from dynarank.records import (
    ChangeRecord,
    EpochRecord,
    Metric,
    PhaseRecord,
    Run,
    RunRecord,
    StepRecord,
    SummaryRecord,
    read_run,
)
from dynarank.report.page import build_page
from dynarank.report.verdict import verdict

PERPLEXITY = Metric(name="perplexity", higher_is_better=False, percent=False)
LOW, FULL = {"form": "low-rank", "rank": 8}, {"form": "full-rank"}
FLOPS = {"full-rank": 1.0, "low-rank": 0.29, "dynamic-rank": 0.6}
AT_ONE = "at n = 1: another seed may change a score by as much."


def run(
    schedule: str, score: float | None = None, *, seed: int | None = 0, flops: float | None = None,
    kind: str | None = None, ended: bool = True, metric: Metric | None = None, epochs: int = 3,
    test_loss: float | None = None, train_loss: float | None = 0.5, recipe: str = "digits",
    damage: tuple[str, ...] = (), steps: bool = False, steps_per_epoch: int = 10,
    config: dict | None = None,
) -> Run:  # fmt: skip
    """A run in memory: of one form, or inflating in its second step; see `kind`."""
    kind = kind or (schedule if schedule in FLOPS else "low-rank")
    flops = FLOPS[kind] if flops is None else flops
    header = RunRecord(
        recipe=recipe, schedule=schedule, seed=seed, epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        device="cpu", hardware="a CPU", precision="fp32", metric=metric or Metric(), versions={},
        started="2026-03-01",
    )  # fmt: skip
    form = "full-rank" if kind == "full-rank" else "low-rank"
    phase = PhaseRecord(
        epoch=0, step=0, forms={form: 3, "full-rank": 1 + 3 * (form == "full-rank")},
        trainable_parameters=10, total_parameters=10, predicted_flops=10, relative_flops=flops,
    )  # fmt: skip
    change = ChangeRecord(epoch=0.2, step=2, path="a", before=LOW, after=FULL, error=0)
    epoch = EpochRecord(
        epoch=epochs, step=30, learning_rate=0.1, train_loss=train_loss, test_loss=test_loss,
        test_score=score, trainable_parameters=10, relative_flops=flops, seconds=1,
    )  # fmt: skip
    summary = SummaryRecord(
        test_score=score, best_test_score=score, trainable_parameters_peak=10, memory_bytes=10,
        trainable_parameters_mean=10, training_flops=10, relative_flops=flops, train_seconds=1,
        wall_seconds=1,
    )  # fmt: skip
    last = StepRecord(epoch=epochs, step=30, train_loss=train_loss) if steps else epoch
    records = [header, phase, *([change] if kind == "dynamic-rank" else []), last]
    return Run(Path(schedule), config or {}, [*records, *([summary] if ended else [])], damage)


def seeds(schedule: str, *scores: float, **options: object) -> list[Run]:
    return [run(schedule, score, seed=seed, **options) for seed, score in enumerate(scores)]


def untested_at_the_end() -> Run:
    found = run("mine")
    last = found.all(EpochRecord)[0]
    early = last.model_copy(update={"epoch": 1, "step": 10, "test_loss": math.nan})
    return Run(found.folder, {}, [*found.records[:2], early, *found.records[2:]])


CASES = {
    "one run": (
        [run("low-rank", 0.951)],
        "low-rank reached 95.10% test accuracy at 0.29x the "
        "training FLOPs of full rank (n = 1), with no "
        "other schedule to compare it with.",
    ),
    "one full-rank run": (
        [run("full-rank", 0.951)],
        "full-rank reached 95.10% test accuracy (n = 1), with no other schedule to compare it "
        "with.",
    ),
    "one schedule, several seeds": (
        seeds("low-rank", 0.9, 0.92, 0.94),
        "low-rank reached 92.00% test accuracy at 0.29x the "
        "training FLOPs of full rank (n = 3), with no "
        "other schedule to compare it with.",
    ),
    "one run a schedule": (
        [run("full-rank", 0.95), run("low-rank", 0.95), run("dynamic-rank", 0.94)],
        "Test accuracy: low-rank matched full-rank at 0.29x the FLOPs; dynamic-rank brought "
        "nothing over low-rank (1.00 points worse at 2.1x its FLOPs), all " + AT_ONE,
    ),
    "dynamic rank is better at one run": (
        [run("full-rank", 0.95), run("low-rank", 0.90), run("dynamic-rank", 0.96)],
        "Test accuracy: low-rank was 5.00 points worse than full-rank at 0.29x the FLOPs; "
        "dynamic-rank was 6.00 points better than low-rank at 2.1x its FLOPs, all " + AT_ONE,
    ),
    "names do not decide what a schedule is": (
        [run("baseline", 0.95, kind="full-rank"), run("mine", 0.96, kind="dynamic-rank")],
        "Test accuracy: mine was 1.00 points better than baseline at 0.6x the FLOPs, " + AT_ONE,
    ),
    "several seeds, all differ": (
        [*seeds("full-rank", 0.95, 0.951, 0.949), *seeds("low-rank", 0.90, 0.901, 0.899),
         *seeds("dynamic-rank", 0.93, 0.931, 0.929)],
        "Test accuracy: low-rank lost to full-rank by 5.00 points at 0.29x the FLOPs; "
        "dynamic-rank beat low-rank by 3.00 points at 2.1x its FLOPs (n = 3).",
    ),
    "several seeds, none differ": (
        [*seeds("full-rank", 0.95, 0.96, 0.94), *seeds("low-rank", 0.94, 0.96, 0.95, 0.96)],
        "Test accuracy: low-rank cannot be told from full-rank (0.25 points, interval −1.77 to "
        "2.27) at 0.29x the FLOPs (n = 3 to 4).",
    ),
    "some at one seed": (
        [*seeds("full-rank", 0.95, 0.96), *seeds("low-rank", 0.90, 0.91),
         run("dynamic-rank", 0.97)],
        "Test accuracy: low-rank lost to full-rank by 5.00 points at 0.29x the FLOPs; dynamic-rank "
        "was 6.50 points better than low-rank at 2.1x its FLOPs (n = 1 to 2; not tested: "
        "dynamic-rank against low-rank).",
    ),
    "the same score at every seed is no test": (
        [*seeds("full-rank", 0.9, 0.9), *seeds("low-rank", 0.8, 0.8)],
        "Test accuracy: low-rank was 10.00 points worse than full-rank at 0.29x the FLOPs "
        "(n = 2; not tested: low-rank against full-rank).",
    ),
    "one seed twice is no second seed": (
        [run("full-rank", 0.95), run("low-rank", 0.90), run("low-rank", 0.94)],
        "Test accuracy: low-rank was 3.00 points worse than full-rank at 0.29x the FLOPs, "
        "at n = 1: another seed may change a score by as much; runs of low-rank share a seed and "
        "count as one.",
    ),
    "lower is better": (
        [run("full-rank", 10.0, metric=PERPLEXITY), run("low-rank", 12.5, metric=PERPLEXITY),
         run("dynamic-rank", 11.0, metric=PERPLEXITY)],
        "Test perplexity: low-rank was 2.5 worse than full-rank at 0.29x the FLOPs; dynamic-rank "
        "was 1.5 better than low-rank at 2.1x its FLOPs, all " + AT_ONE,
    ),
    "equal FLOPs": (
        [run("low-rank", 0.9, flops=0.6), run("dynamic-rank", 0.89, flops=0.604)],
        "Test accuracy: dynamic-rank brought nothing over low-rank (1.00 points worse at the same "
        "FLOPs), at n = 1: another seed may change a score by as much; full-rank was not run.",
    ),
    "cheaper and worse is not nothing": (
        [run("low-rank", 0.9, flops=0.6), run("dynamic-rank", 0.89, flops=0.3)],
        "Test accuracy: dynamic-rank was 1.00 points worse than low-rank at 0.5x its FLOPs, "
        "at n = 1: another seed may change a score by as much; full-rank was not run.",
    ),
    "the best of one form is what moving is compared with": (
        [run("low-rank", 0.9), run("lora", 0.92), run("relora", 0.91, kind="dynamic-rank")],
        "Test accuracy: low-rank was 2.00 points worse than lora at the same FLOPs; relora brought "
        "nothing over lora (1.00 points worse at 2.1x its FLOPs), all at n = 1: another seed may "
        "change a score by as much; full-rank was not run.",
    ),
    "many schedules": (
        [run("full-rank", 0.95), *(run(f"s{i}", 0.8 + i / 100) for i in range(10))],
        "Test accuracy: s9 was 6.00 points worse than full-rank at 0.29x the FLOPs; s8 was 7.00 "
        "points worse than full-rank at 0.29x the FLOPs; s7 was 8.00 points worse than full-rank "
        "at 0.29x the FLOPs; 7 schedules more in the table, all " + AT_ONE,
    ),
    "only schedules that move": (
        [run("a", 0.9, kind="dynamic-rank"), run("b", 0.8, kind="dynamic-rank", flops=0.3)],
        "Test accuracy: b was 10.00 points worse than a at 0.5x its FLOPs, at n = 1: another seed "
        "may change a score by as much; full-rank was not run.",
    ),
    "full-rank diverged": (
        [run("full-rank", math.nan), run("low-rank", 0.9), run("dynamic-rank", 0.95)],
        "Test accuracy: dynamic-rank was 5.00 points better than low-rank at 2.1x its FLOPs, "
        "at n = 1: another seed may change a score by as much; full-rank diverged.",
    ),
    "one of three diverged: no test": (
        [*seeds("full-rank", 0.95, 0.96, 0.94), *seeds("low-rank", 0.7, 0.71, math.nan)],
        "Test accuracy: low-rank was 24.50 points worse than full-rank at 0.29x the FLOPs "
        "(n = 2 to 3; not tested: low-rank against full-rank); 1 of 3 runs of low-rank diverged.",
    ),
    "a score at a loss that is not finite": (
        [run("low-rank", 0.1, train_loss=math.inf)],
        "Nothing can be concluded; low-rank diverged.",
    ),
    "unfinished": (
        [run("low-rank", 0.9, ended=False)],
        "Nothing can be concluded yet; low-rank did not finish.",
    ),
    "one of two unfinished": (
        [run("full-rank", 0.9), run("low-rank", 0.9, ended=False)],
        "full-rank reached 90.00% test accuracy (n = 1), with no other schedule to compare it "
        "with; low-rank did not finish.",
    ),
    "damaged": (
        [run("full-rank", 0.95), run("low-rank", 0.95, damage=("line 3",))],
        "Test accuracy: low-rank matched full-rank at 0.29x the FLOPs, at n = 1: another seed may "
        "change a score by as much; the records of low-rank are damaged.",
    ),
    "of different lengths": (
        [run("full-rank", 0.95, epochs=30), run("low-rank", 0.95)],
        "Test accuracy: low-rank matched full-rank at 0.29x the FLOPs, at n = 1: another seed may "
        "change a score by as much; the runs differ in epochs.",
    ),
    "of as many epochs, of different lengths": (
        [run("full-rank", 0.95), run("low-rank", 0.95, steps_per_epoch=1000)],
        "Test accuracy: low-rank matched full-rank at 0.29x the FLOPs, at n = 1: another seed may "
        "change a score by as much; the runs differ in steps.",
    ),
    "other settings are no other seed": (
        [*seeds("full-rank", 0.95, 0.951), run("low-rank", 0.9, config={"rank": 4, "seed": 0}),
         run("low-rank", 0.92, seed=1, config={"rank": 8, "seed": 1})],
        "Test accuracy: low-rank was 4.05 points worse than full-rank at 0.29x the FLOPs (n = 1 to "
        "2; not tested: low-rank against full-rank); runs of low-rank differ in settings and count "
        "as one.",
    ),
    "a difference that the test does not show is not called one": (
        [*seeds("low-rank", 0.85, 0.89, 0.87), *seeds("dynamic-rank", 0.84, 0.87, 0.86)],
        "Test accuracy: dynamic-rank cannot be told from low-rank (−1.33 points, interval −5.48 to "
        "2.81) at 2.1x its FLOPs (n = 3); full-rank was not run.",
    ),
    "a loss that was not finite when it was last tested": (
        [run("plain", kind="full-rank", test_loss=0.50), untested_at_the_end()],
        "plain reached a test loss of 0.5 (n = 1), with no other schedule to compare it with; mine "
        "diverged.",
    ),
    "an own loop with test losses": (
        [run("plain", kind="full-rank", test_loss=0.50, seed=None),
         run("mine", test_loss=0.48, seed=None)],
        "Test loss: mine was 0.02 better than plain at 0.29x the FLOPs, " + AT_ONE,
    ),
    "an own loop with losses of steps alone": (
        [run("mine", seed=None, steps=True)],
        "mine took 0.29x the "
        "training FLOPs of full rank; no test score or loss was recorded, so what that "
        "costs in quality is unknown.",
    ),
    "an own loop without a cost": (
        [run("mine", seed=None, flops=math.nan)],
        "Nothing can be concluded: no test score, loss or cost was recorded.",
    ),
    "an own loop that diverged in its steps": (
        [run("mine", seed=None, steps=True, train_loss=math.nan)],
        "Nothing can be concluded; mine diverged.",
    ),
    "some without a score": (
        [run("full-rank", 0.95), run("low-rank", 0.95), run("mine", test_loss=0.1)],
        "Test accuracy: low-rank matched full-rank at 0.29x the FLOPs, at n = 1: another seed may "
        "change a score by as much; no test accuracy was recorded for mine.",
    ),
    "no cost to compare": (
        [run("full-rank", 0.95, flops=0.0), run("low-rank", 0.95, flops=0.0)],
        "Test accuracy: low-rank matched full-rank, " + AT_ONE,
    ),
    "runs without a seed are different runs": (
        [run("full-rank", s, seed=None) for s in (0.95, 0.951)]
        + [run("low-rank", s, seed=None) for s in (0.90, 0.901)],
        "Test accuracy: low-rank lost to full-rank by 5.00 points at 0.29x the FLOPs (n = 2).",
    ),
    "one run of a score that is no share": (
        [run("low-rank", 12.5, metric=PERPLEXITY)],
        "low-rank reached a test perplexity of 12.5 at 0.29x the "
        "training FLOPs of full rank (n = 1), with "
        "no other schedule to compare it with.",
    ),
    "several recipes": (
        [run("digits: low-rank", 0.9), run("text: low-rank", 0.8, recipe="text")],
        "digits: low-rank reached 90.00% test accuracy at 0.29x the "
        "training FLOPs of full rank (n = 1), "
        "with no other schedule to compare it with. text: low-rank reached 80.00% test accuracy "
        "at 0.29x the "
        "training FLOPs of full rank (n = 1), with no other schedule to compare it with.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_verdict(case):
    runs, expected = CASES[case]
    assert verdict(runs) == expected


@pytest.mark.parametrize("case", CASES)
def test_at_one_run_a_schedule_nothing_is_won_or_lost(case):
    runs, said = CASES[case]
    names = [one.header.schedule for one in runs]
    if len(set(names)) == len(names):
        assert not {"beat", "lost"} & set(said.split()) and "cannot be told" not in said


def test_the_order_of_the_runs_does_not_matter():
    runs = [run("full-rank", 0.95), run("low-rank", 0.9), run("dynamic-rank", 0.96)]
    assert verdict(runs) == verdict(runs[::-1])


def test_a_plain_model_is_full_rank():
    plain = run("none", test_loss=0.5, flops=1.0)
    plain.records[1] = plain.records[1].model_copy(update={"forms": {}})
    assert verdict([plain, run("mine", test_loss=0.4)]) == (
        f"Test loss: mine was 0.1 better than none at 0.29x the FLOPs, {AT_ONE}"
    )


def test_without_scipy_nothing_is_tested(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    runs = [*seeds("full-rank", 0.95, 0.951), *seeds("low-rank", 0.90, 0.901)]
    assert verdict(runs) == (
        "Test accuracy: low-rank was 5.00 points worse than full-rank at 0.29x the FLOPs "
        "(n = 2; not tested: low-rank against full-rank)."
    )


def test_it_is_the_first_line_of_the_page(tmp_path):
    for name in ("full-rank", "low-rank"):
        write_run(tmp_path, name)
    runs = [read_run(tmp_path / f"{name}-0") for name in ("full-rank", "low-rank")]
    page = build_page(runs, warn=pytest.fail)
    assert page.index(f">{verdict(runs)}<".replace(">Test", ' class="verdict">Test')) < page.index(
        "<h2>"
    )
    write_own_run(tmp_path)
    text = Page(build_page([read_run(tmp_path / "mine")])).text
    assert "mine took 0.6x the training FLOPs of full rank" in text


def test_a_line_that_cannot_be_written_costs_no_page():
    told: list[str] = []
    page = build_page([run("a", 1e308), run("a", 1e308, seed=1)], warn=told.append)
    assert any(one.startswith("the first line cannot be written: OverflowError") for one in told)
    assert "</html>" in page
