"""Output layers: the weights whose output is the model's, as far as its modules tell.

Nothing is run. In this order:

1. what the model declares, by ``get_output_embeddings`` (transformers) or ``get_classifier``
   (timm), in any module of it;
2. the last layer of each child with the name of an output: ``head``, ``lm_head``, ``classifier``,
   ``score``, ``output``, each of ``heads``, ...;
3. if neither is found, the linear layer registered last, unless it belongs to one of several
   like blocks: the end of an encoder without a head is no output layer.

Wrappers (a module with nothing but one child) are looked through. A single layer has no output
layer.
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
_WORDS = "(head|classifier|score|logit|output|out|predictor|prediction|readout)"
_NAMED = re.compile(rf"((^|_){_WORDS}s?_?\d*$)|(^{_WORDS}s?_)")
_OUTPUT, _LAST = "output layer", "last linear: taken as output"


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
    chain = list(_wrappers(model, owners))
    core = chain[-1]
    if ranked_class(type(core)) is not None or core in owners:
        return {}
    declared = {module: _declared(module) for module in model.modules()}
    named = [child for name, child in core.named_children() if _NAMED.search(name)]
    own = [*named, *(part for module in chain for part in declared[module])]
    nested = [part for parts in declared.values() for part in parts]
    found = {end: _OUTPUT for part in (*own, *nested) for end in _ends(part, owners)}
    if not any(True for part in own for _ in _ends(part, owners)):
        last = _last_linear(core, owners)
        found = found if last is None else {last: _LAST, **found}
    return found


def _wrappers(model: nn.Module, owners: dict[nn.Module, Site]) -> Iterator[nn.Module]:
    """The model, and inside it what each wrapper holds, down to one that is no wrapper."""
    yield model
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    alone = len(children) == 1 and not any(True for _ in model.parameters(recurse=False))
    if alone and model not in owners:
        yield from _wrappers(children[0], owners)


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
    """The last layer of a part of the model; of each entry, if it is a list of parts."""
    if isinstance(part, nn.ModuleList | nn.ModuleDict):
        for entry in part.children():
            yield from _ends(entry, owners)
    else:
        yield from [module for module in part.modules() if module in owners][-1:]


def _last_linear(core: nn.Module, owners: dict[nn.Module, Site]) -> nn.Module | None:
    for path, module in reversed(list(core.named_modules())):
        if module in owners and _is_linear(owners[module]):
            return None if _in_like_blocks(core, path, owners) else module
    return None


def _is_linear(site: Site) -> bool:
    """Whether it is a linear layer that is called itself, of a class that is handled or not."""
    if site.spec.name != "weight" or site.spec.lookup or site.reader is not None:
        return False
    return isinstance(site.module, nn.Linear) or (site.form is not None and not site.spec.dims)


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
