"""The picture of the README, from the recorded runs of the demo.

python docs/images/demo.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from dynarank.records import EpochRecord, PhaseRecord, Run, SummaryRecord, read_run
from dynarank.report.colors import SCHEDULE_COLORS

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "benchmarks/training/results/2026-11-28-demo"
NAMES = {"full-rank": "full rank", "low-rank": "low rank", "decay": "decay"}
LEFT, RIGHT, WIDTH, HEIGHT = 58, 408, 600, 436
COST = (62, 172)  # top and bottom of a panel
SCORE = (226, 392)
LOWEST, HIGHEST = 0.8, 0.935
STYLE = """
svg {{ font: 15px system-ui, sans-serif }}
.back {{ fill: #fff; stroke: #d1d9e0 }} .grid {{ stroke: #d8dee4 }}
text {{ fill: #59636e }} .title {{ fill: #24292f; font-weight: 600 }}
polyline {{ fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round }}
polygon {{ fill: currentColor; opacity: .18 }} .name {{ fill: currentColor }}
{light}
@media (prefers-color-scheme: dark) {{
.back {{ fill: #12161b; stroke: #323a43 }} .grid {{ stroke: #323a43 }}
text {{ fill: #9aa4af }} .title {{ fill: #e6e9ec }} .name {{ fill: currentColor }}
{dark}
}}"""


def style() -> str:
    """The colors of the report, in both themes."""
    light, dark = (
        "\n".join(f".{name} {{ color: {SCHEDULE_COLORS[name][side]} }}" for name in NAMES)
        for side in (0, 1)
    )
    return STYLE.format(light=light, dark=dark)


def runs_of(name: str) -> list[Run]:
    """The runs of a schedule, one for each seed."""
    return [read_run(folder / name) for folder in sorted(RUNS.glob("seed*"))]


def across(epoch: float, epochs: int = 16) -> float:
    """Where an epoch is, from left to right."""
    return LEFT + (RIGHT - LEFT) * epoch / epochs


def up(value: float, panel: tuple[int, int], low: float, high: float) -> float:
    """Where a value is in a panel."""
    return panel[1] - (panel[1] - panel[0]) * (value - low) / (high - low)


def line(kind: str, name: str, points: Sequence[tuple[float, float]]) -> str:
    """A polyline or polygon in the schedule's color."""
    return f'<{kind} class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    """Some words."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{words}</text>'


def cost(name: str, at: float) -> str:
    """The cost of a step over the first seed's run, and that of the whole run."""
    phases = runs_of(name)[0].all(PhaseRecord)
    spans = zip(phases, [*(p.epoch for p in phases[1:]), 16], strict=True)
    points = [
        (across(epoch), up(phase.relative_flops, COST, 0, 1.1))
        for phase, end in spans
        for epoch in (phase.epoch, end)
    ]
    whole = mean(run.summary.relative_flops for run in runs_of(name) if run.summary)
    return line("polyline", name, points) + text(
        RIGHT + 10, at, f"{NAMES[name]}: {whole:.3f}x in all", f"name {name}"
    )


def score(name: str, at: float) -> str:
    """Test accuracy: mean and range of the seeds, and the last epoch's mean and deviation."""
    epochs = list(zip(*(run.all(EpochRecord) for run in runs_of(name)), strict=True))
    scores = [[float(one.test_score or 0) for one in records] for records in epochs]

    def curve(pick: Callable[[list[float]], float]) -> list[tuple[float, float]]:
        return [(across(i + 1), up(pick(s), SCORE, LOWEST, HIGHEST)) for i, s in enumerate(scores)]

    final = [100 * (run.all(SummaryRecord)[-1].test_score or 0) for run in runs_of(name)]
    words = f"{NAMES[name]}: {mean(final):.1f} ± {stdev(final):.1f}"
    band = line("polygon", name, [*curve(max), *reversed(curve(min))])
    lines = f'<g clip-path="url(#panel)">{band}{line("polyline", name, curve(mean))}</g>'
    return lines + text(RIGHT + 10, at, words, f"name {name}")


def axes() -> list[str]:
    """Titles, grid and labels."""
    parts = [
        text(LEFT - 38, 36, "Cost of a training step, in units of full rank", "title"),
        text(LEFT - 38, 208, "Test accuracy, %: mean and range of 3 seeds", "title"),
        text(across(16), 420, "epoch 16", anchor="end"),
        text(across(0), 420, "0", anchor="middle"),
        text(across(8), 420, "8", anchor="middle"),
    ]
    ticks = [(v, COST, 0, 1.1, str(v)) for v in (0, 0.5, 1)]
    ticks += [(v / 100, SCORE, LOWEST, HIGHEST, str(v)) for v in (80, 85, 90)]
    for value, panel, low, high, label in ticks:
        y = up(value, panel, low, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(LEFT - 8, y + 5, label, anchor="end"))
    return parts


def picture() -> str:
    """The whole SVG; it follows the reader's light or dark colors."""
    back = f'<rect class="back" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>'
    costs = [cost("full-rank", 77), cost("low-rank", 166), cost("decay", 145)]
    scores = [score("low-rank", 290), score("full-rank", 262), score("decay", 241)]
    panel = f'<rect y="{SCORE[0]}" width="{WIDTH}" height="{SCORE[1] - SCORE[0]}"/>'
    clip = f'<clipPath id="panel">{panel}</clipPath>'
    parts = [f"<style>{style()}</style>", clip, back, *axes(), *costs, *scores]
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "demo.svg").write_text(picture(), encoding="utf-8")
