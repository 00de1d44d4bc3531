"""The pictures of docs/evidence.md, from the records."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.training.harness.kinds import OTHER, kind
from benchmarks.training.harness.statistics import spread
from benchmarks.training.harness.summary import ALL_FLOPS, FEW, FULL, SECONDS, Summaries, Summary

WIDTH = 8.2  # inches
COSTS = {
    ALL_FLOPS: "FLOPs, all counted", "memory_peak": "peak memory of a step",
    SECONDS: "CPU seconds",
}  # fmt: skip
STYLES: dict[str, tuple[str, str]] = {
    "full rank": ("#111111", "*"),
    "fixed": ("#1f6fb2", "o"),
    "narrower": ("#8a5fbf", "s"),
    "shorter": ("#c2255c", "v"),
    "decay": ("#d9480f", "D"),
    "decay, 32 batches": ("#e8a77c", "d"),
    "full first": ("#f08c00", "D"),
    "paper": ("#2b8a3e", "^"),
    "other": ("#5c636a", "."),
}
"""Color and mark of each kind of arm."""


_ACROSS = ((5, "left"), (-5, "right"), (0, "center"))
_UP = ((2, "bottom"), (-2, "top"), (7, "bottom"), (-7, "top"))


def _kind(found: Summaries, arm: str) -> str:
    """The kind of an arm; of two decays of one budget, that on more batches is of its own kind."""
    return "decay, 32 batches" if f"{arm}{FEW}" in found.arms else kind(arm)


def fronts(found: Summaries, path: Path) -> None:
    """Quality against each cost that is known, relative to full rank, with standard deviations."""
    known = {cost: words for cost, words in COSTS.items() if found.all_know(cost)}
    with figure(path, found, 7.2, "AA;BC" if len(known) > 2 else "AA;BB") as axes:
        for ax, (cost, words) in zip(axes, known.items(), strict=True):
            _front(ax, found, cost, named=("other", "paper") if ax is axes[0] else ("other",))
            ax.set_xlabel(f"{words}, of full rank's")
            ax.set_ylabel(_label(found))
        _legend(axes)


def _of_related(found: Summaries, arm: str) -> bool:
    """Whether it is the fixed low rank beside a related method; these are in the tables only."""
    spends = found.experiment.by_name[arm].spends
    return spends is not None and kind(spends) == OTHER


def overview(all_found: list[Summaries], path: Path) -> None:
    """Quality against FLOPs for some problems, with the main arms only."""
    panels = mosaic(len(all_found), across=2 if len(all_found) in (2, 4) else 4)
    with figure(path, all_found, 0.4 + 2.7 * len(panels.split(";")), panels) as axes:
        for ax, found in zip(axes, all_found, strict=True):
            _front(ax, found, ALL_FLOPS, without=("other", "decay, 32 batches"))
            ax.set_title(found.experiment.short, fontsize=10)
            ax.set_xlabel("FLOPs, of full rank's")
            ax.set_ylabel(_label(found))
        _legend(axes)


def _front(
    ax: Any, found: Summaries, cost: str, named: Sequence[str] = (), without: Sequence[str] = ()
) -> None:
    full = found.arms[FULL]
    ax.axhline(full.result, color="#111111", lw=0.8, ls=":")
    labels: list[tuple[str, float, float, str]] = []
    for group, (color, mark) in STYLES.items():
        chosen = [a for a in found.arms.values() if _kind(found, a.arm) == group]
        chosen = [a for a in chosen if not _of_related(found, a.arm)]
        if "other" in without:  # then it shows the main arms only
            chosen = [a for a in chosen if found.experiment.by_name[a.arm].penalty is None]
        if not chosen or group in without:
            continue
        points = sorted((found.share(a.arm, cost), a.result, spread(list(a.values.values())), a.arm)
                        for a in chosen)  # fmt: skip
        x, y, error, names = zip(*points, strict=True)
        size = 10 if mark in "*." else 6  # these two look small
        joined = "-" if group in ("fixed", "decay", "narrower", "shorter") else ""
        ax.errorbar(x, y, error, color=color, marker=mark, ls=joined, lw=1, ms=size, label=group,
                    capsize=2, elinewidth=0.8)  # fmt: skip
        if group in named:
            for a, b, name in zip(x, y, names, strict=True):
                labels.append((name.removeprefix(f"{group}, "), a, b, color))
    if not found.experiment.higher and not ax.yaxis_inverted():
        ax.invert_yaxis()  # better is up, everywhere
    ax.grid(alpha=0.25)
    _name(ax, labels)


def _name(ax: Any, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names beside their marks, each where it covers the fewest marks and other names."""
    drawn = ax.figure
    drawn.draw_without_rendering()  # from here the axes have their places
    marks = [xy for bars in ax.containers for xy in ax.transData.transform(bars[0].get_xydata())]
    taken: list[Any] = []
    for name, x, y, color in sorted(labels, key=lambda label: label[1:3]):
        tried: list[tuple[float, int, Any]] = []
        for i, ((dx, ha), (dy, va)) in enumerate(product(_ACROSS, _UP)):
            text = ax.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha,
                               va=va, fontsize=7, color=color)  # fmt: skip
            box = text.get_window_extent()
            outside = not (ax.bbox.x0 < box.x0 and box.x1 < ax.bbox.x1)
            bad = 9 * outside + box.count_contains(marks) + 2 * box.count_overlaps(taken)
            tried.append((bad, i, text))
        *_, best = min(tried)
        taken.append(best.get_window_extent())
        for *_, text in tried:
            if text is not best:
                text.remove()


