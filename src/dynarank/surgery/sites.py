"""The one traversal of a model: which weights can change form, which cannot, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import (
    ParametrizationList,
    is_parametrized,
    type_before_parametrizations,
)

from dynarank.decompositions import Factors
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import RankedLayer, WeightSpec, own_parameters, ranked_class, readers

__all__ = [
    "Site",
    "check_unwrapped",
    "current_plan",
    "survey",
]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


@dataclass(frozen=True)
class Site:
    """A weight of a module.

    Args:
        path: the module's path in the model (the first one, if it is shared by several parents);
            with the weight's name behind it, unless that is ``weight``.
        module: the module.
        weight: what the weight is; None if the module is of a kind that is not handled.
        form: the form it has; None if it cannot change form.
        obstacle: why it cannot; empty if it can.
        refused: True if it is of a kind that could, but is wrapped or tied so that it would be
            handled wrongly: asking for it is an error. False: it is simply left as it is.
        tied: other sites of the very same weight, which change with this one.
        reader: the parent, if its forward pass reads the weight instead of calling the module.
    """

    path: str
    module: nn.Module
    weight: WeightSpec | None
    form: Form | None
    obstacle: str = ""
    refused: bool = False
    tied: tuple[Site, ...] = ()
    reader: nn.Module | None = None

    @property
    def spec(self) -> WeightSpec:
        """The weight, of a site that is handled."""
        assert self.weight is not None, self.path
        return self.weight

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape, (out, in / groups, *kernel)."""
        return self.spec.shape

    @property
    def module_path(self) -> str:
        """The module's own path."""
        name = self.weight.name if self.weight else "weight"
        return self.path if name == "weight" else self.path.removesuffix(name).removesuffix(".")

    @property
    def last_factored_form(self) -> LowRank | Adapted | None:
        """The last form with factors that the weight had, if any."""
        module = self.module
        return (
            module.last_factored_forms.get(self.spec.name)
            if isinstance(module, RankedLayer)
            else None
        )

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that make up the weight in its form, by their names in the module."""
        assert self.form is not None
        own = own_parameters(self.module)
        found = {name: own[name] for name in self.spec.parameter_names(self.form)}
        return {name: p for name, p in found.items() if p is not None}

    def factors(self) -> Factors:
        """The factors, in the order the input meets them; none if full-rank."""
        if self.form is None or isinstance(self.form, FullRank):
            return ()
        return self.spec.factors(self.form, self.parameters())

    def effective(self) -> Tensor:
        """The effective weight, canonical."""
        assert self.form is not None
        return self.spec.to_canonical(self.spec.effective(self.form, self.parameters()))


def survey(model: nn.Module) -> list[Site]:
    """Every weight of two or more dimensions that a module of the model owns, in order.

    A weight that several modules share is listed once, at its first place.

    Example:
        >>> [(site.path, site.obstacle) for site in survey(nn.Sequential(nn.Linear(4, 2)))]
        [('0', '')]
    """
    modules = [(path, m) for path, m in model.named_modules() if not _inside(m)]
    owners: _Owners = {}
    for path, module in modules:
        for name, parameter in _parameters(module):
            owners.setdefault(_identity(parameter), []).append(f"{path}.{name}".lstrip("."))
    found = [site for path, m in modules if _owns_weight(m) for site in _sites(path, m)]
    parents = readers(model)
    found = [replace(site, reader=parents.get(site.module)) for site in found]
    return _tie([_checked(site) for site in found], owners)


def current_plan(model: nn.Module) -> dict[str, Form]:
    """The form of every weight that can change form: the plan that would change nothing.

    Example:
        >>> current_plan(nn.Sequential(nn.Linear(4, 2)))
        {'0': FullRank()}
    """
    return {site.path: site.form for site in survey(model) if site.form is not None}


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


_Owners: TypeAlias = dict[object, list[str]]


def _sites(path: str, module: nn.Module) -> list[Site]:
    """The weights of one module, before they are looked at."""
    kind = type_before_parametrizations(module)
    ranked = ranked_class(kind)
    if any(is_lazy(p) for p in module.parameters(recurse=False)):
        return [Site(path, module, None, None, "it is lazy: it has no shape before its first use")]
    if kind.__module__.startswith(_QUANTIZED):
        return [Site(path, module, None, None, "its weight is quantized", refused=True)]
    if ranked is None:
        return [Site(path, module, None, None, f"{kind.__name__} layers are not handled")]
    forms = module.forms if isinstance(module, RankedLayer) else {}
    unsupported = ranked.unsupported_reason(module)
    return [
        Site(
            path if spec.name == "weight" else f"{path}.{spec.name}".lstrip("."),
            module,
            spec,
            None if unsupported else forms.get(spec.name, FullRank()),
            unsupported,
            bool(unsupported),
        )
        for spec in ranked.specs(module)
    ]


def _checked(site: Site) -> Site:
    """The site, refused if its weight would be handled wrongly."""
    if site.form is None:
        return site
    obstacle = _obstacle(site)
    return replace(site, form=None, obstacle=obstacle, refused=True) if obstacle else site


def _obstacle(site: Site) -> str:
    own = own_parameters(site.module)
    assert site.form is not None
    if is_parametrized(site.module):
        return "it is wrapped by torch.nn.utils.parametrize, which owns its weight"
    for name in site.spec.parameter_names(site.form):
        p = own.get(name)
        if p is None:
            listed = ", ".join(name for name, p in own.items() if p is not None)
            return f"its weight is computed from {listed} (weight_norm, spectral_norm or prune)"
        if not p.is_floating_point():
            return f"its {name} is {p.dtype}: only real floating-point weights are handled"
        if type(p.data) is not Tensor:
            return f"its {name} is a {type(p.data).__name__} (quantized, sharded or the like)"
    return ""


def _tie(sites: list[Site], owners: _Owners) -> list[Site]:
    """One site for each set of equal places; refused where a weight is shared in other ways."""
    together: dict[object, list[Site]] = {}
    for site in sites:
        together.setdefault(_tie_key(site), []).append(site)
    return [one for group in together.values() for one in _tied(group, owners)]


def _tied(group: list[Site], owners: _Owners) -> list[Site]:
    first, *others = group
    if first.form is None:
        return group
    covered = {f"{site.module_path}.{n}".lstrip(".") for site in group for n in site.parameters()}
    for name, p in first.parameters().items():
        if foreign := [o for o in owners[_identity(p)] if o not in covered]:
            obstacle = f"its {name} is tied to {', '.join(foreign)}"
            return [replace(s, form=None, obstacle=obstacle, refused=True) for s in group]
    return [replace(first, tied=tuple(others))]


def _tie_key(site: Site) -> object:
    """Equal for weights that are the same objects and mean the same wherever they are."""
    if site.form is None:
        return id(site)
    meaning = replace(site.spec, lookup=False), site.form
    return tuple(id(p) for p in site.parameters().values()), meaning


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters(recurse=False) if not is_lazy(p)]


def _identity(parameter: Tensor) -> object:
    """Equal for two parameters that are one object, or whose memory begins at one place.

    In whatever shape: a transposed tie is one too.
    """
    plain = type(parameter.data) is Tensor and not parameter.is_meta
    pointer = parameter.data_ptr() if plain else 0
    return ("memory", pointer) if pointer else id(parameter)


def _inside(module: nn.Module) -> bool:
    return isinstance(module, ParametrizationList)


def _owns_weight(module: nn.Module) -> bool:
    kind = type_before_parametrizations(module)
    if kind.__module__.startswith(_QUANTIZED):
        return hasattr(module, "weight")
    wrapped = is_parametrized(module) and ranked_class(kind) is not None
    own = list(module.parameters(recurse=False))
    return wrapped or any(is_lazy(parameter) or parameter.ndim > 1 for parameter in own)
