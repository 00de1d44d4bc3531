"""The rank metrics of one checkpoint: singular values, effective and stable rank per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynarank.monitors.singular_values import effective_rank, stable_rank
from dynarank.report.plotting import depth_colormap, display_name, new_figure, plain_tick, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["rank_share", "sound", "spectrum_figure"]

_FLOOR = 1e-3
_FEW_LAYERS = 4
_EFFECTIVE, _STABLE = "#0072B2", "#E69F00"


@styled
def spectrum_figure(
    spectra: Mapping[str, Sequence[float]], title: str | None = None, limit: int = 40
) -> Figure:
    """Plot the rank metrics of each layer from its singular values (sorted, largest first).

    Left: ``s_i / s_1`` against ``i / n``, one line per layer. Right: effective and stable rank as
    shares of the full rank ``n``, for the ``limit`` layers with the lowest effective rank.

    Raises:
        ValueError: there is no layer, or a layer has no singular value.

    """
    _check(spectra)
    kept = _lowest(spectra, limit)
    height = max(4.2, 1.3 + 0.27 * len(kept))
    figure = new_figure(11, height)
    grid = figure.add_gridspec(
        2, 2, width_ratios=[4, 5], height_ratios=[4.2, max(height - 4.2, 1e-3)]
    )
    left = figure.add_subplot(grid[0, 0] if height > 4.2 else grid[:, 0])
    _spectrum_lines(figure, left, spectra)
    bars = figure.add_subplot(grid[:, 1])
    _rank_bars(bars, {name: spectra[name] for name in kept}, len(spectra))
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    if title:
        figure.suptitle(display_name(title, 80), fontsize=11)
    return figure


def _check(spectra: Mapping[str, Sequence[float]]) -> None:
    if not spectra:
        raise ValueError("there is no layer to draw: spectra is empty")
    empty = [name for name, values in spectra.items() if len(values) == 0]
    if empty:
        raise ValueError(f"layer {empty[0]!r} has no singular value")


def sound(values: Sequence[float]) -> bool:
    """Whether a spectrum can be drawn: finite and not all zero."""
    return all(map(math.isfinite, values)) and max(values) > 0


def rank_share(values: Sequence[float], rank: Callable[[Tensor], float]) -> float:
    """A rank metric as a share of the full rank; 0 for a spectrum that cannot be drawn."""
    exact = torch.tensor(values, dtype=torch.float64)
    return rank(exact) / len(values) if sound(values) else 0.0


def _lowest(spectra: Mapping[str, Sequence[float]], limit: int) -> list[str]:
    """The ``limit`` layers with the lowest effective rank, in their original order."""
    ranked = sorted(spectra, key=lambda name: rank_share(spectra[name], effective_rank))
    kept = set(ranked[:limit])
    return [name for name in spectra if name in kept]


def _spectrum_lines(figure: Figure, axes: Axes, spectra: Mapping[str, Sequence[float]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    few = len(spectra) <= _FEW_LAYERS
    scale = depth_colormap()
    for index, (name, values) in enumerate(spectra.items()):
        shares = [(i + 1) / len(values) for i in range(len(values))]
        heights = [value / values[0] for value in values] if sound(values) else []
        color = scale(index / max(len(spectra) - 1, 1))
        width = 1.6 if few else max(0.5, 1.3 - len(spectra) / 100)
        axes.plot(
            shares[: len(heights)], heights, color=color, linewidth=width, label=display_name(name)
        )
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(_FLOOR, 1.25), xlabel="i / n", ylabel="singular value sᵢ / s₁")
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
    axes.set_title("Singular values, largest first")
    if few:
        axes.legend(loc="lower left")
    else:
        mapped = ScalarMappable(Normalize(1, len(spectra)), scale)
        bar = figure.colorbar(mapped, ax=axes, location="bottom", aspect=45, pad=0.02)
        bar.set_label("depth: first layer to last")
        bar.outline.set_visible(False)  # type: ignore[operator]


def _rank_bars(axes: Axes, spectra: Mapping[str, Sequence[float]], total: int) -> None:
    from matplotlib.ticker import PercentFormatter

    rows = range(len(spectra))
    effective = [rank_share(values, effective_rank) for values in spectra.values()]
    stable = [rank_share(values, stable_rank) for values in spectra.values()]
    axes.barh(
        [row - 0.19 for row in rows], effective, 0.36, color=_EFFECTIVE, label="effective rank"
    )
    axes.barh([row + 0.19 for row in rows], stable, 0.36, color=_STABLE, label="stable rank")
    for row, values in zip(rows, spectra.values(), strict=True):
        if not sound(values):
            axes.text(0.01, row, "zero or not finite", va="center", fontsize=8, color="#a40e26")
    axes.set_yticks(list(rows), [display_name(name, 34) for name in spectra], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(spectra) - 0.4, -0.6), xlabel="share of full rank")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    cut = f": lowest {len(spectra)} of {total} layers" if len(spectra) < total else ""
    axes.set_title(f"Effective and stable rank{cut}")