def _label(found: Summaries) -> str:
    return "loss (better is up)" if found.metric == "loss" else f"{found.metric}, %"


def _legend(axes: Sequence[Any], most: int = 9) -> None:
    """Above the picture, what its parts show; of more than ``most`` the first, middle, last."""
    handles: dict[str, Any] = {}
    for ax in axes:
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    labels = list(handles)
    if len(labels) > most:
        labels = [labels[0], labels[len(labels) // 2], labels[-1]]
    shown = [handles[label] for label in labels]
    columns = len(labels) if len(labels) < most else 5
    place = {"loc": "outside upper center", "ncols": columns, "columnspacing": 1.2}
    axes[0].figure.legend(shown, labels, frameon=False, handlelength=1.6, **place)


def lambdas(found: Summaries, arms: list[str], path: Path) -> None:
    """Lambda of each layer over the run, means over seeds; dashed: inflation and deflation."""
    arms = [name for name in arms if name in found.arms]
    rows = (len(arms) + 1) // 2
    with figure(path, found, 0.4 + 2.8 * rows, mosaic(len(arms), across=2), sharey=True) as axes:
        for ax, name in zip(axes, arms, strict=True):
            _lambdas(ax, found.arms[name])
            ax.set_title(name, fontsize=10)
            ax.set_xlabel("share of the run")
        for ax in axes[::2]:
            ax.set_ylabel("lambda at 1/4 of the rank")
        _legend(axes)


def _lambdas(ax: Any, one: Summary) -> None:
    points = [run["points"] for run in one.runs]
    steps = one.runs[0]["steps"]
    layers = list(points[0][0]["spectra"])
    for i, layer in enumerate(layers):
        values = [
            sum(p[k]["spectra"][layer][2] for p in points) / len(points)
            for k in range(len(points[0]))
        ]
        color = (0.1, 0.35 + 0.3 * i / len(layers), 0.15 + 0.75 * i / max(1, len(layers) - 1))
        ax.plot([p["step"] / steps for p in points[0]], values, color=color, label=layer)
    for change in one.runs[0]["changes"]:
        if change["step"]:
            ax.axvline(change["step"] / steps, color="#888888", ls="--", lw=0.8)
    ax.grid(alpha=0.25)


def weights(found: Summaries, arms: list[str], path: Path) -> None:
    """The singular values of the final weights of the first seed, relative to the largest."""
    arms = [a for a in arms if a in found.arms and "values" in found.arms[a].runs[0]]
    if not arms:
        raise ValueError(f"{found.name}: no record of a first seed has its singular values")
    layers = list(found.arms[arms[0]].runs[0]["values"])
    shown = [layers[0], layers[len(layers) // 2], layers[-1]]
    with figure(path, found, 3.2, "ABC", sharey=True) as axes:
        for ax, layer in zip(axes, shown, strict=True):
            for name in arms:
                values = found.arms[name].runs[0]["values"][layer]
                color = STYLES[kind(name)][0]
                style = "--" if "low-rank" in name else "-"
                ax.plot([v / values[0] for v in values], color=color, ls=style, label=name)
            ax.set_yscale("log")
            ax.set_ylim(1e-3, 1.3)
            ax.set_title(layer, fontsize=10)
            ax.set_xlabel("index")
            ax.grid(alpha=0.25)
        axes[0].set_ylabel("singular value, of the largest")
        axes[0].legend(fontsize=7, frameon=False)


def times(found: Summaries, path: Path) -> None:
    """The result for each pair of times of inflation and deflation, and its FLOPs."""
    cells = [name for name in found.arms if " to " in name]
    pairs = {name: tuple(map(float, name.split(" to "))) for name in cells}
    begins, ends = (sorted({pair[i] for pair in pairs.values()}) for i in (0, 1))
    results = [found.arms[name].result for name in cells]
    least, most = min(results), max(results)
    with figure(path, found, 5, "A") as axes:
        (ax,) = axes
        for name, (begin, end) in pairs.items():
            one = found.arms[name]
            x, y = ends.index(end), begins.index(begin)
            ax.scatter([x], [y], c=[one.result], s=2600, marker="s", cmap="viridis",
                       vmin=least, vmax=most)  # fmt: skip
            bright = one.result > (least + 2 * most) / 3
            ax.text(x, y, f"{one.result:.2f}\n{one.mean('flops'):.2f}x", ha="center",
                    va="center", fontsize=8, color="black" if bright else "white")  # fmt: skip
        ax.set_xticks(range(len(ends)), [f"{e:g}" for e in ends])
        ax.set_yticks(range(len(begins)), [f"{b:g}" for b in begins])
        ax.set_xlabel("deflate at")
        ax.set_ylabel("inflate at")
        ax.margins(0.25)


def digest(found: Summaries | list[Summaries]) -> str:
    """What a picture of these summaries is drawn from, in short."""
    several = found if isinstance(found, list) else [found]
    runs = [run for one in several for arm in one.arms.values() for run in arm.runs]
    runs += [{arm: one.further(arm) for arm in one.arms} for one in several]
    return _hash(json.dumps(runs, sort_keys=True))


def sealed(picture: str) -> str:
    """A picture that carries a digest of itself at its end."""
    return f"{picture}<!-- {_hash(picture)} -->\n"


def is_of(picture: str, found: Summaries | list[Summaries]) -> bool:
    """Whether a picture is as it was drawn, from these records."""
    drawn = picture[: picture.rfind("<!-- ")]
    return f"records {digest(found)}" in drawn and picture == sealed(drawn)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def mosaic(panels: int, across: int) -> str:
    """Panels in rows.

    Example:
        >>> mosaic(4, 2), mosaic(5, 3), mosaic(1, 2)
        ('AB;CD', 'ABC;DE.', 'A')
    """
    letters = "".join(chr(ord("A") + i) for i in range(panels))
    rows = [letters[i : i + across] for i in range(0, panels, across)]
    return ";".join(row.ljust(min(across, panels), ".") for row in rows)


@contextmanager
def figure(
    path: Path, found: Any, height: float, panels: str, sharey: bool = False
) -> Iterator[list[Any]]:
    """Axes of a picture that is written at the end; it carries the digest of its records.

    Args:
        path: the file.
        found: what it is drawn from.
        height: in inches; it is as wide as a page, so that a page shows letters at their size.
        panels: the axes as a mosaic: "AA;BC" is a wide one above two.
        sharey: whether all have one y axis.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "dynarank", "svg.fonttype": "none", "font.size": 9}):
        drawn, axes = plt.subplot_mosaic(
            panels, figsize=(WIDTH, height), sharey=sharey, layout="constrained"
        )
        yield list(axes.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        about = {"Date": None, "Description": f"records {digest(found)}"}
        drawn.savefig(text, format="svg", metadata=about)
        path.write_text(sealed(text.getvalue()), encoding="utf-8")
        plt.close(drawn)
