"""The rank metrics of two checkpoints in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dynarank.monitors.singular_values import effective_rank
from dynarank.report.plotting import depth_colormap, display_name, new_figure, plain_tick, styled
from dynarank.report.spectra import rank_share, sound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["spectrum_pair_figure"]

_FLOOR = 1e-3
_COLORS = ("#0072B2", "#D55E00")
_LINES = ("-", "--")


@styled
def spectrum_pair_figure(
    models: Mapping[str, Mapping[str, Sequence[float]]], limit: int = 40
) -> Figure:
    """Plot the rank metrics of two models from their singular values (sorted, largest first).

    Left: ``s_i / s_1`` against ``i / n``, the first model's layers solid, the second's dashed, the
    same layer in the same color. Right: effective ranks as shares of the full rank, for at most
    ``limit`` layers: those that differ most, then those that only one model has.

    Args:
        models: the singular values of each layer, by model name; two models.
        limit: how many layers have bars.

    Raises:
        ValueError: there are not two models, or no layer at all.
    """
    if len(models) != 2:
        raise ValueError(f"expected two models with different names, got {list(models)}")
    names = list(dict.fromkeys(name for spectra in models.values() for name in spectra))
    if not names:
        raise ValueError("there is no layer to draw: neither model has one")
    kept = _most_different(models, names, limit)
    figure = new_figure(11, max(4.2, 1.3 + 0.27 * len(kept)))
    left, right = figure.subplots(1, 2, width_ratios=[4, 5])
    _lines(left, models, names)
    _bars(right, models, kept, len(names))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=1)
    return figure


def _effective(spectra: Mapping[str, Sequence[float]], name: str) -> float | None:
    values = spectra.get(name)
    return rank_share(values, effective_rank) if values else None


def _most_different(
    models: Mapping[str, Mapping[str, Sequence[float]]], names: list[str], limit: int
) -> list[str]:
    def difference(name: str) -> float:
        first, second = (_effective(spectra, name) for spectra in models.values())
        return -1.0 if first is None or second is None else abs(second - first)

    kept = set(sorted(names, key=difference, reverse=True)[:limit])
    return [name for name in names if name in kept]


def _lines(
    axes: Axes, models: Mapping[str, Mapping[str, Sequence[float]]], names: list[str]
) -> None:
    from matplotlib.ticker import FuncFormatter

    scale, width = depth_colormap(), max(0.5, 1.5 - len(names) / 60)
    for line, spectra in zip(_LINES, models.values(), strict=True):
        for index, name in enumerate(names):
            values = spectra.get(name, ())
            if values and sound(values):
                shares = [(i + 1) / len(values) for i in range(len(values))]
                color = scale(index / max(len(names) - 1, 1))
                heights = [value / values[0] for value in values]
                axes.plot(shares, heights, line, color=color, linewidth=width)
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(_FLOOR, 1.25), xlabel="i / n", ylabel="singular value sᵢ / s₁")
    axes.yaxis.set_major_formatter(FuncFormatter(plain_tick))
    axes.set_title("Singular values: first solid, second dashed")


def _bars(
    axes: Axes,
    models: Mapping[str, Mapping[str, Sequence[float]]],
    names: list[str],
    total: int,
) -> None:
    from matplotlib.ticker import PercentFormatter

    for place, (label, color) in enumerate(zip(models, _COLORS, strict=True)):
        shares = [_effective(models[label], name) or 0.0 for name in names]
        rows = [row - 0.19 + 0.38 * place for row in range(len(names))]
        axes.barh(rows, shares, 0.36, color=color, label=display_name(label, 60))
    axes.set_yticks(range(len(names)), [display_name(name, 34) for name in names], fontsize=8)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), xlabel="share of full rank")
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    cut = f": the {len(names)} of {total} layers that differ most" if len(names) < total else ""
    axes.set_title(f"Effective rank{cut}")
