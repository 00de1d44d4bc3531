"""``nn.MultiheadAttention`` in the three forms: its projections run like linear layers.

Legend: N batch size, L and S the lengths of query and key, d the embedding size, H heads of size
D = d / H.

If every weight is full-rank, torch's own forward pass runs. In other forms it would read each
effective weight several times and join it each time, so the projections are computed here, each by
its form, followed by torch's scaled dot-product attention.

The fast paths of ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` (evaluation, no
gradients) do not call this module: they read the effective weights, which are joined twice each.
With ``torch.backends.mha.set_fastpath_enabled(False)`` they run factored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynarank.decompositions import Geometry
from dynarank.forms import FullRank
from dynarank.layers.execution import Call
from dynarank.layers.ranked import RankedLayer, effective
from dynarank.layers.weight import WeightSpec

__all__ = ["RankedMultiheadAttention"]

_LINEAR = Geometry()


class RankedMultiheadAttention(RankedLayer, nn.MultiheadAttention):  # pyright: ignore
    """Multi-head attention whose projections are each in one of the three forms.

    The joint weight of the in-projections, ``in_proj_weight`` (3d, d), is one weight; with ``kdim``
    or ``vdim`` there are ``q_proj_weight`` (d, d), ``k_proj_weight`` (d, kdim) and
    ``v_proj_weight`` (d, vdim). ``out_proj`` is a separate layer. Different inputs are multiplied
    by different rows of the joint weight, and share its first factor.

    ``Rank(share, of="out")`` means a share of 3d for the joint weight, whose largest rank is d.
    ``Rank(share, of="min")`` means a share of d for it and for every other projection.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> model = dr.factorize(nn.ModuleDict({"attn": attention}), dr.Rank(0.25, of="min"))
        >>> sorted(dr.current_plan(model)), attention.in_proj_weight.shape
        (['attn.in_proj_weight', 'attn.out_proj'], torch.Size([24, 8]))
    """

    plain = nn.MultiheadAttention
    in_proj_weight = effective("in_proj_weight")  # type: ignore[assignment]
    q_proj_weight = effective("q_proj_weight")  # type: ignore[assignment]
    k_proj_weight = effective("k_proj_weight")  # type: ignore[assignment]
    v_proj_weight = effective("v_proj_weight")  # type: ignore[assignment]

    @classmethod
    def specs(cls, module: nn.Module) -> tuple[WeightSpec, ...]:
        """The joint in-projection weight, or those of query, key and value."""
        m = cast(nn.MultiheadAttention, module)
        d = m.embed_dim
        if m._qkv_same_embed_dim:  # pyright: ignore[reportPrivateUsage]
            return (WeightSpec("in_proj_weight", (3 * d, d)),)
        sizes = {"q": d, "k": m.kdim, "v": m.vdim}
        return tuple(WeightSpec(f"{x}_proj_weight", (d, size)) for x, size in sizes.items())

    @classmethod
    def fused_children(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """The output projection."""
        return (cast(nn.MultiheadAttention, module).out_proj,)

    @classmethod
    def calls(cls, module: nn.Module, inputs: Mapping[str, object]) -> dict[str, list[Call]]:
        """A call for each distinct input, and one for the output projection."""
        m = cast(nn.MultiheadAttention, module)
        query, key, value = (cast(Tensor, inputs[name]) for name in ("query", "key", "value"))
        found: dict[str, list[Call]] = {}
        for part in _parts(m, query, key, value):
            x, trains = part.input, _trains(m, part.name)
            call = Call(tuple(x.shape), _LINEAR, x.requires_grad, trains, part.rows)
            values = part.outputs[0] == 2 * m.embed_dim  # no attention weight needs them
            found.setdefault(part.name, []).append(replace(call, output=0 if values else None))
        inside = any(p.requires_grad for p in m.parameters(recurse=False))
        grad = inside or any(x.requires_grad for x in (query, key, value))
        last = Call(tuple(query.shape), _LINEAR, grad, _trains(m.out_proj), output=0)
        return {**found, "out_proj.weight": [last]}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with the effective weights; arguments and results as in the plain layer."""
        if self._is_full_rank() or query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights,
                attn_mask, average_attn_weights, is_causal,
            )  # fmt: skip
        _check(query, key, value, attn_mask, is_causal)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask = _mask(q, k, key_padding_mask, attn_mask, query.dtype)
        k, v, mask = self._extended(k, v, mask)
        p = self.dropout if self.training else 0.0
        if not need_weights:
            causal = is_causal and key_padding_mask is None
            mask = None if causal else mask
            attended = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
            return self._output(attended, query.ndim), None
        weights = _attention_weights(q, k, mask, p)
        shown = weights.mean(1) if average_attn_weights else weights
        return self._output(weights @ v, query.ndim), shown.squeeze(0) if query.ndim == 2 else shown

    def _is_full_rank(self) -> bool:
        """Whether every weight is full-rank, including that of the output projection."""
        forms = list(self.forms.values())
        if isinstance(self.out_proj, RankedLayer):
            forms += self.out_proj.forms.values()
        return all(isinstance(form, FullRank) for form in forms)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The projections of query, key and value, each (..., d)."""
        bias = cast("Tensor | None", self.in_proj_bias)
        projected: list[Tensor] = []
        for part in _parts(self, query, key, value):
            own = None if bias is None else bias[slice(*part.outputs)]
            weight = self.resolved(part.name)
            weight = weight if part.rows is None else weight.rows(*part.rows)
            y = self.multiply(weight, part.input, own)
            projected += y.split(self.embed_dim, -1)
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        """Split the heads: (L, d), (L, N, d) or (N, L, d), as in the module, to (N, H, L, D)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.ndim == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _output(self, x: Tensor, dims: int) -> Tensor:
        """Merge the heads (N, H, L, D) and project them, in the module's layout.

        The result is (L, N, d) in memory, as in the plain layer, so that a dropout layer after it
        draws the same mask.
        """
        x = x.permute(2, 0, 1, 3).flatten(2)
        x = x.squeeze(1) if dims == 2 else x
        ranked, out = isinstance(self.out_proj, RankedLayer), self.out_proj
        y = out(x) if ranked else F.linear(x, out.weight, out.bias)
        return y.transpose(0, 1) if self.batch_first and dims == 3 else y

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append the learned key and value (``add_bias_kv``), then zeros, both unmasked."""
        shape, before = (k.shape[0], self.num_heads, 1, self.head_dim), k.shape[2]
        if self.bias_k is not None and self.bias_v is not None:
            own = (b.view(1, self.num_heads, 1, -1) for b in (self.bias_k, self.bias_v))
            k, v = (torch.cat([x, b.expand(shape)], 2) for x, b in zip((k, v), own, strict=True))
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(shape)], 2) for x in (k, v))
        more = k.shape[2] - before
        return k, v, F.pad(mask, (0, more)) if more and mask is not None else mask


@dataclass(frozen=True)
class _Part:
    """An input, the weight (or the rows of it) that multiplies it, and the range of outputs."""

    name: str
    input: Tensor
    outputs: tuple[int, int]
    rows: tuple[int, int] | None


def _parts(m: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[_Part]:
    """Query, key and value; adjacent ones that are the same tensor are projected together."""
    found: list[_Part] = []
    for i, (letter, x) in enumerate(zip("qkv", (query, key, value), strict=True)):
        start, stop = i * m.embed_dim, (i + 1) * m.embed_dim
        if not m._qkv_same_embed_dim:  # pyright: ignore[reportPrivateUsage]
            found.append(_Part(f"{letter}_proj_weight", x, (start, stop), None))
            continue
        if found and found[-1].input is x:
            start = found.pop().outputs[0]
        found.append(_Part("in_proj_weight", x, (start, stop), (start, stop)))
    return found


def _trains(module: nn.Module, name: str = "") -> bool:
    """Whether the weight whose parameter names begin with ``name`` is trainable."""
    own = module.named_parameters(recurse=False)
    return any(p.requires_grad for n, p in own if n.startswith(name) and not n.endswith("bias"))


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> None:
    dims = [x.ndim for x in (query, key, value)]
    if dims not in ([2] * 3, [3] * 3):
        raise ValueError(f"query, key and value all have 2 dimensions or all 3, got {dims}")
    if causal and mask is None:
        raise ValueError("is_causal=True only says that attn_mask is causal: pass attn_mask too")


def _mask(
    q: Tensor, k: Tensor, padding: Tensor | None, attention: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Both masks combined into one that is added to the scores (N, H, L, S)."""
    batch, heads, target, source = *q.shape[:3], k.shape[2]
    masks: list[Tensor] = []
    if attention is not None:
        mask, shape = _numbers(attention, dtype), (target, source)
        if mask.ndim == 3:
            whole = _of_shape("attn_mask", mask, (batch * heads, *shape))
            mask, shape = whole.unflatten(0, (batch, heads)), (batch, heads, *shape)
        masks.append(_of_shape("attn_mask", mask, shape))
    if padding is not None:
        mask = _numbers(padding, dtype)
        mask = mask if mask.ndim == 2 else mask.unsqueeze(0)
        masks.append(_of_shape("key_padding_mask", mask, (batch, source))[:, None, None])
    return sum(masks[1:], masks[0]) if masks else None


def _numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask: minus infinity where a boolean mask is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _of_shape(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if mask.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {tuple(mask.shape)}")
    return mask


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """``softmax(q k' / sqrt(D) + mask)``, after dropout, (N, H, L, S)."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, -1)
    return F.dropout(weights, dropout) if dropout > 0 else weights
