"""The one traversal of a model: which layers can change form, which cannot, and why."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    type_before_parametrizations,
)

from dynarank.forms import Form, FullRank, LowRank, resolve_rank
from dynarank.layers import RANKED, RankedLayer

__all__ = [
    "LayerFilter",
    "Site",
    "check_unwrapped",
    "current_plan",
    "find_sites",
    "select",
    "survey",
    "weight_shape",
]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

logger = logging.getLogger("dynarank")

_Filter: TypeAlias = Callable[[nn.Module, str], bool]
LayerFilter: TypeAlias = _Filter | str | Sequence[str] | None


@dataclass(frozen=True)
class Site:
    """A module that owns a weight.

    Args:
        path: its path in the model (the first one, if it is shared by several parents).
        module: the module.
        form: the form it has; None if it cannot change form.
        obstacle: why it cannot; empty if it can.
        refused: True if it is of a kind that could, but is wrapped or tied so that it would be
            handled wrongly: asking for it is an error. False: it is simply left as it is.
    """

    path: str
    module: nn.Module
    form: Form | None
    obstacle: str = ""
    refused: bool = False


def survey(model: nn.Module) -> list[Site]:
    """Every module of the model that owns a weight of two or more dimensions, in order.

    Example:
        >>> [(site.path, site.obstacle) for site in survey(nn.Sequential(nn.Linear(4, 2)))]
        [('0', '')]
    """
    modules = [(path, m) for path, m in model.named_modules() if not _inside(m)]
    owners: dict[object, list[str]] = {}
    for path, module in modules:
        for name, parameter in _parameters(module):
            owners.setdefault(_identity(parameter), []).append(f"{path}.{name}".lstrip("."))
    return [_site(path, m, owners) for path, m in modules if _owns_weight(m)]


def current_plan(model: nn.Module) -> dict[str, Form]:
    """The form of every layer that can change form: the plan that would change nothing.

    Example:
        >>> current_plan(nn.Sequential(nn.Linear(4, 2)))
        {'0': FullRank()}
    """
    return {site.path: site.form for site in survey(model) if site.form is not None}


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a layer's effective weight."""
    if isinstance(module, RankedLayer):
        return module.weight_shape
    return tuple(cast(Tensor, module.weight).shape)


def check_unwrapped(model: nn.Module) -> None:
    """Raise if a wrapper that holds on to the parameters would miss a change of form.

    Raises:
        ValueError: the model, or a part of it, is wrapped for data-parallel or sharded training.
    """
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                raise ValueError(
                    f"{path or 'the model'!r} is wrapped by {cls.__name__}, which would go on with "
                    "the old parameters, silently out of step; change forms before wrapping"
                )


def find_sites(model: nn.Module, paths: Iterable[str]) -> dict[str, Site]:
    """The sites at these paths.

    Raises:
        ValueError: a path is not in the model, or what is there cannot change form.
    """
    by_module = {id(site.module): site for site in survey(model)}
    by_path = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, Site] = {}
    for path in paths:
        if path not in by_path:
            raise ValueError(f"the model has no layer {path!r}{_nearest(path, by_path)}")
        site = by_module.get(id(by_path[path]))
        if site is None or site.form is None:
            reason = site.obstacle if site else "it owns no weight"
            raise ValueError(f"layer {path!r} cannot change form: {reason}")
        found[path] = site
    return found


def select(model: nn.Module, layers: LayerFilter, form: LowRank | None = None) -> list[Site]:
    """The sites that a verb means.

    Args:
        model: the model.
        layers: a filter ``(module, path) -> bool``, or glob patterns of paths: exactly those. None:
            the ranked layers, or, in a model that has none yet, the layers that ``form`` makes
            cheaper (fewer factor entries than weight entries).
        form: the form the layers are to get, for None.

    Raises:
        ValueError: nothing matches, or a layer that matches is refused.
    """
    sites = survey(model)
    matching = _ranked(sites) or sites if layers is None else _matching(sites, layers)
    if refused := [site for site in matching if site.refused]:
        reasons = "; ".join(f"layer {site.path!r}: {site.obstacle}" for site in refused)
        raise ValueError(f"{reasons}. Leave it out with layers=..., or undo what wraps it first")
    able = [site for site in matching if site.form is not None]
    if layers is None and not _ranked(able):
        able = [site for site in able if form and _cheaper(form, weight_shape(site.module))]
    if not able:
        raise ValueError(_nothing(layers, form, sites))
    if left := [site.path for site in sites if site not in able]:
        logger.info("left as they are: %s", ", ".join(left))
    return able


