"""transformers' models, known by their class's name: the names of tied weights, and a warning.

Which parameters are tied, a ``PreTrainedModel`` knows by name. The names here follow the forms, so
``tie_weights`` and ``save_pretrained`` work as for a plain model.

``from_pretrained`` cannot rebuild a folder that says nothing of the forms, and that is written by
:mod:`dynarank.integrations.transformers` only; without it, ``save_pretrained`` warns.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, cast
from weakref import ref

from torch import nn

from dynarank.layers import RankedLayer

__all__ = ["follow_pretrained", "unfollow_pretrained"]

_INTEGRATION = "dynarank.integrations.transformers"


def follow_pretrained(model: nn.Module) -> None:
    """Let the pretrained models in a model have the names that its parameters have."""
    for one in _pretrained(model):
        known = getattr(one, "_tied_weights_keys", None)
        if known and not isinstance(known, _TiedNames):
            one._tied_weights_keys = _TiedNames(one, known)
        if not _warners(one):
            one.register_state_dict_pre_hook(_warn_of_save)


def unfollow_pretrained(model: nn.Module) -> None:
    """Give them back what they had."""
    for one in _pretrained(model):
        known = vars(one).get("_tied_weights_keys")
        if isinstance(known, _TiedNames):
            del one._tied_weights_keys
            if one._tied_weights_keys != known.plain:
                one._tied_weights_keys = known.plain
        for number in _warners(one):
            del one._state_dict_pre_hooks[number]


def _pretrained(model: nn.Module) -> Iterator[Any]:
    if "transformers" in sys.modules:
        for module in model.modules():
            if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__):
                yield module


class _TiedNames(dict[str, str]):
    """``{target: source}`` of the tied parameters, a weight with factors replaced by these."""

    def __init__(self, model: nn.Module | None, plain: dict[str, str]) -> None:
        super().__init__(plain)
        self.plain, self._model = dict(plain), None if model is None else ref(model)

    def copy(self) -> dict[str, str]:
        """The names as of now."""
        model = None if self._model is None else self._model()
        pairs = self.plain.items()
        return dict(new for pair in pairs for new in _with_factors(model, *pair))

    def keys(self) -> KeysView[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Those of the targets."""
        return self.copy().keys()

    def values(self) -> ValuesView[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Those of the sources."""
        return self.copy().values()

    def items(self) -> ItemsView[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both."""
        return self.copy().items()

    def __iter__(self) -> Iterator[str]:
        return iter(self.copy())

    def __deepcopy__(self, memo: dict[int, Any]) -> _TiedNames:
        model = None if self._model is None else memo.get(id(self._model()))
        return _TiedNames(model, self.plain)

    def __reduce__(self) -> Any:
        return dict, (self.plain,)  # the next change of form makes it follow again


def _with_factors(model: nn.Module | None, target: str, source: str) -> Iterator[tuple[str, str]]:
    """The tied parameters that stand for a tied weight."""
    (to, _, own), (at, _, name) = target.rpartition("."), source.rpartition(".")
    layer = None if model is None else dict(model.named_modules()).get(at)
    if own == name and isinstance(layer, RankedLayer) and layer.has_factors(name):
        for factor in layer.resolved(name).names:
            yield f"{to}.{factor}", f"{at}.{factor}"
    else:
        yield target, source


def _warners(model: nn.Module) -> list[int]:
    hooks = cast("dict[int, Any]", model._state_dict_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    return [number for number, hook in hooks.items() if hook is _warn_of_save]


def _warn_of_save(model: nn.Module, *_: object) -> None:
    """Called before each ``state_dict()``: warn if it is ``save_pretrained`` that asks."""
    caller = sys._getframe(2).f_code.co_name  # pyright: ignore[reportPrivateUsage]
    if caller != "save_pretrained" or _INTEGRATION in sys.modules:
        return
    layers = [one for one in model.modules() if isinstance(one, RankedLayer)]
    if count := sum(any(map(one.has_factors, one.forms)) for one in layers):
        warnings.warn(
            f"{count} layers of this {type(model).__name__} have factors, and save_pretrained "
            "writes a folder from which from_pretrained cannot rebuild them: import "
            f"{_INTEGRATION} first (before both), or save a plain model, "
            "dr.merge(copy.deepcopy(model))",
            UserWarning,
            stacklevel=4,
        )
