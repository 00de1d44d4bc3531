"""Copies of a model, such as averages of its weights, and where an object has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dynarank.distributed.unwrap import unwrapped
from dynarank.forms import Form, FullRank, same_weight
from dynarank.layers import RankedLayer
from dynarank.surgery.sites import survey

__all__ = ["apart", "copies_in", "factored_forms", "is_copy"]

_DEEP = 3  # attributes of attributes: a trainer's callback has an AveragedModel, which has the copy
_PLAIN = (str, bytes, int, float, complex, type, type(None))


def copies_in(model: nn.Module, holder: Any) -> list[nn.Module]:
    """The copies of the model that an object is or holds, without wrappers; not the model itself.

    They are known by their structure: the names of their modules, and the shapes of their weights
    whatever their forms.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> average = torch.optim.swa_utils.AveragedModel(dr.factorize(model, 2, layers="0"))
        >>> copies_in(model, average)[0] is average.module
        True
    """
    own = {id(module) for module in model.modules()}
    found: list[nn.Module] = []
    seen = set[int]()
    queue: list[tuple[Any, int]] = [(holder, 0)]
    for one, depth in queue:  # grows meanwhile
        one = unwrapped(one) if isinstance(one, nn.Module) else one
        if id(one) in seen or id(one) in own:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module) and is_copy(model, one):
            found.append(one)
        elif depth < _DEEP:
            queue += [(inner, depth + 1) for inner in _inside(one)]
    return found


def is_copy(model: nn.Module, other: nn.Module) -> bool:
    """Whether the other module has the model's structure, in any forms."""
    if [name for name, _ in model.named_modules()] != [name for name, _ in other.named_modules()]:
        return False
    shapes, others = ({one.path: one.shape for one in survey(m)} for m in (model, other))
    return shapes == others


def apart(
    module: nn.Module, other: nn.Module, weight: str | None = None, *, basis: bool = True
) -> str:
    """Why parameters of a model's module mean something else in a copy of it; empty if they do not.

    The forms differ, or the factors were made by different changes, so that they have other bases.

    Args:
        module: of the model.
        other: that of the copy.
        weight: the name of the weight to look at; None: all.
        basis: whether to look at the bases too.
    """
    own, theirs = factored_forms(module, weight), factored_forms(other, weight)
    names = own.keys() | theirs.keys()
    if not all(n in own and n in theirs and same_weight(own[n], theirs[n]) for n in names):
        return f"{_said(theirs)} there and {_said(own)} in the model"
    for name in own if basis else ():
        assert isinstance(module, RankedLayer) and isinstance(other, RankedLayer)
        made, there = module.made_by.get(name), other.made_by.get(name)
        if made and there and made != there:
            return "of another basis there than in the model"
    return ""


def factored_forms(module: nn.Module, weight: str | None = None) -> dict[str, Form]:
    """The forms of the weights that have factors."""
    forms = module.forms.items() if isinstance(module, RankedLayer) else ()
    asked = ((name, form) for name, form in forms if weight in (None, name))
    return {name: form for name, form in asked if not isinstance(form, FullRank)}


def _said(forms: Mapping[str, Form]) -> str:
    return ", ".join(map(str, forms.values())) or "full-rank"


def _inside(holder: Any) -> Iterator[Any]:
    """What an object holds in its attributes, also in lists and dictionaries of them."""
    values = holder.children() if isinstance(holder, nn.Module) else ()
    yield from values
    attributes: Mapping[str, Any] = getattr(holder, "__dict__", {})
    for value in attributes.values():
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        elif not isinstance(value, _PLAIN):
            yield value