def _ranked(sites: list[Site]) -> list[Site]:
    return [site for site in sites if isinstance(site.module, RankedLayer)]


def _cheaper(form: LowRank, shape: tuple[int, ...]) -> bool:
    try:
        rank = resolve_rank(form.rank, shape)
    except ValueError:  # above this layer's limit, so not cheaper than the layer
        return False
    n, m = shape[0], math.prod(shape[1:])
    return rank * (m + n) < m * n


def _matching(sites: list[Site], layers: _Filter | str | Sequence[str]) -> list[Site]:
    if callable(layers):
        return [site for site in sites if layers(site.module, site.path)]
    patterns = [layers] if isinstance(layers, str) else layers
    return [s for s in sites if any(fnmatchcase(s.path, pattern) for pattern in patterns)]


def _nothing(layers: LayerFilter, form: LowRank | None, sites: list[Site]) -> str:
    listed = ", ".join(f"{site.path!r} ({site.obstacle or site.form})" for site in sites[:20])
    if layers is not None:
        asked = "the filter" if callable(layers) else repr(layers)
        return f"{asked} matches no layer that can change form; the model has: {listed or 'none'}"
    if form is None:
        return (
            f"the model has no ranked layer yet; name the layers by layers=... (it has: {listed})"
        )
    return (
        f"rank {form.rank} makes no layer of the model cheaper (each has a limit of min(m, n) and "
        f"breaks even at mn / (m + n)); lower the rank, or insist with layers='*' "
        f"(the model has: {listed or 'no weights'})"
    )


def _site(path: str, module: nn.Module, owners: dict[object, list[str]]) -> Site:
    kind = type_before_parametrizations(module)
    known = isinstance(module, RankedLayer) or kind in RANKED
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return Site(path, module, None, "it is lazy: it has no shape before its first forward pass")
    if not known:
        return Site(path, module, None, f"{kind.__name__} layers are not handled")
    if getattr(module, "groups", 1) != 1:
        return Site(path, module, None, "grouped convolutions are not handled")
    if obstacle := _obstacle(path, module, owners):
        return Site(path, module, None, obstacle, refused=True)
    return Site(path, module, module.form if isinstance(module, RankedLayer) else FullRank())


def _obstacle(path: str, module: nn.Module, owners: dict[object, list[str]]) -> str:
    own = [name for name, _ in _parameters(module)]
    if is_parametrized(module):
        return "it is wrapped by torch.nn.utils.parametrize, which owns its weight"
    if not isinstance(module, RankedLayer) and "weight" not in own:
        return f"its weight is computed from {', '.join(own)} (weight_norm, spectral_norm or prune)"
    for name, parameter in _parameters(module):
        shared = [o for o in owners[_identity(parameter)] if o != f"{path}.{name}".lstrip(".")]
        if parameter.ndim > 1 and shared:
            return f"its {name} is tied to {', '.join(shared)}"
    return ""


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters(recurse=False) if not is_lazy(p)]


def _identity(parameter: Tensor) -> object:
    """Equal for two parameters that are one object, or that fill the same memory."""
    pointer = 0 if parameter.is_meta else parameter.data_ptr()
    return (pointer, parameter.shape) if pointer else id(parameter)


def _inside(module: nn.Module) -> bool:
    return isinstance(module, ParametrizationList)


def _owns_weight(module: nn.Module) -> bool:
    wrapped = is_parametrized(module) and type_before_parametrizations(module) in RANKED
    own = list(module.parameters(recurse=False))
    return wrapped or any(is_lazy(parameter) or parameter.ndim > 1 for parameter in own)


def _nearest(path: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(path, [name for name in known if name], n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, near))}" if near else ""
