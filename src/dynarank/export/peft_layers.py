"""A layer's adapter as PEFT stores it, and the layers that PEFT computes differently.

PEFT puts a module in the layer's place that calls it and adds ``alpha / r * lora_B(lora_A(x))``. So
the adapter acts where its layer is called, in one place, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynarank.export.peft_config import Scaling
from dynarank.export.readers import weights_read
from dynarank.forms import Adapted
from dynarank.layers import WeightSpec
from dynarank.surgery.sites import Site

__all__ = [
    "PREFIX",
    "adapter_keys",
    "form_and_factors",
    "is_transposed",
    "layer_obstacle",
    "tensors_of",
]

PREFIX = "base_model.model."  # of a layer's path, in the names of PEFT's tensors
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_FUSED = ("linear1", "linear2")  # of nn.TransformerEncoderLayer


def layer_obstacle(site: Site, place: Site, model: nn.Module) -> str:
    """Why PEFT's adapter of a layer would compute something else; empty if it would not.

    Args:
        site: a weight.
        place: where it is: the site, or one tied to it.
        model: the model that it is in.
    """
    module, paths = place.module, place.module_paths
    if site.sharding is not None:
        return "it is sharded by fully_shard: PEFT's files hold whole weights of a model like it"
    if not paths[0]:
        return "it is the whole model, and PEFT adapts layers in a model: nn.Sequential(layer)"
    splits = [path.rpartition(".") for path in paths]
    spots = {(model.get_submodule(parent), name) for parent, _, name in splits}
    if len(spots) > 1:  # of a parent in several places there is one
        return f"its module is in {len(paths)} places, of which PEFT would adapt {paths[0]!r} only"
    if place.reader is not None or not (isinstance(module, _KINDS) or is_transposed(module)):
        owner = module if place.reader is None else place.reader
        kind = getattr(owner, "plain", type(owner))
        return f"PEFT has no adapter of this form for the weights of {kind.__name__}"
    ((parent, name),) = spots
    if isinstance(parent, nn.TransformerEncoderLayer) and name in _FUSED:
        return "in eval mode nn.TransformerEncoderLayer reads its weight past the adapter"
    if module in (read := weights_read(model, [module], values=True)):
        return f"{read[module]}, and PEFT's adapter acts where the layer is called"
    return _conv_obstacle(module)


def _conv_obstacle(module: Any) -> str:
    if isinstance(module, nn.Linear | nn.Embedding) or not hasattr(module, "dilation"):
        return ""
    spread = zip(module.dilation, module.kernel_size, strict=True)
    if any(d != 1 and size != 1 for d, size in spread):
        return f"its dilation is {tuple(module.dilation)}, which PEFT's adapters leave out"
    if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
        return f"it pads by {module.padding_mode!r}, which PEFT's adapters leave out"
    return ""


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, which stores its weight (in, out)."""
    kinds = (kind for kind in type(module).__mro__ if kind.__name__ == "Conv1D")
    return any(kind.__module__.startswith("transformers") for kind in kinds)


def adapter_keys(lookup: bool) -> tuple[str, str]:
    """The ends of the names of an adapter's two tensors, the one that meets the input first."""
    if lookup:
        return ".lora_embedding_A", ".lora_embedding_B"
    return ".lora_A.weight", ".lora_B.weight"


def tensors_of(place: Site, form: Adapted) -> tuple[dict[str, Tensor], Scaling]:
    """An adapter's tensors, by the ends of their names, with its rank and alpha.

    An embedding looks its rows up in the last factor, so that this comes first. Of a grouped
    convolution PEFT's first factor has no groups: the blocks of ours are its diagonal.
    """
    down, up = (factor.detach() for factor in place.spec.factors(form, place.parameters()))
    groups, rank, keys = place.spec.geometry.groups, form.resolved_rank, adapter_keys(False)
    if place.spec.lookup:
        return dict(zip(adapter_keys(True), (up.T, down.T), strict=True)), (rank, form.alpha)
    pair = _diagonal(down, groups), up
    return dict(zip(keys, pair, strict=True)), (rank * groups, form.alpha * groups)


def form_and_factors(
    spec: WeightSpec, tensors: Mapping[str, Tensor], scaling: Scaling
) -> tuple[Adapted, tuple[Tensor, Tensor]]:
    """The inverse of :func:`tensors_of`: the form, and ``down`` and ``up``.

    A rank above the weight's limit is brought down to it, which loses nothing.

    Raises:
        ValueError: a tensor is missing, of another shape, not finite, or not of these groups.
    """
    keys, (rank, alpha), groups = adapter_keys(spec.lookup), scaling, spec.geometry.groups
    if set(tensors) != set(keys):
        raise ValueError(f"its adapter has {', '.join(sorted(tensors))}, not {', '.join(keys)}")
    first, last = (tensors[key] for key in keys)
    for key, tensor, shape in zip(keys, (first, last), _shapes(spec, rank), strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"its {key[1:]} is {tuple(tensor.shape)}, and has to be {shape}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ValueError(f"its {key[1:]} holds {tensor.dtype} values that are not finite")
    if rank % groups:
        raise ValueError(f"its rank {rank} is not divisible by its {groups} groups")
    down, up = (last.T, first.T) if spec.lookup else (_blocks(first, groups), last)
    form = Adapted(rank // groups, alpha=alpha / groups)
    decomposition = spec.decomposition(form)
    if (limit := decomposition.limit(spec.shape)) < form.resolved_rank:
        pair = decomposition.refactor((down.double(), up.double()), limit)
        down, up = (new.to(old.dtype) for new, old in zip(pair, (down, up), strict=True))
        form = Adapted(limit, alpha=form.scale * limit)
    return form, (down.contiguous(), up.contiguous())


def _shapes(spec: WeightSpec, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of PEFT's tensors."""
    (out, width), kernel, groups = spec.shape[:2], spec.shape[2:], spec.geometry.groups
    if spec.lookup:
        return (rank, out), (width, rank)
    return (rank, width * groups, *kernel), (out, rank // groups, *(1 for _ in kernel))


def _diagonal(down: Tensor, groups: int) -> Tensor:
    """(groups * r, in / groups, *kernel), as blocks of zeros in (groups * r, in, *kernel)."""
    if groups == 1:
        return down
    whole = down.new_zeros(down.shape[0], down.shape[1] * groups, *down.shape[2:])
    for place, block in zip(_places(whole, groups), down.chunk(groups), strict=True):
        place.copy_(block)
    return whole


def _blocks(whole: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`_diagonal`."""
    down = torch.cat(_places(whole, groups))
    if not torch.equal(_diagonal(down, groups), whole):
        raise ValueError(
            f"its lora_A joins channels of several of its {groups} groups, which no weight with "
            "groups can: leave the layer out of the adapter"
        )
    return down


def _places(whole: Tensor, groups: int) -> list[Tensor]:
    rows = whole.chunk(groups)
    return [row.chunk(groups, 1)[i] for i, row in enumerate(rows)]
