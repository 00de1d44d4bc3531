"""What a state that is about to be loaded holds of a model's weights: in which forms they are.

The entry ``saved_forms`` of a layer says it, or the state's metadata if all its weights are
full-rank. In a state of another writer names and shapes tell, which leave one thing open: the alpha
of an adapter, for which the layer must have been adapted before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynarank.decompositions import decomposition_names
from dynarank.forms import Adapted, Form, FullRank, LowRank
from dynarank.layers import RankedLayer
from dynarank.layers.form_entry import KEY, SavedForm, from_tensor, read_notes
from dynarank.surgery.site import Site

__all__ = ["Incoming", "Load", "incoming"]


@dataclass(frozen=True)
class Load:
    """A state that is about to be loaded.

    Args:
        tables: its tensors by name, by the path of their module in the state.
        root: the model's path in the state.
        notes: what the metadata says of the forms of full-rank layers, by path in the model.
    """

    tables: Mapping[str, Mapping[str, Tensor]]
    root: str
    notes: Mapping[str, Mapping[str, SavedForm]]

    @classmethod
    def of(cls, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> Load:
        """The arguments are those of torch's hook before a load."""
        tables: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                module, _, name = key.rpartition(".")
                tables.setdefault(module, {})[name] = value
        return cls(tables, prefix[:-1], read_notes(metadata))

    @property
    def is_ours(self) -> bool:
        """Whether a model with ranked layers wrote it: then what is full-rank in it is so there."""
        return bool(self.notes) or any(KEY in table for table in self.tables.values())

    def places(self, site: Site) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Where the weight may be in the state, relative to the model, and the tensors there."""
        for path in (path for place in site.places for path in place.module_paths):
            yield path, self.tables.get(self.key(path), {})

    def key(self, path: str) -> str:
        """The path in the state of a module of the model."""
        return ".".join(filter(None, (self.root, path)))

    def saved(self, path: str) -> Mapping[str, SavedForm]:
        """What the state says of the forms of a module's weights."""
        entry = self.tables.get(self.key(path), {}).get(KEY)
        if entry is None:
            return self.notes.get(path, {})
        try:
            return from_tensor(entry)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: the state's {KEY} is damaged: {error}") from None


@dataclass(frozen=True)
class Incoming:
    """A weight of the model, and what the state holds of it.

    Args:
        site: the weight.
        before: its form.
        after: its form in the state.
        tensors: its parameters there, by name.
        paths: the modules under whose paths they are.
        saved: what the state says of its form; None if names and shapes had to tell.
    """

    site: Site
    before: Form
    after: Form
    tensors: Mapping[str, Tensor]
    paths: tuple[str, ...]
    saved: SavedForm | None

    @property
    def same(self) -> bool:
        """Whether the parameters fit as they are."""
        return self.site.spec.same_parameters(self.before, self.after)

    @property
    def becomes_full(self) -> bool:
        """Whether it is full-rank in the state, and not in the model."""
        return isinstance(self.after, FullRank) and not self.same

    @property
    def needs_edit(self) -> bool:
        """Whether it gets other parameters, or becomes ranked to remember its last form."""
        if not self.same:
            return True
        last = None if self.saved is None else self.saved.last
        return last is not None and self.site.form is not None and not _is_ranked(self.site)


def incoming(site: Site, load: Load) -> Incoming | None:
    """What the state holds of a weight; None if not all of it, or nothing that fits its shape.

    Raises:
        ValueError: what it says of the forms is damaged or of another model, the weight cannot take
            the form, or an adapter's alpha is unknown.
    """
    if len(site.shape) < 2:  # lazy
        return None
    found: dict[str, tuple[Form, Mapping[str, Tensor]]] = {}
    before = site.present_form
    for path, table in load.places(site):
        form = _form_in(site, before, load, path, table) if table else None
        if form is not None:
            found[path] = form, {n: table[n] for n in site.spec.parameter_names(form)}
    if not found:
        return None
    (first, (after, tensors)), *others = found.items()
    for path, (form, _) in others:
        if form != after:
            raise ValueError(
                f"{first!r} and {path!r} are one weight, which is {after} and {form} in the state: "
                "untie them first, or load a state in which they have one form"
            )
    saved = load.saved(first).get(site.spec.name)
    one = Incoming(site, before, after, tensors, tuple(found), saved)
    if site.form is None and not one.same and not isinstance(after, FullRank):
        raise ValueError(
            f"layer {site.path!r} is {after} in the state, and cannot take another form: "
            f"{site.obstacle}"
        )
    return one


