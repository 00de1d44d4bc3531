"""A copy of a model in the forms of a plan, without the values: for what depends on shapes alone.

No weight is decomposed, so that a copy of a large model takes no time; on the meta device it takes
no memory either.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from dynarank.forms import Change, Form, Plan
from dynarank.surgery.edit import Edit, like_old
from dynarank.surgery.optimizer_state import new_contents, write
from dynarank.surgery.own_references import wrapped
from dynarank.surgery.settings import new_parameters
from dynarank.surgery.site import Site
from dynarank.surgery.transaction import differences

__all__ = ["meta_copy", "on_meta", "stand_in", "without_graphs"]


def stand_in(
    model: nn.Module, optimizers: Sequence[Optimizer], plan: Plan, *, meta: bool
) -> tuple[nn.Module, list[Optimizer]]:
    """A copy of a model and its optimizers in the forms of a plan; new factors hold small values.

    Args:
        model: the model; it does not change.
        optimizers: its optimizers, without state in the copy.
        plan: the forms; other layers keep theirs.
        meta: whether the copy is on the meta device; else it is where the model is.

    Example:
        >>> from dynarank.forms import LowRank
        >>> plain = nn.Sequential(nn.Linear(64, 64))
        >>> twin, _ = stand_in(plain, [], {"0": LowRank(8)}, meta=True)
        >>> [tuple(p.shape) for p in twin.parameters()], next(twin.parameters()).device.type
        ([(8, 64), (64, 8), (64,)], 'meta')
    """
    with torch.inference_mode(False):
        twin, own = copy.deepcopy((model, list(optimizers)), _memo(model, optimizers, meta))
        edits = [_edit(site, after) for site, after in differences(twin, plan)]
        contents = new_contents(edits, own, "reset")
        with ExitStack() as kept:
            for edit in edits:
                edit.commit(kept)
            write(contents, kept)
            kept.pop_all()
    return twin, own


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, made without a copy of its values.

    Example:
        >>> meta_copy(nn.Linear(4, 2)).weight.device.type
        'meta'
    """
    return copy.deepcopy(model, _memo(model, (), meta=True))


def on_meta(batch: Any) -> Any:
    """A batch with its tensors on the meta device."""
    return tree_map_only(Tensor, lambda x: x.detach().to("meta"), batch)


def without_graphs(model: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy that detaches results of autograd, which modules may keep.

    torch copies no tensor that has a graph: an attention map, or a loss kept as an attribute.
    """
    kept = tree_leaves([list(vars(module).values()) for module in model.modules()])
    return {id(v): v.detach() for v in kept if isinstance(v, Tensor) and not v.is_leaf}


def _memo(model: nn.Module, optimizers: Sequence[Optimizer], meta: bool) -> dict[int, Any]:
    """What a deep copy is to hold in place of tensors and optimizer states."""
    memo: dict[int, Any] = without_graphs(model)
    for optimizer in (one for given in optimizers for one in wrapped(given)):
        memo[id(optimizer.state)] = defaultdict(dict)
    if meta:
        for p in model.parameters():
            memo[id(p)] = _on_meta(p)
        memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return memo


def _on_meta(parameter: Parameter) -> Parameter:
    made = Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _edit(site: Site, after: Form) -> Edit:
    """The change of a weight to parameters of the right shapes."""
    assert site.form is not None
    old, shapes = site.parameters(), site.spec.parameter_shapes(after)
    like = next(iter(old.values()))
    values = {
        name: like_old(_small(shape, like), name, site, after) for name, shape in shapes.items()
    }
    new = new_parameters(site, values)
    return Edit(site, Change(site.path, site.form, after, 0.0), old, new)


def _small(shape: tuple[int, ...], like: Tensor) -> Tensor:
    # Small, so that a model of many layers computes finite numbers.
    return torch.full(shape, 1e-2, dtype=like.dtype, device=like.device)
