"""The last training batches, as the model's forward pass was called with them."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dynarank.layers.running import forward_arguments, is_measuring

__all__ = ["COUNT", "LastBatches"]

COUNT = 8  # as many as calibrated the cuts of our experiments; a budget needs no more


class LastBatches:
    """Keeps the arguments of the model's last forward passes that recorded gradients.

    References are kept, not copies. A batch is a tuple of positional arguments, or a dict if some
    were given by keyword, as :func:`dynarank.calibrate` takes them.

    Args:
        model: the model, whose ``forward`` the training loop calls.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: deque[Any] = deque(maxlen=COUNT)
        self._handle: Any = None

    def __call__(self) -> list[Any]:
        """The batches, oldest first."""
        return list(self._kept)

    def watch(self, on: bool) -> None:
        """Keep batches from now on, or none."""
        if on and self._handle is None:
            hook = _Hook(self)
            self._handle = self._model.register_forward_pre_hook(hook, with_kwargs=True)
        elif not on:
            if self._handle is not None:
                self._handle.remove()
            self._handle = None
            self._kept.clear()

    def add(self, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Keep the arguments of a forward pass."""
        if named and args:
            bound = inspect.signature(self._model.forward).bind(*args, **named)
            args, named = (), bound.arguments
        batch = dict(named) if named else args
        self._kept.append(tree_map_only(Tensor, Tensor.detach, batch))

    def state_dict(self) -> list[Any] | None:
        """The batches, if plain data and tensors are all that is in them; None: not watching."""
        if self._handle is None:
            return None
        plain = (Tensor, int, float, str, bool, type(None))
        able = (b for b in self._kept if all(isinstance(x, plain) for x in tree_leaves(b)))
        return list(able)

    def load_state_dict(self, batches: list[Any] | None) -> None:
        """Go on with these batches."""
        self.watch(batches is not None)
        self._kept.clear()
        for batch in batches or ():
            forward_arguments(self._model, batch)  # raises ValueError for what is no batch of it
            self._kept.append(batch)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handle": self._handle is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        watching, self._handle = self._handle, None
        self.watch(watching)


class _Hook:
    """Passes arguments on; a copy of the model has a hook that does nothing."""

    def __init__(self, batches: LastBatches | None) -> None:
        self._batches = (lambda: None) if batches is None else weakref.ref(batches)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        batches = self._batches()
        trains = torch.is_grad_enabled() and not is_measuring()
        if batches is not None and trains and not torch.compiler.is_compiling():
            batches.add(args, named)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> Any:
        return _Hook, (None,)
