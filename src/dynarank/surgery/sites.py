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

__all__ = ["Site", "check_unwrapped", "current_plan", "survey"]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_UNKNOWN = WeightSpec("weight", ())


@dataclass(frozen=True)
class Site:
    """A weight of a module: where it is, its form, or why it cannot change form.

    Args:
        module: the module that owns the weight.
        module_paths: the module's paths in the model, several if it has several parents.
        spec: what the weight is; without a shape if the module is of a kind that is not handled.
        form: the form it has; None if it cannot change form.
        obstacle: why it cannot; empty if it can.
        refused: True if it is of a kind that could, but is wrapped or tied so that it would be
            handled wrongly: asking for it is an error. False: it is simply left as it is.
        tied: other sites of the very same weight, which change with this one.
        reader: the parent, if its forward pass reads the weight instead of calling the module.
    """

    module: nn.Module
    module_paths: tuple[str, ...]
    spec: WeightSpec
    form: Form | None
    obstacle: str = ""
    refused: bool = False
    tied: tuple[Site, ...] = ()
    reader: nn.Module | None = None

    @property
    def path(self) -> str:
        """The module's first path, with the weight's name behind it unless that is ``weight``."""
        name = self.spec.name
        return self.module_path if name == "weight" else _join(self.module_path, name)

    @property
    def module_path(self) -> str:
        """The module's first path."""
        return self.module_paths[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape, (out, in / groups, *kernel)."""
        return self.spec.shape

    @property
    def places(self) -> tuple[Site, ...]:
        """This site and those tied to it."""
        return self, *self.tied

    @property
    def last_factored_form(self) -> LowRank | Adapted | None:
        """The last form with factors that the weight had, if any."""
        known = self.module.last_factored_forms if isinstance(self.module, RankedLayer) else {}
        return known.get(self.spec.name)

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that make up the weight in its form, by their names in the module."""
        assert self.form is not None
        own, names = own_parameters(self.module), self.spec.parameter_names(self.form)
        return {name: p for name in names if (p := own[name]) is not None}

    def trained(self) -> list[Parameter]:
        """The parameters that train in this form: all but the base of an adapted one."""
        return [p for name, p in self.parameters().items() if not self.spec.is_base(name)]

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
    modules: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, ParametrizationList):
            modules.setdefault(module, []).append(path)
    owners: _Owners = {}
    for module, paths in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter):
                owners.setdefault(_identity(parameter), []).append(_join(paths[0], name))
    parents, together = readers(model), dict[object, list[Site]]()
    for module, paths in modules.items():
        for site in _sites(module, tuple(paths), parents.get(module)):
            together.setdefault(_tie_key(site), []).append(site)
    return [one for group in together.values() for one in _tied(group, owners)]


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


# The paths of the modules' parameters, by the parameters' identity.
_Owners: TypeAlias = dict[object, list[str]]


def _sites(module: nn.Module, paths: tuple[str, ...], reader: nn.Module | None) -> list[Site]:
    """The weights of one module."""
    kind = type_before_parametrizations(module)
    ranked, own = ranked_class(kind), list(module.parameters(recurse=False))
    if kind.__module__.startswith(_QUANTIZED):
        quantized = Site(module, paths, _UNKNOWN, None, "its weight is quantized", refused=True)
        return [quantized] if hasattr(module, "weight") else []
    if any(map(is_lazy, own)):
        reason = "it is lazy: it has no shape before its first use"
        return [Site(module, paths, _UNKNOWN, None, reason)]
    if not any(p.ndim > 1 for p in own) and not (ranked and is_parametrized(module)):
        return []
    if ranked is None:
        return [Site(module, paths, _UNKNOWN, None, f"{kind.__name__} layers are not handled")]
    forms = module.forms if isinstance(module, RankedLayer) else {}
    found: list[Site] = []
    for spec in ranked.specs(module):
        form = forms.get(spec.name, FullRank())
        reason = ranked.unsupported_reason(module) or _obstacle(module, spec, form)
        form = None if reason else form
        found.append(Site(module, paths, spec, form, reason, bool(reason), reader=reader))
    return found


def _obstacle(module: nn.Module, spec: WeightSpec, form: Form) -> str:
    """Why a weight would be handled wrongly; empty if it would not."""
    own = own_parameters(module)
    if is_parametrized(module):
        return "it is wrapped by torch.nn.utils.parametrize, which owns its weight"
    for name in spec.parameter_names(form):
        p = own.get(name)
        if p is None:
            listed = ", ".join(name for name, p in own.items() if p is not None)
            return f"its weight is computed from {listed} (weight_norm, spectral_norm or prune)"
        if not p.is_floating_point():
            return f"its {name} is {p.dtype}: only real floating-point weights are handled"
        if type(p.data) is not Tensor:
            return f"its {name} is a {type(p.data).__name__} (quantized, sharded or the like)"
    return ""


def _tie_key(site: Site) -> object:
    """Equal for weights that are the same objects and mean the same wherever they are."""
    if site.form is None:
        return object()
    meaning = replace(site.spec, lookup=False), site.form
    return tuple(id(p) for p in site.parameters().values()), meaning


def _tied(group: list[Site], owners: _Owners) -> list[Site]:
    """One site for all places of a weight; all refused if it is shared in another way too."""
    first, *others = group
    if first.form is None:
        return group
    covered = {_join(site.module_path, name) for site in group for name in site.parameters()}
    for name, p in first.parameters().items():
        if foreign := [owner for owner in owners[_identity(p)] if owner not in covered]:
            obstacle = f"its {name} is tied to {', '.join(foreign)}"
            return [replace(s, form=None, obstacle=obstacle, refused=True) for s in group]
    return [replace(first, tied=tuple(others))]


def _identity(parameter: Tensor) -> object:
    """Equal for two parameters that are one object, or whose memory begins at one place.

    In whatever shape: a transposed tie is one too.
    """
    plain = type(parameter.data) is Tensor and not parameter.is_meta
    pointer = parameter.data_ptr() if plain else 0
    return ("memory", pointer) if pointer else id(parameter)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
