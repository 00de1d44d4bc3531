"""What of README.md and docs/ is written from the records: tables, verdicts and pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.training.harness import answers, comparison, pictures, tables
from benchmarks.training.harness.experiment import Experiment, names
from benchmarks.training.harness.summary import FULL, SECONDS, Summaries

ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "docs" / "images" / "evidence"
DECIDING = (
    "gpt_characters", "gpt_bytes", "gpt_10m",
    "mlp_256", "vit_cifar", "resnet_fashion", "resnet20_cifar", "wrn_cifar100",
)  # fmt: skip
"""The problems of the table and the picture of the README."""
_BUDGET = 0.65
_SWITCHED = (FULL, "fixed 1/2", "paper, svd", "paper, low-rank ending")
BLOCK = re.compile(r"<!-- begin (?P<name>\S+) -->\n(?P<text>.*?)\n?<!-- end -->", re.DOTALL)


def recorded() -> dict[str, Summaries]:
    """The experiments that have runs of full rank to compare with, the deciding ones first."""
    found = {name: Summaries(name) for name in dict.fromkeys((*DECIDING, *names()))}
    return {name: one for name, one in found.items() if FULL in one.arms}


def blocks() -> dict[str, str]:
    """Each block of the pages by its name, as it has to be."""
    found = recorded()
    deciding = [found[name] for name in DECIDING if name in found]
    problems = {name: one for name, one in found.items() if not _is_grid(one)}
    every = list(problems.values())
    return {
        "deciding": tables.deciding(deciding, _BUDGET),
        "differences": comparison.differences(every),
        "costs": comparison.costs(every),
        "orders": comparison.orders(problems),
        "fronts": answers.fronts(every),
        "met": answers.met(every),
        "inflation": answers.inflation(every),
        **{name: block(one) for name, one in found.items()},
    } | {
        f"{name}/restored": tables.restored(one)
        for name, one in found.items()
        if any(arm.startswith("paper") for arm in one.arms)
    }


def _is_grid(found: Summaries) -> bool:
    return found.name.endswith("grid")


def block(found: Summaries) -> str:
    """The picture, the table and the verdicts of an experiment."""
    experiment, name = found.experiment, found.name
    shown = "times" if _is_grid(found) else "front"
    parts = [
        f"### {experiment.title}",
        f"![{experiment.title}](../images/evidence/{name}-{shown}.svg)",
        tables.table(found),
        " ".join(filter(None, (experiment.note, _tuned(experiment), _timed(found)))),
        *([] if shown == "times" else [tables.fronts(found), tables.verdict(found)]),
        tables.verdict_to_full(found),
        *_unfinished(found),
    ]
    return "\n\n".join(part for part in parts if part)


def _tuned(experiment: Experiment) -> str:
    """On what the arms were tuned."""
    n, length = len(experiment.tuning), experiment.tuning_length
    if not n:
        return "Rates are not tuned here."
    steps = "" if length == 1 else f", with {length:g} of the steps"
    return f"Tuned on {n} seed{'s' if n > 1 else ''}{steps}."


def _timed(found: Summaries) -> str:
    """On what the arms were timed."""
    known = any(found.knows(arm, SECONDS) for arm in found.arms)
    arms = f", for {len(found.repeated)} arms of a run that was repeated for them"
    more = arms if found.repeated else ""
    return f"Seconds are those of {found.hardware}{more}." if known and found.hardware else ""


def _unfinished(found: Summaries) -> Iterator[str]:
    """What is missing of the experiment, does not count, or diverged."""
    if found.others:
        yield f"Not counted: {found.others} runs of what the problem was before."
    if found.others_of:
        words = "; ".join(f"{arm} ({n})" for arm, n in found.others_of.items())
        yield f"Not counted: runs of what these arms were before: {words}."
    if found.twice:
        yield f"On record more than once, the first counts: {'; '.join(found.twice)}."
    wanted = len(found.experiment.seeds)
    ran = Counter(run["arm"] for run in found.diverged)
    ran.update({arm: one.n for arm, one in found.arms.items()})
    short = {arm: n for arm, n in ran.items() if n < wanted}
    missing = [
        a.name for a in found.experiment.arms if a.name not in ran and a.name not in found.never
    ]
    if short or missing:
        words = [*(f"{arm} (n = {n})" for arm, n in short.items()), *missing]
        yield f"Not run yet on all {wanted} seeds: {', '.join(words)}."
    if uncounted := [arm for arm in found.arms if found.further(arm) is None]:
        yield f"Further FLOPs are not counted yet for {', '.join(uncounted)}."
    if found.diverged:
        names_ = sorted({f"{run['arm']}, seed {run['seed']}" for run in found.diverged})
        yield f"Diverged: {'; '.join(names_)}."


def drawings() -> dict[str, tuple[Summaries | list[Summaries], Callable[[Path], None]]]:
    """Each picture by its file's name, with what it is drawn from."""
    found = recorded()
    drawn: dict[str, tuple[Summaries | list[Summaries], Callable[[Path], None]]] = {}
    for name, one in found.items():
        if _is_grid(one):
            drawn[f"{name}-times"] = one, partial(pictures.times, one)
            continue
        drawn[f"{name}-front"] = one, partial(pictures.fronts, one)
        arms = [arm for arm in _SWITCHED if arm in one.arms]
        if len(arms) == len(_SWITCHED):
            drawn[f"{name}-lambda"] = one, partial(pictures.lambdas, one, arms)
        if any("values" in one.arms[arm].runs[0] for arm in arms):
            drawn[f"{name}-weights"] = one, partial(pictures.weights, one, arms)
    chosen = [found[name] for name in DECIDING if name in found]
    drawn["overview"] = chosen, partial(pictures.overview, chosen)
    return drawn


def write() -> None:
    """Write the blocks of the pages and the pictures."""
    wanted = blocks()
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda m: _filled(m, wanted), text), encoding="utf-8")
    if missing := unplaced(wanted):
        print(f"no page has a place for: {', '.join(missing)}")
    for name, (_, draw) in drawings().items():
        draw(PICTURES / f"{name}.svg")
    print(f"wrote {len(wanted)} blocks and {len(drawings())} pictures")


def pages() -> list[Path]:
    """The pages that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def unplaced(wanted: Iterable[str]) -> list[str]:
    """The blocks that no page has."""
    texts = [page.read_text(encoding="utf-8") for page in pages()]
    return sorted(set(wanted) - {found["name"] for text in texts for found in BLOCK.finditer(text)})


def _filled(found: re.Match[str], wanted: dict[str, str]) -> str:
    if (name := found["name"]) not in wanted:
        raise ValueError(f"a page has a block {name!r}; there are {', '.join(wanted)}")
    if "<!-- begin " in found["text"]:  # it would be written over
        raise ValueError(f"the block {name!r} has no <!-- end --> before the next one begins")
    return f"<!-- begin {name} -->\n{wanted[name]}\n<!-- end -->"


def stale_pictures() -> list[str]:
    """The pictures that are missing, changed, or drawn from other records than there are now."""
    drawn = {PICTURES / f"{name}.svg": found for name, (found, _) in drawings().items()}
    return [
        path.name
        for path in sorted({*drawn, *PICTURES.glob("*")})
        if path not in drawn
        or not path.exists()
        or not pictures.is_of(path.read_text(encoding="utf-8"), drawn[path])
    ]
