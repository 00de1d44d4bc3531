"""The calls of each weight in one training step, and which of them the backward pass reaches."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.module_tracker import ModuleTracker

from dynarank.layers import Call, ranked_class, readers
from dynarank.surgery.sites import Site

__all__ = ["CallRecord", "recorded_calls"]


@contextmanager
def recorded_calls(twin: nn.Module, sites: Sequence[Site]) -> Generator[CallRecord]:
    """A context with hooks that record each module's uses of its weights, tied ones together."""
    record = CallRecord(sites)
    with ExitStack() as stack:
        stack.callback(record.remove_hooks)
        for module, named in _by_module(twin, sites).items():
            note = partial(record.note, named)
            hook = module.register_forward_hook(note, with_kwargs=True, prepend=True)
            stack.callback(hook.remove)
        yield record


def _by_module(twin: nn.Module, sites: Sequence[Site]) -> dict[nn.Module, dict[str, Site]]:
    """The weights that each module uses, by their names there."""
    found: dict[nn.Module, dict[str, Site]] = {}
    parents = readers(twin)
    for site in sites:
        for one in site.places:
            module, name = twin.get_submodule(one.module_paths[0]), one.spec.name
            if module in parents:  # it is never called; its parent uses its weight
                module, name = parents[module], f"{one.module_paths[0].rpartition('.')[2]}.{name}"
            found.setdefault(module, {})[name] = site
    return found


class CallRecord:
    """The calls of each weight, and which of their outputs got a gradient.

    ``torch.utils.checkpoint`` runs a layer a second time in the backward pass. If the first time
    was without gradients (reentrant), the second is a training pass; else nothing reaches its
    output, and it ends before the last layer whose output nobody needs.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        self._noted: dict[str, list[tuple[Call, set[int]]]] = {site.path: [] for site in sites}
        self._hooks: list[RemovableHandle] = []
        self._backward = False
        self.inexact = False  # whether gradients came before the loss's backward pass, or are None

    @property
    def calls(self) -> dict[str, list[Call]]:
        """The calls of each weight, by path."""
        return {
            path: [replace(call, reached=_is_reached(call, outputs)) for call, outputs in noted]
            for path, noted in self._noted.items()
        }

    def begin_backward(self) -> None:
        """Note that the loss is computed: gradients are those of its backward pass from now on."""
        self._backward = True

    def remove_hooks(self) -> None:
        """Remove the hooks of outputs, which the model may have kept."""
        for hook in self._hooks:
            hook.remove()

    def note(
        self, sites: Mapping[str, Site], module: nn.Module, inputs: Any, named: Any, output: Any
    ) -> None:
        """Note the calls of a module that has just run; a forward hook."""
        ranked = ranked_class(type(module))
        assert ranked is not None
        bound = inspect.signature(module.forward).bind(*inputs, **named)
        bound.apply_defaults()
        how: dict[str, Any] = {"again": ModuleTracker().is_bw}
        if not any(tensor.requires_grad for _, tensor in _tensors(output)):
            how |= {"input_grad": False, "trains": False}
        outputs = self._watch(output)
        for name, found in ranked.calls(module, bound.arguments).items():
            if site := sites.get(name):
                device = next(iter(site.parameters().values())).device.type
                calls = (replace(call, device=device, **how) for call in found)
                self._noted[site.path] += [(call, outputs) for call in calls]

    def _watch(self, output: Any) -> set[int]:
        """The positions of the outputs that get a gradient, once they have."""
        reached: set[int] = set()
        for position, tensor in _tensors(output):
            if tensor.requires_grad:
                hook = partial(self._reach, reached, position)
                self._hooks.append(_whole(tensor).register_hook(hook))
        return reached

    def _reach(self, reached: set[int], position: int, gradient: Tensor | None) -> None:
        self.inexact |= gradient is None or not self._backward
        if gradient is not None:
            reached.add(position)


def _tensors(output: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors of an output, each with its position among a module's outputs."""
    for position, one in enumerate(output if isinstance(output, tuple) else (output,)):
        for leaf in tree_leaves(one):
            if isinstance(leaf, Tensor):
                yield position, leaf


def _whole(tensor: Tensor) -> Tensor:
    """The tensor of which this is a view: writing to a view in place replaces its own history."""
    base = tensor._base
    return tensor if base is None or not base.requires_grad else base


def _is_reached(call: Call, outputs: set[int]) -> bool:
    return bool(outputs) if call.output is None else call.output in outputs
