"""Which weights a call selects: those named, those ranked already, or those that get cheaper."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from dynarank.forms import LowRank, RankLike
from dynarank.surgery.sites import Site

__all__ = ["LayerFilter", "RankMap", "find_sites", "rank_for", "select"]

logger = logging.getLogger("dynarank")

_Filter: TypeAlias = Callable[[nn.Module, str], bool]
LayerFilter: TypeAlias = _Filter | str | Sequence[str] | None
RankMap: TypeAlias = Mapping[str, RankLike]


def select(
    sites: Sequence[Site],
    layers: LayerFilter,
    rank: RankLike | RankMap | None = None,
    decomposition: str = "svd",
) -> list[Site]:
    """The sites that the arguments of :func:`dynarank.factorize` and its like select.

    Args:
        sites: those of the model, from :func:`survey`.
        layers: which; None: those that ``rank`` names, if it is a map; else those that have or had
            factors, or, if none has, those with fewer factor entries than weight entries (except
            weights whose rows are looked up, which costs nothing).
        rank: the rank the weights are to get, if any.
        decomposition: of the factors they are to get.

    Raises:
        ValueError: nothing matches, or a weight that matches is refused.
    """
    if layers is None and isinstance(rank, Mapping):
        layers = list(rank)
    ranked = [site for site in sites if site.last_factored_form is not None]
    if layers is not None:
        matching = _matching(sites, layers)
    else:
        matching = ranked or [s for s in sites if not any(one.spec.lookup for one in s.places)]
    if refused := [site for site in matching if site.refused]:
        reasons = "; ".join(f"layer {site.path!r}: {site.obstacle}" for site in refused)
        raise ValueError(f"{reasons}. Leave it out with layers=..., or undo what is in the way")
    able = [site for site in matching if site.form is not None]
    if layers is None and not ranked:
        asked = None if rank is None or isinstance(rank, Mapping) else LowRank(rank, decomposition)
        able = [site for site in able if asked and _cheaper(asked, site)]
    if not able:
        raise ValueError(_nothing(layers, rank, sites))
    if left := [site.path for site in sites if site not in able]:
        logger.info("left as they are: %s", ", ".join(left))
    return able


def find_sites(model: nn.Module, sites: Sequence[Site], paths: Iterable[str]) -> dict[str, Site]:
    """The sites at these paths; a tied weight, or a shared module's, by any of its paths.

    Raises:
        ValueError: a path is not in the model, or what is there cannot change form.
    """
    by_path = {path: site for site in sites for one in site.places for path in _paths(one)}
    found: dict[str, Site] = {}
    for path in paths:
        if path not in by_path:
            raise ValueError(_missing(path, model, sites))
        if by_path[path].form is None:
            raise ValueError(f"layer {path!r} cannot change form: {by_path[path].obstacle}")
        found[path] = by_path[path]
    return found


def rank_for(rank: RankLike | RankMap, path: str) -> RankLike:
    """The rank meant for a path: in a map, that of the first pattern that matches."""
    if not isinstance(rank, Mapping):
        return rank
    for pattern, value in rank.items():
        if fnmatchcase(path, pattern):
            return value
    raise ValueError(f"rank names no rank for layer {path!r}; it has: {', '.join(rank)}")


def _cheaper(form: LowRank, site: Site) -> bool:
    decomposition = site.spec.decomposition(form)  # an unknown one is an error
    try:
        rank = decomposition.resolve_rank(form.rank, site.shape)
    except ValueError:
        return False  # above this weight's limit, so not cheaper than the weight
    return decomposition.size(site.shape, rank) < math.prod(site.shape)


def _matching(sites: Sequence[Site], layers: _Filter | str | Sequence[str]) -> list[Site]:
    patterns = [layers] if isinstance(layers, str) else layers

    def matches(site: Site) -> bool:
        if callable(patterns):
            return patterns(site.module, site.path)
        return any(fnmatchcase(site.path, pattern) for pattern in patterns)

    return [site for site in sites if any(map(matches, site.places))]


def _nothing(layers: LayerFilter, rank: RankLike | RankMap | None, sites: Sequence[Site]) -> str:
    listed = ", ".join(f"{site.path!r} ({site.obstacle or site.form})" for site in sites[:20])
    if layers is not None:
        asked = "the filter" if callable(layers) else repr(layers)
        why = f"{asked} matches no layer that can change form"
    elif rank is None:
        why = "the model has no ranked layer yet; name the layers by layers=..."
    elif all(site.form is None for site in sites):
        why = "no layer of the model can change form"
    else:
        why = (
            f"rank {rank} makes no layer of the model cheaper (each has a limit of min(m, n) and "
            "breaks even at mn / (m + n)); lower the rank, or insist with layers='*'"
        )
    return f"{why}; the model has: {listed or 'no weights'}"


def _paths(site: Site) -> list[str]:
    """The paths a site is found by: with the weight's name, and without if it is ``weight``."""
    name = site.spec.name
    named = [f"{path}.{name}".lstrip(".") for path in site.module_paths]
    return [*named, *site.module_paths] if name == "weight" else named


def _missing(path: str, model: nn.Module, sites: Sequence[Site]) -> str:
    if inside := [site.path for site in sites if path in site.module_paths]:
        return f"layer {path!r} has several weights: name one of {', '.join(map(repr, inside))}"
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if path in modules:
        return f"layer {path!r} cannot change form: it owns no weight"
    known = [name for name in (*modules, *(site.path for site in sites)) if name]
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(map(repr, near))}" if near else ""
    return f"the model has no layer {path!r}{nearest}"
