"""The memory of a training step in the forms of a plan, by what it is for.

Legend: bytes of parameters, buffers, gradients and the optimizer's state follow from their shapes
and dtypes. Activations are what autograd saves in a forward pass for the backward pass, each
storage once. On a meta copy they are counted without computing; where fused kernels run, which
save other tensors on each device (attention, recurrent layers), or where the model does not run on
the meta device, they are those of a forward pass of a copy on the model's own device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dynarank.cost.flops import run_batch
from dynarank.cost.memory import saved_tensors, tensor_bytes
from dynarank.cost.meta_results import RememberedMetaResults
from dynarank.cost.stand_in import on_meta, stand_in
from dynarank.forms import Plan
from dynarank.layers.running import preserve_state
from dynarank.surgery.own_references import groups_of, wrapped

__all__ = ["StepMemory", "step_memory"]

Source = Literal["meta", "measured"]


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step, in bytes.

    Args:
        parameters: of all parameters, frozen ones included.
        buffers: of the buffers, such as running statistics.
        gradients: of the gradients of all trainable parameters.
        optimizer: of the optimizer's state; None: it could not be made.
        activations: of the tensors that a forward pass saves for the backward pass.
        source: whether activations were counted on a meta copy or measured on the model's device.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int | None
    activations: int
    source: Source

    @property
    def total(self) -> int:
        """All of it, as alive when the backward pass of a later step begins."""
        state = self.optimizer or 0
        return self.parameters + self.buffers + self.gradients + state + self.activations

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "total": self.total}


def step_memory(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    plan: Plan,
    batch: Any,
    loss: Callable[[Any], Tensor] | None = None,
) -> StepMemory:
    """The memory of a training step with the forms of a plan; nothing of the caller's changes.

    Args:
        model: the model; one in eval mode is taken as it will train, in training mode.
        optimizers: its optimizers.
        plan: the forms; other layers keep theirs.
        batch: a batch, as in :func:`dynarank.cost.trace`.
        loss: a function from the model's output to a scalar; None: the sum of its outputs.

    Example:
        >>> plain = nn.Sequential(nn.Linear(64, 64, bias=False))
        >>> sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        >>> found = step_memory(plain, [sgd], {}, torch.ones(8, 64))
        >>> found.parameters, found.optimizer, found.activations
        (16384, 16384, 2048)
    """
    with preserve_state(model, grad=True, eager=True), torch.inference_mode(False):
        twin, own = stand_in(model, optimizers, plan, meta=True)
        kept, buffers = list(twin.parameters()), list(twin.buffers())
        activations, source = _activations(model, twin, plan, batch, loss)
        trained = [p for p in kept if p.requires_grad]
        return StepMemory(
            tensor_bytes(kept),
            tensor_bytes(buffers),
            tensor_bytes(trained),
            _state_bytes(own, trained),
            activations,
            source,
        )


def _activations(
    model: nn.Module,
    twin: nn.Module,
    plan: Plan,
    batch: Any,
    loss: Callable[[Any], Tensor] | None,
) -> tuple[int, Source]:
    meta = any(p.is_meta for p in model.parameters())
    kernels = _FusedKernels(twin)
    try:
        if meta or not kernels.seen:
            with kernels:
                found = _saved(twin, on_meta(batch), loss)
            if meta or not kernels.seen:
                return found, "meta"
    except Exception:  # whatever the model does that meta tensors do not allow
        if meta:
            raise
    own = tree_map_only(Tensor, lambda x: x.detach().clone(), batch)
    return _saved(stand_in(model, [], plan, meta=False)[0], own, loss), "measured"


def _saved(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None) -> int:
    """The bytes that a forward pass saves besides parameters and buffers."""
    if not any(module.training for module in model.modules()):
        model.train()
    with saved_tensors() as saved, RememberedMetaResults():
        output = run_batch(model, batch, loss)  # which keeps them alive
    del output
    return saved.bytes_without([*model.parameters(), *model.buffers()])


class _FusedKernels(TorchFunctionMode):
    """Sees whether a forward pass calls kernels that save other tensors on each device."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen = any(isinstance(module, nn.RNNBase) for module in model.modules())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in (F.scaled_dot_product_attention, F.multi_head_attention_forward)
        return func(*args, **(kwargs or {}))


def _state_bytes(optimizers: Sequence[Optimizer], trained: Sequence[nn.Parameter]) -> int | None:
    """The bytes of the optimizers' states of these parameters after a step; None: no step runs."""
    try:
        _step(optimizers, trained)
    except Exception:  # it reads values, as Adafactor does, or its kernels know no meta device
        try:
            _step(optimizers, _on_cpu(optimizers, trained))
        except Exception:  # it needs a closure, say
            return None
    states = (one.state.values() for given in optimizers for one in wrapped(given))
    tensors = {id(v): v for some in states for state in some for v in _tensors(state)}
    return tensor_bytes(tensors.values())


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _step(optimizers: Sequence[Optimizer], trained: Sequence[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()


def _on_cpu(optimizers: Sequence[Optimizer], trained: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Have the optimizers hold CPU parameters in place of these; no state is left."""
    made = {id(p): nn.Parameter(torch.zeros_like(p, device="cpu")) for p in trained}
    for family in map(wrapped, optimizers):
        for one in family:
            one.state.clear()
        for group in groups_of(family):
            group["params"][:] = [made.get(id(p), p) for p in group["params"]]
    return list(made.values())
