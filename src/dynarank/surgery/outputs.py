"""Output layers: the weights whose output is the model's, as far as its modules tell.

Nothing is run. In this order:

1. what the model declares, by ``get_output_embeddings`` (transformers) or ``get_classifier``
   (timm), in any module of it;
2. the last layer of each child with the name of an output: ``head``, ``lm_head``, ``classifier``,
   ``score``, ``output``, ``actor``, each of ``heads``, ...;
3. if neither is found, the layers at the end: the linear layer registered last, a convolution
   registered after it, and the heads beside either, which read the same width. Not if it belongs
   to one of several like blocks: the end of an encoder without a head is no output layer. And a
   linear child ``fc``.

Wrappers (a module with one child) are looked through, and each entry of a dictionary of models is
taken by itself. A single layer has no output layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dynarank.layers import ranked_class
from dynarank.surgery.site import Site

__all__ = ["output_layers"]

_DECLARED = ("get_output_embeddings", "get_classifier")
_WORDS = (
    "(head|classifier|score|logit|output|out|outc|predictor|prediction|predict|pred|readout"
    "|segmentation|actor|critic|policy|advantage|action_net|generator|discriminator|student|teacher)"
)
_NAMED = re.compile(rf"((^|_){_WORDS}s?_?\d*$)|(^{_WORDS}s?_)")
_OUTPUT, _LAST = "output layer", "last {}: taken as output"


def output_layers(model: nn.Module, sites: Sequence[Site]) -> dict[nn.Module, str]:
    """The modules of output layers, with the reason.

    Args:
        model: any model.
        sites: its weights, each place of a tied one.

    Example:
        >>> from dynarank.surgery.sites import survey
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> list(output_layers(model, survey(model)).values())
        ['last linear: taken as output']
    """
    owners = {site.module: site for site in sites}
    chain = list(_wrappers(model))
    core = chain[-1]
    if ranked_class(type(core)) is not None or not any(core.children()):
        return {}
    declared = {module: _declared(module) for module in model.modules()}
    named = [child for name, child in core.named_children() if _NAMED.search(name)]
    own = [*named, *(part for module in chain for part in declared[module])]
    nested = [part for parts in declared.values() for part in parts]
    found = {end: _OUTPUT for part in (*own, *nested) for end in _ends(part, owners)}
    if any(True for part in own for _ in _ends(part, owners)):
        return found
    if models := _models(core):
        for one in models:
            found |= output_layers(one, sites)
        return found
    return _last(core, owners) | found


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and inside it what each wrapper holds, down to one that is no wrapper."""
    yield model
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    if len(children) == 1 and ranked_class(type(model)) is None:
        yield from _wrappers(children[0])


def _models(core: nn.Module) -> list[nn.Module]:
    """The models that a dictionary of models holds; empty if it is something else."""
    entries = list(core.children()) if isinstance(core, nn.ModuleDict) else []
    return entries if all(any(True for _ in entry.children()) for entry in entries) else []


def _declared(module: nn.Module) -> list[nn.Module]:
    """What a model says its output layers are, if it says so."""
    found: list[nn.Module] = []
    for name in _DECLARED:
        if not callable(method := getattr(type(module), name, None)):
            continue
        try:
            answer: Any = method(module)
        except Exception:  # it raises by design, or is another method of this name
            continue
        parts = answer if isinstance(answer, tuple | list) else (answer,)
        found += [part for part in parts if isinstance(part, nn.Module)]
    return found


def _ends(part: nn.Module, owners: dict[nn.Module, Site]) -> Iterator[nn.Module]:
    """The last layer of each entry of a list, each child with such a name, or else of the part."""
    copied = hasattr(part, "modules_to_save")  # PEFT: a frozen original beside its trained copies
    if copied or isinstance(part, nn.ModuleList | nn.ModuleDict):
        for entry in part.children():
            yield from _ends(entry, owners)
        return
    named = [child for name, child in part.named_children() if _NAMED.search(name)]
    if ends := [end for child in named for end in _ends(child, owners)]:
        yield from ends
    else:
        yield from [module for module in part.modules() if module in owners][-1:]


def _last(core: nn.Module, owners: dict[nn.Module, Site]) -> dict[nn.Module, str]:
    """The layers at the end of a model that names no output."""
    fc = getattr(core, "fc", None)
    found: dict[nn.Module, str] = {}
    if isinstance(fc, nn.Linear) and fc in owners:
        found[fc] = _LAST.format("linear")
    paths = {m: path for path, m in core.named_modules() if m in owners and _is_layer(owners[m])}
    layers = list(paths)
    for index in reversed(range(len(layers))):
        last = layers[index]
        linear = not owners[last].spec.dims
        if (linear or not found) and not _in_like_blocks(core, paths[last], owners):
            why = _LAST.format("linear" if linear else "convolution")
            found |= dict.fromkeys(_beside(layers[: index + 1], paths, owners), why)
        if linear:
            break
    return found


def _beside(
    layers: Sequence[nn.Module], paths: dict[nn.Module, str], owners: dict[nn.Module, Site]
) -> Iterator[nn.Module]:
    """The last of the layers, and heads right before it: of one parent, reading the same width."""
    last = layers[-1]
    parent, width = paths[last].rpartition(".")[0], owners[last].shape[1:]
    yield last
    for layer in reversed(layers[:-1]):
        n, *m = owners[layer].shape
        if paths[layer].rpartition(".")[0] != parent or tuple(m) != width or n == width[0]:
            return
        yield layer


def _is_layer(site: Site) -> bool:
    """Whether it is a linear layer or convolution that is called itself, if handled or not."""
    if site.spec.name != "weight" or site.spec.lookup or site.reader is not None or not site.shape:
        return False
    return isinstance(site.module, nn.Linear) or site.form is not None


def _in_like_blocks(core: nn.Module, path: str, owners: dict[nn.Module, Site]) -> bool:
    """Whether the layer is part of a block with a like block beside it in a list of blocks."""
    names, shapes = path.split("."), {id(module): site.shape for module, site in owners.items()}
    layer, parent = core.get_submodule(path), core
    for depth, name in enumerate(names[:-1]):
        blocks = parent.children() if isinstance(parent, nn.ModuleList | nn.Sequential) else ()
        parent, inside = parent.get_submodule(name), ".".join(names[depth + 1 :])
        twins = [dict(block.named_modules()).get(inside) for block in blocks if block is not parent]
        if any(shapes.get(id(twin)) == shapes[id(layer)] for twin in twins):
            return True
    return False
