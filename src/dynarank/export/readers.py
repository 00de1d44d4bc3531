"""Who reads a layer's weight without calling the layer: a row of factors has no ``weight``.

Torch's encoder layers do so in a fast path that can be closed. Other models (T5 reads
``self.wo.weight.dtype``) tell by their source: what ``forward``, and the methods that it names,
read of ``self``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Iterator
from functools import cache
from textwrap import dedent
from typing import Any

from torch import nn

from dynarank.layers import RankedLayer

__all__ = ["attributes", "close_fast_paths", "weights_read"]

_PLAIN = (int, float, str, tuple, type(None))

_OUTLINES = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"})


def weights_read(
    model: nn.Module, layers: Collection[nn.Module], *, values: bool = False
) -> dict[nn.Module, str]:
    """The layers of which a module reads what factors in a row do not have, and the module.

    Args:
        model: with these layers.
        layers: ranked layers, or plain ones with a ``weight``.
        values: whether only the weight's values count, not its dtype, device or shape, nor a bias
            or a method.
    """
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        chains = [c for c in _reads(type(parent)) if not (values and c[-1] in _OUTLINES)]
        for names in dict.fromkeys(c[:n] for c in chains for n in range(2, len(c) + 1)):
            for layer, name in _owners(parent, names):
                weights = layer.forms if isinstance(layer, RankedLayer) else ("weight",)
                if layer in layers and (name in weights if values else _lost(layer, name)):
                    found[layer] = f"{type(parent).__name__} reads its {name}"
    return found


def attributes(layer: nn.Module) -> dict[str, Any]:
    """The attributes of a layer that its plain form has too, such as ``in_features``."""
    own = vars(layer).items()
    return {n: value for n, value in own if not n.startswith("_") and isinstance(value, _PLAIN)}


def _lost(layer: nn.Module, name: str) -> bool:
    """Whether factors in a row do not have an attribute of the layer: a weight, a method."""
    return name not in attributes(layer) and not hasattr(nn.Sequential, name)


def close_fast_paths(model: nn.Module, layers: Collection[nn.Module]) -> list[str]:
    """Have torch's encoders around these layers call them also in evaluation; what to say of it."""
    told: list[str] = []
    for path, module in model.named_modules():
        inside = any(one in layers for one in module.modules())
        if inside and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # only read to choose the fast path
        elif inside and isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            module.use_nested_tensor = False
            told.append(
                f"{path or 'the model'!r} calls its layers one by one, since a fast path would "
                "read their weights: with src_key_padding_mask its outputs at padded positions are "
                "those of training, not zeros"
            )
    return told


def _owners(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose attribute a chain of names reads; ``"*"`` is any child."""
    first, *rest = names
    if not rest:
        yield module, first
        return
    children = [*module.children()] if first == "*" else [getattr(module, first, None)]
    for child in children:
        if isinstance(child, nn.Module):
            yield from _owners(child, tuple(rest))


@cache
def _reads(kind: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The chains of names that the forward pass of a class reads of ``self``."""
    if kind.__module__.startswith(("torch.nn.", "dynarank.layers.")):
        return ()
    found: dict[tuple[str, ...], None] = {}
    due, seen = ["forward"], {"forward"}
    for name in due:  # grows meanwhile
        method = getattr(kind, name, None)
        if getattr(method, "__module__", "").startswith("torch.nn."):
            continue
        for chain in _chains(method):
            found[chain] = None
            if chain[0] not in seen:
                seen.add(chain[0])
                due.append(chain[0])
    return tuple(chain for chain in found if len(chain) > 1)


def _chains(method: Any) -> Iterator[tuple[str, ...]]:
    """``("encoder", "*", "weight")`` for ``self.encoder[0].weight`` in the source of a method."""
    try:
        tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or no function
        return
    nodes = [*ast.walk(tree)]
    inner = {id(n.value) for n in nodes if isinstance(n, ast.Attribute | ast.Subscript)}
    for node in nodes:
        if id(node) in inner:
            continue
        names: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute | ast.Subscript):
            names.append(at.attr if isinstance(at, ast.Attribute) else "*")
            at = at.value
        if names and isinstance(at, ast.Name) and at.id == "self":
            yield tuple(reversed(names))
