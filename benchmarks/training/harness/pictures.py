"""The pictures of docs/evidence.md, from the records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.training.harness.statistics import spread
from benchmarks.training.harness.summary import FULL, Summaries, Summary

COSTS = {
    "flops": "training FLOPs", "memory_peak": "peak memory of a step",
    "cpu_seconds": "CPU seconds",
}  # fmt: skip
GROUPS: dict[str, tuple[str, str]] = {
    "full rank": ("#111111", "*"),
    "fixed": ("#1f6fb2", "o"),
    "narrower": ("#8a5fbf", "s"),
    "shorter": ("#c2255c", "v"),
    "decay": ("#d9480f", "D"),
    "full first": ("#f08c00", "D"),
    "paper": ("#2b8a3e", "^"),
    "other": ("#868e96", "."),
}
"""Color and mark of each kind of arm, by how its name begins."""


def group(arm: str) -> str:
    """The kind of an arm."""
    return next((name for name in GROUPS if arm.startswith(name)), "other")


def fronts(found: Summaries, path: Path) -> None:
    """Quality against each cost, relative to full rank, with standard deviations."""
    with figure(path, found, (12, 4.2), columns=len(COSTS)) as axes:
        for ax, (cost, words) in zip(axes, COSTS.items(), strict=True):
            _front(ax, found, cost)
            ax.set_xlabel(f"{words}, of full rank's")
        axes[0].set_ylabel(_label(found))
        _legend(axes[0])


def overview(all_found: list[Summaries], path: Path) -> None:
    """Quality against FLOPs for some problems, with the main arms only."""
    with figure(path, all_found, (4.2 * len(all_found), 4.2), columns=len(all_found)) as axes:
        for ax, found in zip(axes, all_found, strict=True):
            _front(ax, found, "flops", others=False)
            ax.set_title(found.experiment.title.partition(",")[0], fontsize=10)
            ax.set_xlabel("training FLOPs, of full rank's")
            ax.set_ylabel(_label(found))
        _legend(axes[0])


def _front(ax: Any, found: Summaries, cost: str, others: bool = True) -> None:
    full = found.arms[FULL]
    scale = full.mean(cost)
    ax.axhline(full.result, color="#111111", lw=0.8, ls=":")
    for kind, (color, mark) in GROUPS.items():
        chosen = [a for a in found.arms.values() if group(a.arm) == kind]
        chosen = [a for a in chosen if " as " not in a.arm]
        if not chosen or (kind == "other" and not others):
            continue
        points = sorted((a.mean(cost) / scale, a.result, spread(list(a.values.values())), a.arm)
                        for a in chosen)  # fmt: skip
        x, y, error, names = zip(*points, strict=True)
        joined = "-" if kind in ("fixed", "decay", "narrower", "shorter") else ""
        ax.errorbar(x, y, error, color=color, marker=mark, ls=joined, lw=1, ms=6, label=kind,
                    capsize=2, elinewidth=0.8)  # fmt: skip
        if kind == "other":
            for a, b, name in zip(x, y, names, strict=True):
                _name(ax, name, a, b, color, left=a > 0.75 * max(x))
    if not found.experiment.higher and not ax.yaxis_inverted():
        ax.invert_yaxis()  # better is up, everywhere
    ax.grid(alpha=0.25)


def _name(ax: Any, name: str, x: float, y: float, color: str, left: bool) -> None:
    """Write the name beside a mark, on the side that is within the picture."""
    offset, side = ((-4, 3), "right") if left else ((4, 3), "left")
    ax.annotate(name, (x, y), fontsize=6.5, color=color, xytext=offset,
                textcoords="offset points", ha=side)  # fmt: skip


def _label(found: Summaries) -> str:
    return "loss (better is up)" if found.metric == "loss" else f"{found.metric}, %"


def _legend(ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    ax.figure.legend(handles, labels, loc="outside upper center", ncols=8, frameon=False)


def lambdas(found: Summaries, arms: list[str], path: Path) -> None:
    """Lambda of each layer over the run, means over seeds; dashed: inflation and deflation."""
    arms = [name for name in arms if name in found.arms]
    with figure(path, found, (4 * len(arms), 3.6), columns=len(arms), sharey=True) as axes:
        for ax, name in zip(axes, arms, strict=True):
            _lambdas(ax, found.arms[name])
            ax.set_title(name, fontsize=10)
            ax.set_xlabel("share of the run")
        axes[0].set_ylabel("lambda at 1/4 of the rank")
        _legend(axes[0])


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
        return
    layers = list(found.arms[arms[0]].runs[0]["values"])
    shown = [layers[0], layers[len(layers) // 2], layers[-1]]
    with figure(path, found, (12, 3.6), columns=3, sharey=True) as axes:
        for ax, layer in zip(axes, shown, strict=True):
            for name in arms:
                values = found.arms[name].runs[0]["values"][layer]
                color = GROUPS[group(name)][0]
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
    with figure(path, found, (5.6, 4)) as axes:
        (ax,) = axes
        for name, (begin, end) in pairs.items():
            one = found.arms[name]
            x, y = ends.index(end), begins.index(begin)
            ax.scatter([x], [y], c=[one.result], s=2600, marker="s", cmap="viridis",
                       vmin=min(found.arms[c].result for c in cells),
                       vmax=max(found.arms[c].result for c in cells))  # fmt: skip
            ax.text(x, y, f"{one.result:.2f}\n{one.mean('flops'):.2f}x", ha="center",
                    va="center", fontsize=8, color="white")  # fmt: skip
        ax.set_xticks(range(len(ends)), [f"{e:g}" for e in ends])
        ax.set_yticks(range(len(begins)), [f"{b:g}" for b in begins])
        ax.set_xlabel("deflate at")
        ax.set_ylabel("inflate at")
        ax.margins(0.25)


def digest(found: Summaries | list[Summaries]) -> str:
    """What a picture of these summaries is drawn from, in short."""
    several = found if isinstance(found, list) else [found]
    runs = [run for one in several for arm in one.arms.values() for run in arm.runs]
    return hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def figure(
    path: Path, found: Any, size: tuple[float, float], columns: int = 1, sharey: bool = False
) -> Iterator[Any]:
    """Axes of a picture that is written at the end; it carries the digest of its records."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "dynarank", "svg.fonttype": "none", "font.size": 9}):
        drawn, axes = plt.subplots(
            1, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained"
        )
        yield list(axes[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"records {digest(found)}"}
        drawn.savefig(path, metadata=about)
        plt.close(drawn)


Draw = Callable[[Path], None]
