"""The survey of a model: its weights as a list that prints as a table."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from dynarank.forms import Adapted, Form, FullRank, LowRank, RankLike
from dynarank.layers import Call, choose_execution
from dynarank.surgery.selection import LayerFilter, RankMap, rank_for, why_left
from dynarank.surgery.site import Site

__all__ = ["Survey", "grouped"]

_K = TypeVar("_K", bound=Hashable)

_PATH, _SHAPE, _NOTE = 32, 14, 30  # columns, 80 with the spaces between them
_ROWS, _SIDE = 1 << 20, 64  # a large batch: rows of a linear layer, positions of a convolution


class Survey(list[Site]):
    """The weights of a model; a list, which prints as a table of 80 columns.

    A path too long for its column has a line of its own. FLOPs are those of a training step at each
    position of a large input, relative to full rank.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        model: nn.Module,
        rank: RankLike | RankMap | None = None,
        layers: LayerFilter = None,
        decomposition: str = "svd",
    ) -> None:
        super().__init__(sites)
        self._forms, self._notes = _outcome(self, rank, layers, decomposition)
        self._parameters = sum(p.numel() for p in model.parameters() if not is_lazy(p))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [
            (site.path, _shape(site), note or _costs(site, form))
            for site, form, note in zip(self, self._forms, self._notes, strict=True)
        ]
        head = f"{'layer':{_PATH}} {'weight':{_SHAPE}} {'form':14}{'params':>8}{'FLOPs':>8}"
        return "\n".join([head, *_lines(rows), *self._totals()])

    def _totals(self) -> list[str]:
        pairs = list(zip(self, self._forms, strict=True))
        chosen = [(s, form) for s, form in pairs if not isinstance(form, FullRank)]
        full = sum(math.prod(site.shape) for site, _ in chosen)
        after = sum(site.entries(form) for site, form in chosen)
        whole = self._parameters + sum(math.prod(s.shape) - s.entries() for s, _ in pairs)
        then = self._parameters + sum(s.entries(form) - s.entries() for s, form in pairs)
        if not chosen:
            return [f"no weight with factors; {whole:,} parameters"]
        return [
            f"{len(chosen)} of {len(self)} weights: {_ratio(after, full)} of {full:,} parameters",
            f"the model: {_ratio(then, whole)} of {whole:,} parameters",
        ]


def _outcome(
    sites: Sequence[Site],
    rank: RankLike | RankMap | None,
    layers: LayerFilter,
    decomposition: str,
) -> tuple[list[Form], list[str]]:
    """The form that each weight has or would get, and why it has no factors."""
    forms = [site.form or FullRank() for site in sites]
    if rank is None:
        left = [site.obstacle or site.left_out for site in sites]
        full = [isinstance(form, FullRank) for form in forms]
        return forms, [why if f else "" for why, f in zip(left, full, strict=True)]
    notes = why_left(sites, layers, rank, decomposition)
    for i, (site, note) in enumerate(zip(sites, notes, strict=True)):
        if not note:
            forms[i] = site.spec.resolve(LowRank(rank_for(rank, site), decomposition))
    return forms, notes


def _lines(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """The rows, those of like blocks in one line."""
    lines: list[str] = []
    for name, (shape, note) in grouped((path, (shape, note)) for path, shape, note in rows):
        first, *more = textwrap.wrap(note, _NOTE, break_on_hyphens=False)
        if len(name) > _PATH:  # on a line of its own: cut, two layers could look the same
            lines.append(name)
            name = ""
        lines.append(f"{name:{_PATH}} {shape:{_SHAPE}} {first}")
        lines += [" " * (_PATH + _SHAPE + 2) + line for line in more]
    return lines


def grouped(rows: Iterable[tuple[str, _K]]) -> list[tuple[str, _K]]:
    """Rows by path, of like blocks (paths that differ in numbers only, equal rows) one each.

    Example:
        >>> grouped([("h.0.fc", "8x8"), ("h.1.fc", "8x8"), ("head", "8x2")])
        [('h.{0..1}.fc x2', '8x8'), ('head', '8x2')]
    """
    groups: dict[tuple[tuple[str, ...], _K], list[list[str]]] = {}
    for path, row in rows:
        parts = path.split(".")
        like = tuple("" if part.isdigit() else part for part in parts)
        groups.setdefault((like, row), []).append([part for part in parts if part.isdigit()])
    named: list[tuple[str, _K]] = []
    for (like, row), numbers in groups.items():
        times = f" x{len(numbers)}" if len(numbers) > 1 else ""
        spans = map(_span, zip(*numbers, strict=True))
        name = ".".join(part or next(spans, "") for part in like) or "(the model)"
        named.append((name + times, row))
    return named


def _span(numbers: tuple[str, ...]) -> str:
    """The numbers of one place in the paths: ``7``, ``{0,3}`` or ``{0..11}``."""
    values = sorted({int(number) for number in numbers})
    if len(values) == 1:
        return str(values[0])
    dense = values == list(range(values[0], values[-1] + 1))
    return f"{{{values[0]}..{values[-1]}}}" if dense else f"{{{','.join(map(str, values))}}}"


def _shape(site: Site) -> str:
    return "x".join(map(str, site.shape))


def _costs(site: Site, form: Form) -> str:
    form = site.spec.resolve(form)
    flops = "-" if site.spec.lookup else _ratio(_flops(site, form), _flops(site, FullRank()))
    return f"{_name(form):14}{_ratio(site.entries(form), math.prod(site.shape)):>8}{flops:>8}"


def _name(form: Form) -> str:
    if isinstance(form, FullRank):
        return "full-rank"
    kind = "adapted" if isinstance(form, Adapted) else "low-rank"
    return f"{kind if form.decomposition == 'svd' else form.decomposition} {form.rank}"


def _flops(site: Site, form: Form) -> int:
    """The training FLOPs of a large batch."""
    geometry, dims = site.spec.geometry, site.spec.dims
    channels = site.shape[1] * geometry.groups
    shape = (1, channels, *[_SIDE] * dims) if dims else (_ROWS, channels)
    call = Call(shape, geometry, input_grad=True, trains=True)
    return choose_execution(site.spec, form, call).flops.training


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}x" if whole else "-"
