"""Who reads a layer's weight without calling the layer: a row of factors has no ``weight``.

Torch's encoder layers do so in a fast path that can be closed. Other models (T5 reads
``self.wo.weight.dtype``) tell by their source: what ``forward``, and the methods that it names,
read of ``self``, and the classes of layers that they ask for.
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
    """The layers of which a module reads what factors in a row do not have, or asks for the class.

    Args:
        model: with these layers.
        layers: ranked layers, or plain ones with a ``weight``.
        values: whether of what is read only the weight's values count, not its dtype, device or
            shape, nor a bias or a method.
    """
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        chains = [c for c in _reads(type(parent)) if not (values and c[-1] in _OUTLINES)]
        for names in dict.fromkeys(c[:n] for c in chains for n in range(2, len(c) + 1)):
            for layer, name in _owners(parent, names):
                weights = layer.forms if isinstance(layer, RankedLayer) else ("weight",)
                if layer in layers and (name in weights if values else _lost(layer, name)):
                    found[layer] = f"{type(parent).__name__} reads its {name}"
        for kind in _kinds_asked(type(parent)):
            after = not values and issubclass(nn.Sequential, kind)
            held = (m for m in _held(parent) if m in layers and isinstance(m, kind) != after)
            found |= {m: f"{type(parent).__name__} asks for its class" for m in held}
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


def _held(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a module, and those in its containers."""
    for child in module.children():
        yield child
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield from _held(child)


@cache
def _reads(kind: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The chains of names that the forward pass of a class reads of ``self``."""
    chains = (chain for _, nodes in _methods(kind) for chain in _chains(nodes))
    return tuple(chain for chain in dict.fromkeys(chains) if len(chain) > 1)


@cache
def _kinds_asked(kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of layers that the forward pass of a class asks for by ``isinstance``."""
    found: dict[type[nn.Module], None] = {}
    for method, nodes in _methods(kind):
        for node in nodes:
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                named = (_value(method, one) for one in ast.walk(node.args[-1]))
                found |= {one: None for one in named if _is_layer(one)}
    return tuple(found)


def _is_layer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module


def _value(method: Any, node: ast.AST) -> Any:
    """What a dotted name in the source of a method means."""
    if isinstance(node, ast.Attribute):
        return getattr(_value(method, node.value), node.attr, None)
    known = getattr(method, "__globals__", {})
    return known.get(node.id) if isinstance(node, ast.Name) else None


@cache
def _methods(kind: type[nn.Module]) -> tuple[tuple[Any, tuple[ast.AST, ...]], ...]:
    """The forward pass of a class, and the methods that it names: each with its source, parsed."""
    if kind.__module__.startswith(("torch.nn.", "dynarank.layers.")):
        return ()
    found: list[tuple[Any, tuple[ast.AST, ...]]] = []
    due = dict.fromkeys(["forward"])
    while len(found) < len(due):
        method = getattr(kind, [*due][len(found)], None)
        foreign = getattr(method, "__module__", None) or ""
        nodes = () if foreign.startswith("torch.nn.") else _parsed(method := _unwrapped(method))
        found.append((method, nodes))
        due |= dict.fromkeys(chain[0] for chain in _chains(nodes))
    return tuple(found)


def _unwrapped(method: Any) -> Any:
    method = method.fget if isinstance(method, property) else method
    return inspect.unwrap(method) if callable(method) else method


def _parsed(method: Any) -> tuple[ast.AST, ...]:
    try:
        return tuple(ast.walk(ast.parse(dedent(inspect.getsource(method)))))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or no function
        return ()


def _chains(nodes: Collection[ast.AST]) -> Iterator[tuple[str, ...]]:
    """``("encoder", "*", "weight")`` for ``self.encoder[0].weight`` in a source."""
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
