"""``nn.Embedding`` in the three forms: rows of the last factor are looked up, then multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.decompositions import Factors, Geometry
from dynarank.forms import FullRank, LowRank
from dynarank.layers.chain import factor_modules, parameter_like
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, effective, one_call, read_parameters
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedEmbedding"]


class RankedEmbedding(RankedLayer, nn.Embedding):  # pyright: ignore
    """An embedding table in one of the three forms.

    W (n, m) = up @ ... @ down: row i of W is row i of ``up`` times the other factors. A padding row
    of zeros stays zero in every form; any other padding row changes with the other factors.
    """

    plain = nn.Embedding
    weight = effective("weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """One weight, (rows, columns)."""
        table = cast(nn.Embedding, module)
        shape = (table.num_embeddings, table.embedding_dim)
        return (WeightSpec("weight", shape, lookup=True),)

    @classmethod
    def unsupported_reason(cls, module: nn.Module) -> str:
        """The options in use that act on rows of the whole weight; factors have no such rows."""
        table = cast(nn.Embedding, module)
        options = {
            "max_norm": table.max_norm is not None,
            "scale_grad_by_freq": table.scale_grad_by_freq,
            "sparse": table.sparse,
        }
        used = [name for name, is_used in options.items() if is_used]
        return f"its {', '.join(used)} acts on rows of the whole weight" if used else ""

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """One lookup of all indices."""
        return {"weight": [_call(module, cast(Tensor, inputs["input"]))]}

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the effective weight."""
        form, weight = self.form, self.resolved()
        if isinstance(form, FullRank):
            return super().forward(input)
        if self.execution(weight, _call(self, input)).name in ("joined", "merged"):
            return F.embedding(input, self.effective_weight(), self.padding_idx)
        parameters = read_parameters(self)
        rows = _rows(input, weight.factors(parameters), self)
        if isinstance(form, LowRank):
            return rows
        whole = F.embedding(input, weight.base(parameters))
        return whole + (form.scale * rows).to(whole.dtype)  # an adapter may be of another dtype

    def plain_chain(self) -> nn.Sequential:
        """``Embedding -> Linear``: the rows of the last factor, then the others."""
        *others, up = self.resolved().factors(read_parameters(self))
        table = nn.Embedding(*up.shape, padding_idx=self.padding_idx, device="meta")
        table.weight = parameter_like(up)
        turned = tuple(factor.T for factor in reversed(others))  # a Linear multiplies by W'
        return nn.Sequential(table, *factor_modules(turned, [Geometry()] * len(turned), None))


def _rows(indices: Tensor, factors: Factors, table: nn.Embedding) -> Tensor:
    """The rows of ``join(factors)`` at the indices."""
    rows = F.embedding(indices, factors[-1], table.padding_idx)
    for factor in reversed(factors[:-1]):
        rows = rows @ factor
    return rows


def _call(module: nn.Module, indices: Tensor) -> Call:
    call = one_call(module, indices, Geometry())
    trains = torch.is_grad_enabled() and call.trains
    return replace(call, input_grad=False, trains=trains, lookup=True)
