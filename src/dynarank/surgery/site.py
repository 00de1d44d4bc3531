"""A weight of a model: where it is, its form, and why it cannot change form or is left as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import Parameter

from dynarank.decompositions import Factors, precise
from dynarank.distributed.dtensors import is_dtensor, whole
from dynarank.distributed.fsdp2 import Sharding
from dynarank.distributed.processes import processes_among
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import RankedLayer, WeightSpec, own_parameters

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """A weight of a module: where it is, its form, or why it cannot change form.

    Args:
        module: the module that owns the weight.
        module_paths: the module's paths in the model, several if it has several parents.
        spec: the weight's name, shape and geometry; a shape of () if it has none yet (lazy).
        form: the form it has; None if it cannot change form.
        obstacle: why it cannot; empty if it can.
        refused: whether selecting it is an error, because it could change form but is wrapped or
            tied so that the result would be wrong; otherwise it is left as it is.
        tied: other sites of the very same weight, which change with this one.
        reader: the parent, if its forward pass reads the weight instead of calling the module.
        left_out: why it is left unless ``layers=`` names it, see :mod:`dynarank.surgery.defaults`;
            empty if not.
        bias_shared_with: other parameters and buffers in the memory of the module's bias.
        sharding: how ``fully_shard`` shards its parameters, if it does.
    """

    module: nn.Module
    module_paths: tuple[str, ...]
    spec: WeightSpec
    form: Form | None
    obstacle: str = ""
    refused: bool = False
    tied: tuple[Site, ...] = ()
    reader: nn.Module | None = None
    left_out: str = ""
    bias_shared_with: tuple[str, ...] = ()
    sharding: Sharding | None = None

    @property
    def path(self) -> str:
        """The module's first path, followed by the weight's name unless that is ``weight``."""
        return self.paths[0]

    @property
    def paths(self) -> list[str]:
        """Its path by each path of the module."""
        name = self.spec.name
        if name == "weight":
            return list(self.module_paths)
        return [f"{path}.{name}".lstrip(".") for path in self.module_paths]

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical shape, (out, in / groups, *kernel)."""
        return self.spec.shape

    @property
    def places(self) -> tuple[Site, ...]:
        """This site and those tied to it."""
        return self, *self.tied

    @property
    def present_form(self) -> Form:
        """The form it is in, whether it can change it or not."""
        forms = self.module.forms if isinstance(self.module, RankedLayer) else {}
        return self.form or forms.get(self.spec.name, FullRank())

    @property
    def last_factored_form(self) -> LowRank | Adapted | None:
        """The last form with factors that the weight had, if any."""
        known = self.module.last_factored_forms if isinstance(self.module, RankedLayer) else {}
        return known.get(self.spec.name)

    @property
    def factor_norms(self) -> tuple[float, ...]:
        """The norms that the factors had when a change made them; empty if unknown."""
        known = self.module.factor_norms if isinstance(self.module, RankedLayer) else {}
        return known.get(self.spec.name, ())

    def entries(self, form: Form | None = None) -> int:
        """The number of entries of the weight in ``form``; None: in the form it has."""
        form = self.spec.resolve(form or self.form or FullRank())
        whole = math.prod(self.shape)
        if isinstance(form, FullRank):
            return whole
        factors = sum(map(math.prod, self.spec.factor_shapes(form)))
        return factors if isinstance(form, LowRank) else whole + factors

    @property
    def frozen_factors(self) -> frozenset[str]:
        """The names of factors that are frozen while others train, or were when last seen."""
        known = self.module.frozen_factors if isinstance(self.module, RankedLayer) else {}
        return known.get(self.spec.name, frozenset())

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that make up the weight in its form, by their names in the module."""
        own, names = own_parameters(self.module), self.spec.parameter_names(self._own_form())
        if self.sharding is not None and self.sharding.is_gathered():
            own = {**own, **self.sharding.shards()}
        return {name: p for name in names if (p := own[name]) is not None}

    def values(self) -> dict[str, Tensor]:
        """The values of the parameters, to read: whole ones also of a weight that is sharded.

        All processes that share a sharded weight must ask for them.

        Raises:
            PeerError: not all processes ask.
        """
        own: dict[str, Tensor] = {**self.parameters()}
        if self.sharding is None or not any(map(is_dtensor, own.values())):
            return own
        together = processes_among(self.sharding.ranks)
        together.gather(f"reading layer {self.path!r}, which is sharded", None)
        return {name: whole(p) for name, p in own.items()}

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
        weight = self.spec.effective(self._own_form(), self.values())
        return self.spec.to_canonical(weight)

    def exact(self) -> Tensor:
        """The effective weight, canonical, in fp64 (see :func:`precise`)."""
        values = {name: precise(p) for name, p in self.values().items()}
        return self.spec.to_canonical(self.spec.effective(self._own_form(), values))

    def _own_form(self) -> Form:
        if self.form is None:
            raise ValueError(f"layer {self.path!r} cannot change form: {self.obstacle}")
        return self.form
