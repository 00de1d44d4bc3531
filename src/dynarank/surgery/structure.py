"""A model's structure: whether it agrees with itself, and a hash that several processes compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dynarank.forms import Adapted, FullRank
from dynarank.layers import RankedLayer, WeightSpec, own_parameters
from dynarank.surgery.problem import Problem, listed, shape

__all__ = ["structure_hash", "structure_problems", "tie_problems"]


def structure_hash(model: nn.Module) -> str:
    """A hash of the forms and of the names, shapes, dtypes and ties of all parameters and buffers.

    Equal for models into which the same state can be loaded, whatever their values: processes that
    train one model together must have the same.

    Example:
        >>> one, two = (dr.factorize(nn.Sequential(nn.Linear(8, 8)), 2) for _ in range(2))
        >>> structure_hash(one) == structure_hash(two)
        True
        >>> structure_hash(one) == structure_hash(dr.inflate(two))
        False
    """
    first: dict[int, str] = {}
    rows: list[object] = []
    for name, p in model.named_parameters(remove_duplicate=False):
        same_as = first.setdefault(id(p), name)
        rows.append((name, [*p.shape], str(p.dtype), p.requires_grad, same_as))
    rows += [(name, [*b.shape], str(b.dtype)) for name, b in model.named_buffers()]
    for path, module in model.named_modules():
        if isinstance(module, RankedLayer):
            rows += [(path, name, repr(form)) for name, form in module.forms.items()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def structure_problems(model: nn.Module) -> Iterator[Problem]:
    """I7: layers whose parameters are not those of the form that they record."""
    for path, layer in model.named_modules():
        if isinstance(layer, RankedLayer):
            for name in layer.forms:
                for text in _misfits(layer, name):
                    where = path if name == "weight" else f"{path}.{name}"
                    yield Problem("I7", where or "the model", text)


def tie_problems(model: nn.Module) -> Iterator[Problem]:
    """I6: weights that are tied only in part, only in memory, or not as the model declares."""
    yield from _partly_tied(model)
    yield from _tied_in_memory(model)
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        ends = [_embeddings(model, kind) for kind in ("input", "output")]
        if None not in ends and {*ends[0].values()} != {*ends[1].values()}:  # type: ignore[union-attr]
            yield Problem(
                "I6",
                "the output embeddings",
                "the model's configuration ties them to the input embeddings, and they are two "
                "weights: call model.tie_weights(), or set config.tie_word_embeddings=False",
            )


def _misfits(layer: RankedLayer, name: str) -> Iterator[str]:
    form, own, weight = layer.forms[name], own_parameters(layer), layer.resolved(name)
    spec = weight.spec
    if weight.form != form:
        yield f"it records the form {form} and computes in {weight.form}; call form_changed()"
        return
    if isinstance(form, FullRank):
        last = layer.last_factored_forms.get(name)
        left = [n for n in spec.parameter_names(last) if n in own] if last else []
        if left and name in own:
            yield f"it is {form} and still has the factors {listed(left)}; delete them"
        return
    for one, expected in zip(weight.names, _shapes(spec, form), strict=True):
        found = own.get(one)
        if found is None:
            yield f"it is {form} and has no parameter {one!r}; load the structure of its state"
        elif shape(found) != expected:
            yield f"in the form {form} its {one} is {expected}, and it has {shape(found)}"
        elif spec.is_base(one) and found.requires_grad:
            yield f"its {one} is frozen in the form {form}, and it trains; requires_grad_(False)"
    if own.get(name) is not None:
        yield f"it is {form} and has a parameter {name!r} beside its factors; delete that"


def _shapes(spec: WeightSpec, form: Adapted | object) -> list[tuple[int, ...]]:
    """The shapes of a weight's parameters in a form with factors, base first."""
    factors = [*spec.factor_shapes(form)]  # type: ignore[arg-type]
    if not isinstance(form, Adapted):
        return factors
    return [shape(spec.from_canonical(torch.empty(spec.shape, device="meta"))), *factors]


def _partly_tied(model: nn.Module) -> Iterator[Problem]:
    seen: dict[int, tuple[str, tuple[object, ...]]] = {}
    for path, layer in model.named_modules():
        for name, form in layer.forms.items() if isinstance(layer, RankedLayer) else ():
            assert isinstance(layer, RankedLayer)
            own = own_parameters(layer)
            parameters = [own.get(one) for one in layer.resolved(name).names]
            whole = tuple(map(id, parameters)), form
            where = path if name == "weight" else f"{path}.{name}"
            for p in (p for p in parameters if p is not None):
                other, theirs = seen.setdefault(id(p), (where, whole))
                if theirs != whole:
                    yield Problem(
                        "I6",
                        where,
                        f"it shares a parameter with {other!r}, but not all of them and the form: "
                        "assign the same parameters to both, or a copy to one of them",
                    )
                    break


def _tied_in_memory(model: nn.Module) -> Iterator[Problem]:
    """Parameters of the very same entries: an optimizer would change them twice."""
    seen: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, p in model.named_parameters():
        if type(p.data) is not Tensor or p.is_meta or p.layout != torch.strided or not p.numel():
            continue
        other, first = seen.setdefault((p.data_ptr(), p.shape), (name, p))
        if first is not p and first.stride() == p.stride():
            yield Problem(
                "I6",
                name,
                f"it is in the memory of {other!r}, but is another parameter: assign one to both, "
                "as load_state_dict(assign=True) does not",
            )


def _embeddings(model: nn.Module, kind: str) -> Mapping[str, int] | None:
    """The ids of the parameters of the embeddings that a transformers model declares."""
    read = getattr(model, f"get_{kind}_embeddings", None)
    module = read() if callable(read) else None
    if not isinstance(module, nn.Module):
        return None
    own = own_parameters(module)
    return {name: id(p) for name, p in own.items() if p is not None and p.ndim > 1}
