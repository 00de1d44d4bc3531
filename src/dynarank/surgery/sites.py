"""The traversal of a model: which weights can change form, which cannot, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dynarank.decompositions import Factors
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import (
    RankedLayer,
    WeightSpec,
    class_obstacle,
    own_parameters,
    ranked_class,
    readers,
)
from dynarank.layers.obstacles import number_obstacle, weight_obstacle

__all__ = ["Site", "current_plan", "survey"]

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_UNKNOWN = WeightSpec("weight", ())


@dataclass(frozen=True)
class Site:
    """A weight of a module: where it is, its form, or why it cannot change form.

    Args:
        module: the module that owns the weight.
        module_paths: the module's paths in the model, several if it has several parents.
        spec: the weight's name, shape and geometry; no shape if such modules are not handled.
        form: the form it has; None if it cannot change form.
        obstacle: why it cannot; empty if it can.
        refused: whether selecting it is an error, because it could change form but is wrapped or
            tied so that the result would be wrong; otherwise it is left as it is.
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
        """The module's first path, followed by the weight's name unless that is ``weight``."""
        module_path, name = self.module_paths[0], self.spec.name
        return module_path if name == "weight" else f"{module_path}.{name}".lstrip(".")

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
        if not isinstance(module, parametrize.ParametrizationList):
            modules.setdefault(module, []).append(path)
    owners: dict[object, list[str]] = {}  # the paths of each parameter, by its identity
    for module, paths in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            if not is_lazy(parameter):
                owners.setdefault(_identity(parameter), []).append(f"{paths[0]}.{name}".lstrip("."))
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


def _sites(module: nn.Module, paths: tuple[str, ...], reader: nn.Module | None) -> list[Site]:
    """The weights of one module."""
    kind = parametrize.type_before_parametrizations(module)
    ranked, own = ranked_class(kind), list(module.parameters(recurse=False))
    unknown = partial(Site, module, paths, _UNKNOWN, None)
    if kind.__module__.startswith(_QUANTIZED):
        return [unknown("its weight is quantized")] if hasattr(module, "weight") else []
    if any(map(is_lazy, own)):
        return [unknown("it is lazy: it has no shape before its first use")]
    if not any(p.ndim > 1 for p in own) and not (ranked and parametrize.is_parametrized(module)):
        return []
    if ranked is None:
        return [unknown(class_obstacle(kind))]
    forms = module.forms if isinstance(module, RankedLayer) else {}
    found: list[Site] = []
    for spec in ranked.weights_of(module):
        form = forms.get(spec.name, FullRank())
        reason = ranked.unsupported_reason(module) or weight_obstacle(module, spec, form, reader)
        left = number_obstacle(module, spec, form)
        known, refused = None if left or reason else form, not left and bool(reason)
        found.append(Site(module, paths, spec, known, left or reason, refused, reader=reader))
    return found


def _tie_key(site: Site) -> object:
    """Equal for weights that are the same objects and are used as the same matrix."""
    if site.form is None:
        return object()
    ids = tuple(id(p) for p in site.parameters().values())
    return ids, replace(site.spec, lookup=False), site.form


def _tied(group: list[Site], owners: dict[object, list[str]]) -> list[Site]:
    """One site for all places of a weight; all refused if it is tied to something else too."""
    first, *others = group
    if first.form is None:
        return group
    covered = {f"{s.module_paths[0]}.{n}".lstrip(".") for s in group for n in s.parameters()}
    for name, p in first.parameters().items():
        if foreign := [owner for owner in owners[_identity(p)] if owner not in covered]:
            obstacle = f"its {name} is tied to {', '.join(foreign)}"
            return [replace(s, form=None, obstacle=obstacle, refused=True) for s in group]
    return [replace(first, tied=tuple(others))]


def _identity(parameter: Tensor) -> object:
    """Equal for two parameters that are one object or share memory (a transposed tie does)."""
    plain = type(parameter.data) is Tensor and parameter.layout is torch.strided
    plain = plain and not parameter.is_meta
    pointer = parameter.data_ptr() if plain else 0
    return ("memory", pointer) if pointer else id(parameter)
