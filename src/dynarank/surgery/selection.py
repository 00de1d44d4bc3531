"""Which weights a verb means: those named, those ranked already, or those that get cheaper."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from dynarank.forms import LowRank, RankLike
from dynarank.surgery.sites import Site, survey

__all__ = ["LayerFilter", "RankMap", "find_sites", "rank_for", "select"]

logger = logging.getLogger("dynarank")

_Filter: TypeAlias = Callable[[nn.Module, str], bool]
LayerFilter: TypeAlias = _Filter | str | Sequence[str] | None
RankMap: TypeAlias = Mapping[str, RankLike]


def select(
    model: nn.Module, layers: LayerFilter, rank: RankLike | RankMap | None = None,
    decomposition: str = "svd",
) -> list[Site]:  # fmt: skip
    """The sites that a verb means.

    Args:
        model: the model.
        layers: a filter ``(module, path) -> bool``, or glob patterns of paths: exactly those. None:
            those that ``rank`` names, if it is a map; else the ranked weights, or, in a model that
            has none yet, those that ``rank`` makes cheaper (fewer factor entries than weight
            entries; a weight whose rows are looked up costs nothing and is left as it is).
        rank: the rank the weights are to get, or one for each pattern of paths.
        decomposition: of the factors they are to get.

    Raises:
        ValueError: nothing matches, or a weight that matches is refused.
    """
    sites = survey(model)
    ranks = rank if isinstance(rank, Mapping) else None
    if layers is None and ranks is not None:
        layers = list(ranks)
    matching = _by_default(sites) if layers is None else _matching(sites, layers)
    if refused := [site for site in matching if site.refused]:
        reasons = "; ".join(f"layer {site.path!r}: {site.obstacle}" for site in refused)
        raise ValueError(f"{reasons}. Leave it out with layers=..., or undo what is in the way")
    able = [site for site in matching if site.form is not None]
    if layers is None and not _ranked(able):
        asked = [] if rank is None or isinstance(rank, Mapping) else [LowRank(rank, decomposition)]
        able = [site for site in able if any(_cheaper(form, site) for form in asked)]
    if not able:
        raise ValueError(_nothing(layers, rank, sites))
    if left := [site.path for site in sites if site not in able]:
        logger.info("left as they are: %s", ", ".join(left))
    return able


def find_sites(model: nn.Module, paths: Iterable[str]) -> dict[str, Site]:
    """The sites at these paths; a tied weight, or a shared module's, by any of its paths.

    Raises:
        ValueError: a path is not in the model, or what is there cannot change form.
    """
    sites, modules = survey(model), dict(model.named_modules(remove_duplicate=False))
    by_place = {place: site for site in sites for place in _places(site)}
    found: dict[str, Site] = {}
    for path in paths:
        site = by_place.get(_place(path, modules, by_place))
        if site is None:
            raise ValueError(_missing(path, modules, sites))
        if site.form is None:
            raise ValueError(f"layer {path!r} cannot change form: {site.obstacle}")
        found[path] = site
    return found


def rank_for(rank: RankLike | RankMap, path: str) -> RankLike:
    """The rank meant for a path: in a map, that of the first pattern that matches.

    Raises:
        ValueError: the map has no pattern for the path.
    """
    if not isinstance(rank, Mapping):
        return rank
    for pattern, value in rank.items():
        if fnmatchcase(path, pattern):
            return value
    raise ValueError(f"rank names no rank for layer {path!r}; it has: {', '.join(rank)}")


def _by_default(sites: list[Site]) -> list[Site]:
    return _ranked(sites) or [site for site in sites if not _looked_up(site)]


def _ranked(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.last_factored_form is not None]


def _looked_up(site: Site) -> bool:
    return any(one.weight is not None and one.weight.lookup for one in (site, *site.tied))


def _cheaper(form: LowRank, site: Site) -> bool:
    spec = site.spec
    try:
        resolved = spec.resolve(form)
    except ValueError as error:
        if "unknown decomposition" in str(error):
            raise
        return False  # above this weight's limit, so not cheaper than the weight
    assert isinstance(resolved, LowRank)
    factors = sum(math.prod(shape) for shape in spec.factor_shapes(resolved))
    return factors < math.prod(spec.shape)


def _matching(sites: list[Site], layers: _Filter | str | Sequence[str]) -> list[Site]:
    if callable(layers):
        return [s for s in sites if any(layers(one.module, one.path) for one in (s, *s.tied))]
    patterns = [layers] if isinstance(layers, str) else layers
    return [
        site
        for site in sites
        if any(fnmatchcase(one.path, p) for one in (site, *site.tied) for p in patterns)
    ]


def _nothing(layers: LayerFilter, rank: RankLike | RankMap | None, sites: list[Site]) -> str:
    listed = ", ".join(f"{site.path!r} ({site.obstacle or site.form})" for site in sites[:20])
    if layers is not None:
        asked = "the filter" if callable(layers) else repr(layers)
        return f"{asked} matches no layer that can change form; the model has: {listed or 'none'}"
    if rank is None:
        return (
            f"the model has no ranked layer yet; name the layers by layers=... (it has: {listed})"
        )
    return (
        f"rank {rank} makes no layer of the model cheaper (each has a limit of min(m, n) and "
        f"breaks even at mn / (m + n)); lower the rank, or insist with layers='*' "
        f"(the model has: {listed or 'no weights'})"
    )


_Place: TypeAlias = tuple[int, str]


def _places(site: Site) -> list[_Place]:
    """Where a site is: each module of it, and the weight's name there."""
    return [
        (id(one.module), one.weight.name if one.weight else "weight") for one in (site, *site.tied)
    ]


def _place(path: str, modules: Mapping[str, nn.Module], places: Container[_Place]) -> _Place:
    parent, _, name = path.rpartition(".")
    inner = (id(modules.get(parent)), name)
    return inner if inner in places else (id(modules.get(path)), "weight")


def _missing(path: str, modules: Mapping[str, nn.Module], sites: Sequence[Site]) -> str:
    inside = [site.path for site in sites if site.module is modules.get(path)]
    if inside:
        return f"layer {path!r} has several weights: name one of {', '.join(map(repr, inside))}"
    if path in modules:
        return f"layer {path!r} cannot change form: it owns no weight"
    known = [name for name in (*modules, *(site.path for site in sites)) if name]
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(map(repr, near))}" if near else ""
    return f"the model has no layer {path!r}{nearest}"
