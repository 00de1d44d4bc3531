"""Running a user's model on a batch, without side effects.

:func:`call_model` defines what a batch means everywhere in the library. :func:`preserve_state` is
the context for all passes that are not training steps: measurements, calibration, dry runs.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

__all__ = ["call_model", "forward_arguments", "is_measuring", "preserve_state"]

_MEASURING: ContextVar[bool] = ContextVar("measuring", default=False)


def is_measuring() -> bool:
    """Whether this is within :func:`preserve_state`: a forward pass is no training step then."""
    return _MEASURING.get()


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model on a batch: ``model(*args, **kwargs)`` with :func:`forward_arguments`.

    Example:
        >>> x, labels = torch.ones(2, 4), torch.zeros(2)
        >>> model = nn.Linear(4, 3)
        >>> [call_model(model, batch).shape[1] for batch in (x, [x, labels], {"input": x})]
        [3, 3, 3]
    """
    args, named = forward_arguments(model, batch)
    return model(*args, **named)


def forward_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert a batch to the positional and keyword arguments of the forward pass.

    - A tensor or a ``PackedSequence`` is the only argument.
    - A dict, or another mapping such as a tokenizer's output, contains the keyword arguments.
    - A tuple or list, such as a ``DataLoader`` yields, contains the positional arguments: as many
      of its first entries as ``forward`` has positional parameters. From ``[inputs, targets]``, a
      model with one parameter gets the inputs. A model with optional parameters would get the
      targets too: pass ``(inputs,)`` or a dict instead.

    Args:
        model: any module; of a compiled model or a data-parallel wrapper, the inner module's
            signature is used.
        batch: a tensor, ``PackedSequence``, mapping, tuple or list.

    Raises:
        ValueError: the batch is none of these, or does not match the signature of ``forward``.
    """
    signature = _signature(model)
    args: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        named = dict(cast(Mapping[str, Any], batch))
    elif isinstance(batch, Tensor | PackedSequence):
        args = (batch,)
    elif isinstance(batch, tuple | list):
        args = tuple(cast(list[Any], batch)[: _positions(signature)])
    else:
        raise ValueError(
            "a batch is a tensor, a tuple or list of positional arguments of the forward pass, or "
            f"a dict of keyword arguments, got {_summary(batch)}; pass any other object as (x,)"
        )
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__}.forward{signature} does not take the batch {_summary(batch)}: "
            f"{error}; pass a tuple of its positional or a dict of its keyword arguments"
        ) from None
    return args, named


@contextmanager
def preserve_state(
    model: nn.Module,
    *,
    training: bool | None = None,
    grad: bool | None = None,
    eager: bool = False,
) -> Generator[None]:
    """A context that restores the state of a model and of the random generators on exit.

    However it ends, including exceptions and interrupts, these are restored:

    - the ``training`` flag of each module;
    - the buffers: the same objects, unwritten, so that a graph with a pending backward pass stays
      valid. Inside, the model has copies; those of scripted modules are written back;
    - the ``.grad`` of each parameter, which is None inside;
    - the random states of torch (the CPU's and the model's devices'), of Python and, if it is
      imported, of NumPy; and the gradient mode.

    Changes of parameter values, and anything else that a hook or a module writes, are not undone.

    Args:
        model: any module.
        training: the mode of all modules inside the context; None: unchanged.
        grad: whether gradients are recorded inside the context; None: unchanged.
        eager: run the Python code of a compiled model, so that hooks registered after compilation
            are called.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
        >>> with preserve_state(model, training=True):
        ...     y = model(torch.ones(2, 4))
        >>> int(model[0].num_batches_tracked)
        0
    """
    with ExitStack() as stack:
        stack.callback(_MEASURING.reset, _MEASURING.set(True))
        for kind, indices in _devices(model).items():
            stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if numpy := sys.modules.get("numpy"):
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        if grad is not None:
            stack.enter_context(torch.enable_grad() if grad else torch.no_grad())
        if eager and "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        copies: dict[int, Tensor] = {}  # shared buffers stay shared
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # its buffers cannot be exchanged
                _restore_later(module, stack)
                continue
            own = module.__dict__["_buffers"]
            stack.callback(module.__dict__.__setitem__, "_buffers", own)
            stack.callback(setattr, module, "training", module.training)
            module.__dict__["_buffers"] = {n: _copy(b, copies) for n, b in own.items()}
        for parameter in model.parameters():
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        if training is not None:
            model.train(training)
        yield


def _restore_later(module: torch.jit.ScriptModule, stack: ExitStack) -> None:
    """Have the buffers and the mode of a scripted module set back, in place."""
    stack.callback(setattr, module, "training", module.training)
    for buffer in module.buffers(recurse=False):
        stack.callback(_write, buffer, buffer.clone())


@torch.no_grad()
def _write(buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(value)


def _copy(buffer: Tensor | None, copies: dict[int, Tensor]) -> Tensor | None:
    if buffer is None or is_lazy(buffer):
        return buffer
    if id(buffer) not in copies:
        copies[id(buffer)] = buffer.clone()
    return copies[id(buffer)]


def _devices(model: nn.Module) -> dict[str, list[int]]:
    """The indices of the model's devices, by type; the CPU's random state is always saved."""
    found: dict[str, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        device = tensor.device
        if device.type not in ("cpu", "meta"):
            found.setdefault(device.type, set()).add(device.index or 0)
    return {kind: sorted(indices) for kind, indices in found.items()} or {"cuda": []}


def _signature(model: nn.Module) -> inspect.Signature:
    """The signature of the forward pass; for a transparent wrapper, that of the inner module."""
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        raise ValueError(
            f"{type(model).__name__}.forward has no signature, as after torch.jit.trace: "
            "give the model that was traced instead"
        ) from None
    passing = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if all(p.kind in passing for p in signature.parameters.values()):
        for name in ("_orig_mod", "module"):
            if isinstance(inner := getattr(model, name, None), nn.Module):
                return _signature(inner)
    return signature


def _positions(signature: inspect.Signature) -> int | None:
    """The largest number of positional arguments; None: any number."""
    kinds = [p.kind for p in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in named for kind in kinds)


def _summary(value: Any) -> str:
    """A short description of a batch, for error messages."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping):
        named = cast(Mapping[Any, Any], value).items()
        return f"{{{', '.join(f'{key}: {_summary(entry)}' for key, entry in named)}}}"
    if isinstance(value, tuple | list) and not isinstance(value, PackedSequence):
        listed = ", ".join(map(_summary, cast(list[Any], value)))
        return f"[{listed}]" if isinstance(value, list) else f"({listed})"
    return type(value).__name__
