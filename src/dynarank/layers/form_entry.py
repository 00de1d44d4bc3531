"""What a layer's state says of its forms: how the tensors beside it make up the weights.

The tensors alone do not tell an adapter's alpha, nor two decompositions with factors of the same
shapes apart. So ``state_dict`` of a layer with factors has one more entry, ``saved_forms``: JSON,
one integer a byte. As a tensor it goes wherever weights go (safetensors, a copy of the state with
other devices or dtypes), and the mean of several states of the same forms is an entry like them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dynarank.form_data import form_from_data, form_to_data
from dynarank.forms import Adapted, Form, FullRank, LowRank

__all__ = [
    "KEY",
    "SavedForm",
    "SavedForms",
    "from_tensor",
    "from_text",
    "read_notes",
    "to_tensor",
    "to_text",
]

KEY = "saved_forms"
_BLOCK = 256  # bytes: a longer number rarely makes a longer entry, which in-place loaders refuse
_MOST = 1 << 20  # bytes


@dataclass(frozen=True)
class SavedForm:
    """What is saved of a weight beside its parameters, and looked up by its next change of form.

    Args:
        form: its form.
        last: the form in which it last had factors, if it has none.
        frozen: the factors that were frozen while others trained.
        norms: those of the factors when a change made them.
    """

    form: Form
    last: LowRank | Adapted | None = None
    frozen: frozenset[str] = frozenset()
    norms: tuple[float, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """As plain data; what is empty is left out."""
        data = form_to_data(self.form)
        if self.last is not None:
            data["last"] = form_to_data(self.last)
        if self.frozen:
            data["frozen"] = sorted(self.frozen)
        if self.norms:
            data["norms"] = [f"{norm:.16e}" for norm in self.norms]  # exact, and of one length
        return data

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> SavedForm:
        """The inverse of :meth:`to_data`."""
        given = dict(data)
        last, frozen, norms = (given.pop(key, None) for key in ("last", "frozen", "norms"))
        before = None if last is None else _form(last)
        sizes = tuple(map(float, norms or ()))
        if isinstance(before, FullRank) or not all(map(math.isfinite, sizes)):
            raise ValueError(f"{data!r} is not the data of a saved form")
        return cls(_form(given), before, frozenset(map(str, frozen or ())), sizes)


SavedForms = Mapping[str, SavedForm]  # by the weight's name in the layer


def to_text(saved: SavedForms) -> str:
    """The saved forms of a layer's weights as JSON."""
    data = {name: one.to_data() for name, one in saved.items()}
    return json.dumps(data, separators=(",", ":"))


def from_text(text: object) -> dict[str, SavedForm]:
    """The inverse of :func:`to_text`.

    Raises:
        ValueError: it is something else.
    """
    try:
        if not isinstance(text, str) or len(text) > _MOST:
            raise ValueError("it is no text, or too long a one")
        found = json.loads(text)
        return {name: SavedForm.from_data(data) for name, data in found.items()}
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"it does not say of which forms its weights are: {error}") from None


def read_notes(metadata: Mapping[str, Any]) -> dict[str, dict[str, SavedForm]]:
    """What a module's metadata says of the full-rank layers in it, by their path in the module.

    Raises:
        ValueError: it is something else.
    """
    notes = metadata.get(KEY, {})
    if not isinstance(notes, Mapping):
        raise ValueError(f"its metadata does not say of which forms its weights are: {notes!r}")
    found = cast(Mapping[str, object], notes)
    return {path: from_text(text) for path, text in found.items()}


def to_tensor(saved: SavedForms) -> Tensor:
    """The entry of a state that holds these forms."""
    text = to_text(saved).encode()
    padded = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return torch.tensor(list(padded), dtype=torch.int32, device="cpu")


def from_tensor(entry: object) -> dict[str, SavedForm]:
    """The inverse of :func:`to_tensor`, for tensors of any dtype.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(entry, Tensor) or entry.ndim != 1 or not 0 < entry.numel() <= _MOST:
        raise ValueError("it does not say of which forms its weights are: it is no list of bytes")
    values = cast("list[float]", entry.detach().double().round().tolist())
    if not all(0 <= value < 256 for value in values):
        raise ValueError("it does not say of which forms its weights are: it holds no bytes")
    return from_text(bytes(map(int, values)).decode(errors="replace"))


def _form(data: Mapping[str, Any]) -> Form:
    """The form of exactly this data, its rank a number."""
    form = form_from_data(data)
    plain = isinstance(data.get("recompute", False), bool)
    plain &= isinstance(data.get("decomposition", ""), str)
    plain &= type(data.get("rank", 1)) is int
    kept = json.dumps(form_to_data(form), sort_keys=True)
    if not plain or kept != json.dumps(data, sort_keys=True):
        raise ValueError(f"{dict(data)!r} is not the data of a form")
    return form
