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
from dynarank.surgery.site import Site

__all__ = [
    "LayerFilter",
    "RankMap",
    "candidates",
    "find_sites",
    "has_factors",
    "rank_for",
    "select",
    "why_left",
]

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
            factors, or, if none has, those with fewer factor entries than weight entries that
            :mod:`dynarank.surgery.defaults` does not leave out.
        rank: the rank the weights are to get, if any.
        decomposition: of the factors they are to get.

    Raises:
        ValueError: nothing matches, or one of the patterns matches nothing, or a weight that
            matches is refused.
    """
    layers, apart = _apart(sites, layers, rank)
    if refused := [s for s, why in zip(sites, apart, strict=True) if s.refused and not why]:
        reasons = "; ".join(f"layer {site.path!r}: {site.obstacle}" for site in refused)
        raise ValueError(f"{reasons}. Leave it out with layers=..., or undo what is in the way")
    left = _left(sites, layers, rank, decomposition, apart)
    able = [site for site, why in zip(sites, left, strict=True) if not why]
    if not able:
        raise ValueError(_nothing(layers, rank, sites, left))
    if len(able) < len(sites):
        paths = [site.path for site, why in zip(sites, left, strict=True) if why]
        logger.info("left as they are: %s", ", ".join(paths))
    return able


def candidates(sites: Sequence[Site]) -> list[Site]:
    """The sites that can change form and have factors already or are not left by default."""
    return [s for s in sites if s.form is not None and (s.last_factored_form or not s.left_out)]


def why_left(
    sites: Sequence[Site],
    layers: LayerFilter,
    rank: RankLike | RankMap | None = None,
    decomposition: str = "svd",
) -> list[str]:
    """Why each of the sites is left by :func:`select`; empty for those that it selects."""
    layers, apart = _apart(sites, layers, rank)
    return _left(sites, layers, rank, decomposition, apart)


def _left(
    sites: Sequence[Site],
    layers: LayerFilter,
    rank: RankLike | RankMap | None,
    decomposition: str,
    apart: Sequence[str],
) -> list[str]:
    left = [site.obstacle or why for site, why in zip(sites, apart, strict=True)]
    if layers is not None or has_factors(sites):
        return left
    if rank is None or isinstance(rank, Mapping):
        return [why or "no rank is given" for why in left]
    form = LowRank(rank, decomposition)
    return [why or _no_cheaper(form, site) for site, why in zip(sites, left, strict=True)]


def _apart(
    sites: Sequence[Site], layers: LayerFilter, rank: RankLike | RankMap | None
) -> tuple[LayerFilter, list[str]]:
    """The layers named, if any, and why each site is not meant, able to change form or not."""
    if isinstance(rank, Mapping):
        _check_order(rank, sites)
        layers = list(rank) if layers is None else layers
    if layers is not None:
        return layers, ["" if named else "not in layers" for named in _matching(sites, layers)]
    left = [site.left_out for site in sites]
    if has_factors(sites):
        able = [site.last_factored_form is not None for site in sites]
        others = "others have factors already"
        left = ["" if has else why or others for why, has in zip(left, able, strict=True)]
    return None, left


def has_factors(sites: Sequence[Site]) -> bool:
    """Whether any weight has or had factors."""
    return any(site.last_factored_form is not None for site in sites)


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


def rank_for(rank: RankLike | RankMap, site: Site) -> RankLike:
    """The rank meant for a site: in a map, that of the first pattern that matches."""
    if not isinstance(rank, Mapping):
        return rank
    for pattern, value in rank.items():
        if _matches(pattern, site):
            return value
    raise ValueError(f"rank names no rank for layer {site.path!r}; it has: {', '.join(rank)}")


def _no_cheaper(form: LowRank, site: Site) -> str:
    """Why the form costs as much as the weight, or cannot be; empty if it is cheaper."""
    decomposition = site.spec.decomposition(form)  # an unknown one is an error
    try:
        resolved = site.spec.resolve(form)
    except ValueError:
        resolved = form  # above this weight's limit, so not cheaper than the weight
    else:
        if site.entries(resolved) < math.prod(site.shape):
            return ""
    n, m = site.spec.unit_shape[0], math.prod(site.spec.unit_shape[1:])
    even = f" (break-even {m * n / (m + n):.1f})" if decomposition.is_pair else ""
    return f"no cheaper at rank {getattr(resolved, 'rank', form.rank)}{even}"


def _matching(sites: Sequence[Site], layers: _Filter | str | Sequence[str]) -> list[bool]:
    """Whether each site is meant by a filter, or by one of the patterns, all of which mean some."""
    if isinstance(layers, type):
        name = layers.__name__
        raise TypeError(
            f"layers are a filter or glob patterns of paths (str), got the class {name}; for its "
            f"layers give lambda module, path: isinstance(module, {name})"
        )
    if callable(layers):
        return [any(layers(one.module, one.path) for one in site.places) for site in sites]
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        _check_pattern(pattern, sites)
    return [any(_matches(pattern, site) for pattern in patterns) for site in sites]


def _matches(pattern: str, site: Site) -> bool:
    """Whether a pattern matches a path of the site, a tied weight or shared module by any."""
    return any(fnmatchcase(path, pattern) for one in site.places for path in one.paths)


def _check_pattern(pattern: str, sites: Sequence[Site]) -> None:
    """Raise ValueError if a pattern matches no weight that can change form."""
    if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"layers are a filter or glob patterns of paths (str), got {pattern!r}")
    matched = [site for site in sites if _matches(pattern, site)]
    if any(site.form is not None or site.refused for site in matched):
        return
    asked = f"{pattern!r} matches no layer that can change form"
    if matched:
        raise ValueError(f"{asked}, only {_listed(matched, [s.obstacle for s in matched])}")
    paths = [path for site in sites for one in site.places for path in one.paths]
    if inside := [path for path in paths if path.startswith(f"{pattern}.")]:
        raise ValueError(f"{asked}; for those inside it give {f'{pattern}.*'!r} ({inside[0]!r})")
    has = _listed(sites, [site.obstacle or str(site.form) for site in sites])
    near = _nearest(pattern.removesuffix(".weight").strip("*."), paths)
    raise ValueError(f"{asked}{near}; the model has: {has}")


def _check_order(rank: RankMap, sites: Sequence[Site]) -> None:
    """Raise ValueError if a pattern of a map matches nothing, or nothing that is left for it."""
    taken: set[int] = set()
    for pattern in rank:
        _check_pattern(pattern, sites)
        own = {i for i, site in enumerate(sites) if _matches(pattern, site)}
        if own <= taken:
            raise ValueError(
                f"rank {rank[pattern]} of {pattern!r} would never be used: earlier patterns match "
                "the same layers, and the first match counts; put the narrower pattern first"
            )
        taken |= own


def _nothing(
    layers: LayerFilter,
    rank: RankLike | RankMap | None,
    sites: Sequence[Site],
    left: Sequence[str],
) -> str:
    if layers is not None:
        asked = "the filter" if callable(layers) else repr(layers)
        why = f"{asked} matches no layer that can change form"
    elif rank is None:
        why = (
            "no layer has or had factors: factorize the model first, give a rank (deflate), or "
            "name the layers by layers=..."
        )
    elif all(site.form is None for site in sites):
        why = "no layer of the model can change form"
    elif all(site.form is None or site.left_out for site in sites):
        why = "no layer that is taken by default can change form"
    else:
        why = (
            f"rank {rank} makes no layer of the model cheaper (each has a limit of min(m, n) and "
            "breaks even at mn / (m + n)); lower the rank, or insist with layers='*'"
        )
    return f"{why}; the model has: {_listed(sites, left)}"


def _listed(sites: Sequence[Site], reasons: Sequence[str]) -> str:
    pairs = list(zip(sites, reasons, strict=True))[:20]
    return ", ".join(f"{site.path!r} ({reason})" for site, reason in pairs) or "no weights"


def _nearest(path: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, near))}" if near else ""


def _paths(site: Site) -> list[str]:
    """The paths a site is found by: with the weight's name, and without if it is ``weight``."""
    named = [f"{path}.{site.spec.name}".lstrip(".") for path in site.module_paths]
    return [*dict.fromkeys([*named, *site.paths])]


def _missing(path: str, model: nn.Module, sites: Sequence[Site]) -> str:
    if inside := [site.path for site in sites if path in site.module_paths]:
        return f"layer {path!r} has several weights: name one of {', '.join(map(repr, inside))}"
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if path in modules:
        return f"layer {path!r} cannot change form: it owns no weight"
    known = [name for name in (*modules, *(site.path for site in sites)) if name]
    return f"the model has no layer {path!r}{_nearest(path, known)}"