def _form_in(
    site: Site, before: Form, load: Load, path: str, table: Mapping[str, Tensor]
) -> Form | None:
    """The form that a weight has in the state at one of its places."""
    spec, shapes = site.spec, {name: tuple(tensor.shape) for name, tensor in table.items()}
    saved = load.saved(path).get(spec.name)
    if saved is None:
        form = FullRank() if spec.name in table else _inferred(site, before, shapes)
    else:
        try:
            form = spec.resolve(saved.form)
        except ValueError as error:
            raise ValueError(f"layer {path!r} is {saved.form} in the state: {error}") from None
    if form is None or not all(name in shapes for name in spec.parameter_names(form)):
        return None
    wanted = spec.parameter_shapes(form)
    if all(shapes[name] == shape for name, shape in wanted.items()):
        return form
    if saved is None or isinstance(form, FullRank):
        return None  # torch names the sizes that do not match
    held = {name: shapes[name] for name in wanted}
    raise ValueError(
        f"layer {path!r} is {form} in the state, with the shapes {held}; a weight of the shape "
        f"{spec.stored_shape} has {wanted} then: it is the state of another model, or damaged"
    )


def _inferred(
    site: Site, before: Form, shapes: Mapping[str, tuple[int, ...]]
) -> LowRank | Adapted | None:
    """The form with parameters of these names and shapes, if any; one that it had is preferred."""
    spec = site.spec
    base = next((name for name in shapes if spec.is_base(name)), None)
    kind = LowRank if base is None else Adapted
    known = [form for form in (before, site.last_factored_form) if isinstance(form, kind)]
    matching = [f for f in known if spec.parameter_shapes(f).items() <= shapes.items()]
    names = dict.fromkeys([*(form.decomposition for form in known), *decomposition_names()])
    for name in names:
        rank = _rank(site, name, shapes)
        if rank is not None and known:
            matching.append(replace(known[0], rank=rank, decomposition=name))
        elif rank is not None and base is None:
            matching.append(LowRank(rank, name))
        elif rank is not None:
            raise ValueError(
                f"layer {site.path!r} has an adapter in the state, and nothing says its alpha, "
                f"which scales it: the state has no entry {f'{site.module_paths[0]}.{KEY}'!r}, and "
                f"the layer was not adapted before. Bring it to Adapted({rank}, {name!r}, "
                "alpha=...) by apply_plan first"
            )
    return max(matching, key=lambda form: len(spec.parameter_names(form)), default=None)


def _rank(site: Site, decomposition: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank at which a decomposition of the weight has factors of these shapes."""
    spec = site.spec
    found = spec.decomposition(LowRank(1, decomposition))
    names = spec.parameter_names(LowRank(1, decomposition))
    if not all(name in shapes for name in names):
        return None
    entries = sum(torch.Size(shapes[name]).numel() for name in names)
    ranks = range(1, found.limit(spec.shape) + 1)
    at = bisect_left(ranks, entries, key=lambda rank: found.size(spec.shape, rank))
    if at == len(ranks):
        return None
    wanted = spec.parameter_shapes(LowRank(ranks[at], decomposition))
    return ranks[at] if wanted.items() <= shapes.items() else None


def _is_ranked(site: Site) -> bool:
    return isinstance(site.module, RankedLayer)
